"""Reading and scoring answers: tables of spellings with the verdicts of people."""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.tasks import TASKS, comt, mathematics, vsp_planning, zebra_cot
from ilvr_jax.tasks.options import find_options, read_letter
from ilvr_jax.tasks.spelling import canonical, first_sentence

TABLES = Path(__file__).parents[1] / "data" / "answers"


def cases(name: str) -> list:
    lines = (TABLES / name).read_text(encoding="utf-8").splitlines()
    rows = [line.replace("\\n", "\n").split("\t") for line in lines if line and not line.startswith("#")]
    return [pytest.param(*row[:4], row[4] if len(row) > 4 else "Which?", id=f"{row[0]} {row[2]}") for row in rows]


@pytest.mark.parametrize(
    ("task", "right", "text", "verdict", "question"), cases("published.tsv") + cases("siblings.tsv")
)
def test_answers_are_judged_as_people_do(task, right, text, verdict, question):
    if task == "vsp_planning":
        assert (vsp_planning.find_answer(text) == right) == (verdict == "right")
        return
    record = Record(question, (), (), answer=right, name="line 1")
    TASKS[task].check(record)
    for answer in (TASKS[task].find_answer(text, record), TASKS[task].find_answer(text)):
        assert (answer is not None and TASKS[task].is_right(record, answer)) == (verdict == "right")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. cat\nB. dog", {"A": "cat", "B": "dog"}),
        ("Which? (A) cat (B) dog (C) 3 fish", {"A": "cat", "B": "dog", "C": "3 fish"}),
        ("Which? A) cat, B) dog", {"A": "cat", "B": "dog"}),
        ("Which?\nOption A: cat\nOption B: dog", {"A": "cat", "B": "dog"}),
        ("Which?\n**A.** cat\n**B.** dog\nAnswer with a letter.", {"A": "cat", "B": "dog"}),
        ("Which?\n- A. <image>\n- B. <image>", {"A": "", "B": ""}),
        ("Which?\n(a) cat\n(b) dog", {"A": "cat", "B": "dog"}),
        ("A. Smith sees E. coli. Which?\nA. cat\nB. dog", {"A": "cat", "B": "dog"}),
        ("Is E. coli on the C: drive?", {}),
        ("A. Only one", {}),
        ("", {}),
    ],
)
def test_options_of_questions_are_found(question, options):
    assert find_options(question) == options


@pytest.mark.parametrize(
    "text", ["a", "A", "(a)", "a.", "A)", "(A).", "option a", "Option (A)", "A: red", "A. red", "(A) red", "a:"]
)
def test_letters_are_read_in_every_spelling(text):
    assert read_letter(text) == "A"


@pytest.mark.parametrize(
    "text", ["(a) and (b)", "(a) + b", "a and b", "A.M.", "a red one", "k", "K: red", "1", "A1", ""]
)
def test_what_names_no_single_option_is_no_letter(text):
    assert read_letter(text) is None


@pytest.mark.parametrize("answer", [r"\frac{1}{2}", r"\dfrac12", "1/2", "0.5", ".50", r"\frac{2}{4}", "50%"])
def test_a_value_has_one_spelling_for_votes(answer):
    assert canonical(answer) == "1/2"
    assert zebra_cot.canonical(r"2\sqrt3") == zebra_cot.canonical("2√3")


def test_points_are_votes_as_they_are_written():
    assert zebra_cot.canonical(r"\left(1,2\right)") == zebra_cot.canonical("( 1, 2 )") == "(1, 2)"


PIECES = [
    "answer is ",
    "Answer:",
    "not ",
    "but ",
    "**",
    r"\boxed{",
    "}",
    r"\text{",
    "(A)",
    "B",
    " ",
    "\n",
    "2,345",
    "3.5",
]
PIECES += [
    r"\frac",
    "^",
    "_",
    "°",
    "cm",
    "<answer>",
    "</answer>",
    "</think>",
    " because ",
    "yes",
    "no",
    ",",
    ".",
    "答案",
]
PIECES += [
    "：",
    "->",
    "→",
    "Right",
    "1.",
    "-",
    "p.m.",
    "\\\\",
    "½",
    "²",
    "'",
    "ǰ",
    "\0",
    "\ud800",
    "and ",
    "or ",
    "cat",
    "=",
    "!",
]


@pytest.mark.parametrize("question", ["Which?\nA. cat\nB. 1/2", "Which?"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=20))
@settings(deadline=None, max_examples=60)
def test_no_answer_is_too_strange_to_be_judged(task, question, pieces):
    record = Record(question, (), (), answer="B", map_desc=((1, 2),))
    for answer in (task.find_answer("".join(pieces), record), task.find_answer("".join(pieces))):
        if answer is not None:
            assert isinstance(task.canonical(answer), str) and task.is_right(record, answer) in (True, False)


def test_first_sentences_end_where_people_end_them():
    assert first_sentence("7 p.m. on Friday. It is late.") == "7 p.m. on Friday"
    assert first_sentence("Dr. J. Smith of St. Louis. He is old.") == "Dr. J. Smith of St. Louis"


def test_a_record_whose_question_lists_options_may_have_several_lines():
    question = "Which?\nA. cat\nB. dog"
    comt.check(Record(question, (), (), answer="B. dog\nbecause it barks", name="line 1"))
    with pytest.raises(BadRecord):
        comt.check(Record("Which?", (), (), answer="dog\nbecause it barks", name="line 1"))


def test_mathematics_that_takes_for_ever_is_different_and_the_next_is_compared():
    started = time.monotonic()
    assert not mathematics.equal("9^{9^{9^{9}}}", "2")
    assert time.monotonic() - started < 10 * mathematics.SECONDS
    assert mathematics.equal("1/7", r"\frac{1}{7}")


def test_threads_compare_mathematics():
    """math-verify's own time limits are signals, which raise outside the main thread."""
    equal = []
    threads = [
        threading.Thread(
            target=lambda n=n: equal.append(mathematics.equal(f"{n}/{n + 1}", rf"\frac{{{n}}}{{{n + 1}}}"))
        )
        for n in range(2, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 6


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(
    "piece", ["answer is ", "Answer: A. ", "(A) ", r"\boxed{\text{", "the answer to ", "a (R) ", "1) "]
)
def test_a_megabyte_is_read_in_a_second(task, piece):
    text = piece * (1_000_000 // len(piece))
    record = Record("Which?\nA. cat\nB. dog", (), (), answer="B", map_desc=((1, 2),))
    started = time.process_time()
    answer = task.find_answer(text, record)
    if answer is not None:
        task.canonical(answer), task.is_right(record, answer)
    assert time.process_time() - started < 1
