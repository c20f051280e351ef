"""Tasks: finding answers in texts as models write them, and comparing them in any spelling."""

import inspect
import json
import re
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax import tasks
from ilvr_jax.data.formats import find_format
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.tasks import TASKS, comt, vsp_planning, vsp_reasoning, zebra_cot
from ilvr_jax.tasks.final_answer import answer_text, find_boxed, find_final_answer
from ilvr_jax.tasks.spelling import normalise

REAL = Path(__file__).parents[1] / "data" / "mirage"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_the_documented_functions(task):
    functions = {
        "open_source": ["path", "root", "on_bad_record", "follow_links"],
        "check": ["record"],
        "find_answer": ["text", "record"],
        "canonical": ["answer"],
        "is_right": ["record", "answer"],
    }
    optional = {
        "controls": ["record"],
        "figures": ["records", "lines"],
        "edits": ["record", "seed"],
        "groups": ["record"],
        "level": ["record"],
        "with_steps": ["record", "data"],
        "draw_look": ["record", "texts", "data"],
    }
    functions |= {name: parameters for name, parameters in optional.items() if hasattr(task, name)}
    for name, parameters in functions.items():
        assert list(inspect.signature(getattr(task, name)).parameters) == parameters
        assert f"{name}({parameters[0]}: " in tasks.__doc__


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@given(text=st.text() | st.text("ABCabc.:()\\{}<>/answerboxdfil *$'\n 0123,-+"))
@settings(deadline=None)
def test_no_text_is_too_strange_to_be_read(task, text):
    answer = task.find_answer(text)
    assert answer is None or isinstance(task.canonical(answer), str)


STUCK = [".", "answer: ", "answer ", "<answer>", "\\boxed{", "\\text{", "1,", "1.", "(a) ", "\n", "final ", "*", "\\("]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("piece", STUCK)
def test_a_model_that_repeats_itself_is_read_fast(task, piece):
    started = time.process_time()
    for text in (piece * 20_000, f"Answer: {piece * 20_000}", f"\\boxed{{{piece * 20_000}}}"):
        answer = task.find_answer(text)
        if answer is not None:
            task.canonical(answer)
    assert time.process_time() - started < 5


def test_real_reasoning_records_are_right_about_themselves():
    source = vsp_reasoning.open_source(REAL / "sample.jsonl", None, "error")
    records = [source[number] for number in range(len(source))]
    lines = [json.loads(line) for line in (REAL / "sample.jsonl").read_text().splitlines()]
    expected = [re.search(r"boxed\{([ABC])\}", line["text_output"])[1] for line in lines]
    assert len(records) == 3
    for record, letter in zip(records, expected, strict=True):
        vsp_reasoning.check(record)
        assert vsp_reasoning.find_answer(answer_text(record)) == letter
        assert [vsp_reasoning.is_right(record, other) for other in "ABC"] == [other == letter for other in "ABC"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think> a hole. </think>The answer is \boxed{B}.", "B"),
        (r"\boxed{A} at first, but \boxed{C}", "C"),
        (r"\boxed{ (b) }", "B"),
        (r"\boxed{\text{A}}", "A"),
        (r"\boxed{C. Action Failed.}", "C"),
        (r"option A, or \boxed{D}", None),
        (r"The answer is \boxed{", None),
        ("The answer is B", "B"),
        ("The answer is C because it stops on ice.", "C"),
        ("Answer: (B)", "B"),
        ("**Answer:** A", "A"),
        ("**Answer**: **A**.", "A"),
        ("The answer is 'B'.", "B"),
        ("So the correct option is C.", "C"),
        ("It is not option A. Hence option C", "C"),
        ("It falls.\n\nB", "B"),
        ("It falls.\n(b).\n", "B"),
        ("b", "B"),
        ("", None),
        ("A player moves", None),
        ("The answer is a success", None),
        ("Now the answer. A player moves", None),
        ("The answer is D", None),
        ("options ABC", None),
    ],
)
def test_letters_are_found(text, expected):
    assert vsp_reasoning.find_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("b", "B"), (r"\boxed{C}", "C"), ("(B)", "B"), ("A. Action Success.", "A"), ("The answer is C.", "C")],
)
def test_final_answers_of_reasoning_records(answer, letter):
    record = Record("?", (), (Text(r"\boxed{A}"),), answer=answer)
    vsp_reasoning.check(record)
    assert vsp_reasoning.right_answer(record) == letter


@pytest.mark.parametrize("changes", [{"answer": "D"}, {"answer": ""}, {"steps": ()}, {"steps": (Text("Who knows?"),)}])
def test_reasoning_records_without_an_answer_are_refused(changes):
    with pytest.raises(BadRecord, match="^train.jsonl line 3: must have one of A, B, C as final answer or .*, got"):
        vsp_reasoning.check(
            Record(**{"question": "?", "images": (), "steps": (), "name": "train.jsonl line 3"} | changes)
        )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "a.png"
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(path)
    return path


FILES = {
    "ilvr": {
        "sequence_plan": [{"type": "text", "content": "Look."}, {"type": "latent", "helper_image": "a.png"}],
        "original_final_answer": "B",
    },
    "mirage": {"image_output": "a.png", "text_output": "Look: <output_image>The answer is B."},
    "vsp": {"original_final_answer": "B"},
}


@pytest.mark.parametrize("task", [vsp_reasoning, comt], ids=["vsp_reasoning", "comt"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_opened_in_its_format(picture, task, name):
    path = picture.with_name("records.jsonl")
    path.write_text(json.dumps({"text_input": "Will it?", "image_input": "a.png"} | FILES[name]) + "\n")
    assert find_format(path) == name
    (record,) = list(task.open_source(path, None, "error"))
    task.check(record)
    assert task.is_right(record, "B") and not task.is_right(record, "A")


def test_planning_maps_are_opened_and_played(picture):
    path = picture.with_name("maps.jsonl")
    line = {"text_input": "Which way?", "image_input": "a.png", "map_desc": [[1, 0], [-1, 2]]}
    path.write_text(json.dumps(line) + "\n")
    (record,) = list(vsp_planning.open_source(path, None, "error"))
    vsp_planning.check(record)
    assert vsp_planning.is_right(record, vsp_planning.find_answer(r"\boxed{right, D}"))
    assert not vsp_planning.is_right(record, "DR") and not vsp_planning.is_right(record, "")
    assert vsp_planning.canonical(vsp_planning.find_answer(r"\boxed{down, r}")) == "DR"


def test_zebra_cot_answers_are_those_of_its_column(tmp_path):
    image = {"bytes": b"no image is looked at here", "path": "1.png"}
    row = {"Question": "How much?", "Text Reasoning Trace": "THOUGHT 1: <image_start>[reasoning_image_1]<image_end>"}
    rows = [
        row | {"reasoning_image_1": image, "Final Answer": answer} for answer in ["$3.50", "St. Louis, 1,000", None]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = zebra_cot.open_source(tmp_path, None, "error")
    price, place, unanswered = (source[number] for number in range(3))
    assert not any(isinstance(step, Look) for step in price.steps)  # no picture is shown while answers are scored
    for record in (price, place):
        zebra_cot.check(record)
        assert zebra_cot.is_right(record, zebra_cot.find_answer(answer_text(record)))
    assert zebra_cot.is_right(price, "3.5") and not zebra_cot.is_right(price, "3.05")
    assert zebra_cot.is_right(place, "st. louis, 1000") and not zebra_cot.is_right(place, "St")
    with pytest.raises(BadRecord, match="^a.parquet row 2: must have a final answer"):
        zebra_cot.check(unanswered)


@pytest.mark.parametrize("task", [comt, zebra_cot], ids=["comt", "zebra_cot"])
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "must have a final answer"),
        (" ", "must have a final answer"),
        ("**", "must have a final answer"),
        ("$.$", "must have a final answer"),
        (r"\boxed{}", "must have a final answer"),
        ("1. up\n2. down", "must have a final answer of one line, got 2 lines"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(task, answer, sentence):
    with pytest.raises(BadRecord, match=f"^line 9: {sentence}"):
        task.check(Record("?", (), (Text("Who knows?"),), answer=answer, name="line 9"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{7} no, \boxed{8}. Answer: 9", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed {a {b} c}.", "a {b} c"),
        (r"\boxed{7} or \boxed{}", None),
        (r"\boxed{7} or \boxed{8", None),
        ("Answer: 1 <answer> 2 </answer>", "2"),
        ("<answer>1</answer><ANSWER>\n2\n</ANSWER>", "2"),
        ("<answer></answer>", None),
        ("It adds up.\n\nFinal Answer: 42", "42"),
        ("Final Answer: St. Louis. The end.\nBye", "St. Louis. The end."),
        ("**Final Answer:** 42", "42"),
        ("**Final Answer**: **42**", "42"),
        ("Final answer:\n\n42\nindeed", "42"),
        ("The answer is 3.5. We are done.", "3.5"),
        ("The final answer is 3.5! Done.", "3.5"),
        ("the ANSWER is: red", "red"),
        ("Answer: 1. No. Answer: 2", "2"),
        ("The answer is B. It is the red one.", "B. It is the red one"),
        ("The answer is not.\nFinal answer: ", None),
        ("The answer isn't known", None),
        ("answers: 3", None),
        ("", None),
    ],
)
def test_final_answers_are_found(text, expected):
    assert find_final_answer(text) == expected


@given(st.text(), st.text().filter(lambda text: not set(text) & set("{}\\*") and text.strip()))
def test_an_appended_box_is_found(text, answer):
    assert find_boxed(f"{text}\\boxed{{{answer}}}") == find_final_answer(f"{text}\\boxed{{{answer}}}") == answer.strip()


SAME = [
    [
        "Red ball",
        "  red   BALL. ",
        '"red ball"',
        "“Red ball”",
        "**red ball**",
        r"\text{Red ball}",
        "ｒｅｄ ball",
        "red\nball",
    ],
    ["3", "3.0", "3.", "$3$", r"\(3\)", r"\[3.00\]", "+3", "'3'", r"$\text{3}$", "３"],
    ["0.5", ".50", "0.500", r"$.5$", "+.5"],
    ["0", "-0", "-0.0", "−0", "+0", ".0"],
    ["-2.5", "−2.50", "- 2.5".replace(" ", "")],
    ["1234567", "1,234,567", "1,234,567.0", r"\$1,234,567"],
    ["50%", r"50\%", "50.0%"],
    ["3 cm", "3.0 cm.", r"3 \text{cm}"],
    ["(3, 4.5)", "(3.0, 4.50)"],
    ["½", "1/2"],
    ["straße", "STRASSE"],
]


@pytest.mark.parametrize("spellings", SAME, ids=[spellings[0] for spellings in SAME])
def test_spellings_of_an_answer_are_the_same(spellings):
    assert {normalise(spelling) for spelling in spellings} == {normalise(spellings[0])}


def test_other_answers_differ():
    others = ["1e5", "1e999999999", "1.0e5", "007", "7", "1.2.0", "1.2", "12", "1,2", "1,23", "(a) and (b)", "(a) + b"]
    others += [
        "a and b",
        "a.m",
        "a red one",
        "b",
        "k",
        "k: red",
        "0.5",
        "05",
        "x-0.5",
        "-0.5",
        "2 +3",
        "2 3",
        "3",
        "-3",
    ]
    assert len({normalise(other) for other in others}) == len(others)
    assert normalise("k: red") == "k: red" and normalise("1E999999999") == "1e999999999"
    assert normalise("9" * 10_000 + ".0") == "9" * 10_000


answers = st.text() | st.text("aA0123456789.,+-−()[]\\{}$*'\" text:optin½ǰß", max_size=30)


@given(answers)
def test_normalising_again_changes_nothing(answer):
    assert normalise(normalise(answer)) == normalise(answer)


def test_every_character_that_has_another_form_is_normalised_at_once():
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.normalize("NFKC", character.casefold()) != character:
            once = normalise(character)
            assert normalise(once) == once


@given(answers.filter(lambda answer: len(answer.strip().splitlines()) == 1))
@settings(deadline=None)
def test_who_writes_the_final_answer_is_right(answer):
    record = Record("?", (), (), answer=answer)
    try:
        zebra_cot.check(record)
    except BadRecord:
        return
    assert zebra_cot.is_right(record, zebra_cot.find_answer(f"Thinking.\n\nFinal Answer: {answer}"))
    assert zebra_cot.canonical(zebra_cot.find_answer(f"\n\nFinal Answer: {answer}"))
