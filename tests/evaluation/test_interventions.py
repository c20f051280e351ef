"""python -m ilvr_jax.evaluate --slots: every intervention in files of its own, paired, and figures from these files."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax.analysis.slot_use import run_slot_evaluation
from ilvr_jax.checkpoints.trained import TrainedModel, load_model
from ilvr_jax.config.schema import FrozenLakeConfig, SamplingParams
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.maps import shortest_path
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.records import Record
from ilvr_jax.data.sources import example_settings
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.evaluate import main
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.interventions import (
    INTERVENTIONS,
    MAKERS,
    OF_EDITS,
    WITH_STATES,
    WITHOUT_SLOTS,
    Material,
    Slots,
    Spread,
    chosen_slots,
    draw_noise,
    give,
    measure_spread,
    pair_others,
    shuffle,
)
from ilvr_jax.evaluation.oracle import oracle_slots
from ilvr_jax.evaluation.paired import compare
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.evaluation.results import Results
from ilvr_jax.evaluation.slot_evaluation import NAMES, Chosen
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Look, RequestOutput
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.method.objectives import alignment_loss
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry
from ilvr_jax.tasks import vsp_planning
from tests.published import save_published
from tests.samples import untrained_run

FREE = ((1, 0, 2), (0, 0, 0), (0, 0, -1))
BLOCKED = ((1, -1, 2), (0, 0, 0), (0, 0, 0))
BENDING = ((1, -1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0), (0, 0, 0, 0))
MAPS = (FREE, BLOCKED, BENDING, FREE)
FILES = [
    *("own", "own-relevant", "own-irrelevant"),
    *(name for name in INTERVENTIONS if name != "own"),
    *(f"{name}-states" for name in WITH_STATES),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("interventions") / "run")


@pytest.fixture(scope="module")
def data(run):
    for number, map_desc in enumerate(MAPS):
        Image.fromarray(draw_map(map_desc)).save(run.parent / f"{number}.png")
    lines = [{"text_input": "?", "image_input": f"{n}.png", "map_desc": map_desc} for n, map_desc in enumerate(MAPS)]
    file = run.parent / "maps.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def evaluate(run, data, out, *flags, task="vsp_planning") -> int:
    return main([str(run), f"--task={task}", f"--data={data}", f"--out={out}", "--max-new-tokens=22", *flags])


@pytest.fixture(scope="module")
def finished(run, data):
    """The results file beside which those of all interventions are."""
    assert evaluate(run, data, run.parent / "out.jsonl", "--slots=all") == 0
    return run.parent / "out.jsonl"


def files_of(out, name="*"):
    return sorted(out.parent.glob(f"{out.stem}-slots-{name}.jsonl"))


def answers(out, name) -> dict:
    """Return the answers of a condition by number and form, without times."""
    (file,) = files_of(out, name)
    _, *lines = map(json.loads, file.read_text().splitlines())
    return {(line["number"], line["form"]): {**line, "seconds": 0} for line in lines}


def summary_of(out, suffix="") -> dict:
    return json.loads(out.with_name(f"{out.stem}-slots{suffix}.summary.json").read_text())


COMPARED = ("text", "tokens", "looks", "slots", "answer", "right", "stop_reason")


def test_own_slots_given_back_change_nothing(finished):
    own = answers(finished, "own")
    assert sorted(own) == [(number, "") for number in range(len(MAPS))]
    assert all(line["recorded_slots"] >= 4 for line in own.values())
    for name in ("self", "self-states"):
        others = answers(finished, name)
        assert all(line["intervened"] for line in others.values())
        for key, line in own.items():
            assert {field: others[key][field] for field in COMPARED} == {field: line[field] for field in COMPARED}


def about_edits(name: str) -> bool:
    return name.startswith(OF_EDITS)


def test_every_intervention_has_answers_of_its_own(finished):
    own, relevant = answers(finished, "own"), answers(finished, "own-relevant")
    assert {file.stem for file in files_of(finished)} == {f"out-slots-{name}" for name in FILES}
    assert {form for _, form in relevant} == {"relevant"} and len(relevant) > 2
    for name in FILES:
        lines = answers(finished, name)
        assert lines.keys() == (relevant if about_edits(name) or name == "own-relevant" else own).keys() or (
            name == "own-irrelevant" and {form for _, form in lines} == {"irrelevant"}
        )
    for name in ("zero", "noise"):
        texts = {key: line["text"] for key, line in answers(finished, name).items()}
        assert any(own[key]["text"] != text for key, text in texts.items()), name
    for line in answers(finished, "skip").values():
        assert line["looks"] == line["slots"] == 0
    assert all(line["looks"] and not line["slots"] for line in answers(finished, "markers").values())
    settings = json.loads(files_of(finished, "swap-states")[0].read_text().splitlines()[0])["settings"]
    assert (settings["slots"], settings["replaced"], settings["limit"]) == ("swap", "states", 0)


def test_figures_are_those_of_the_files(run, data, finished, tmp_path):
    """An untrained model is never right: some answers of the files are made so, and the figures are read again."""
    random, out = np.random.default_rng(0), tmp_path / "out.jsonl"
    for file in files_of(finished):
        header, *lines = map(json.loads, file.read_text().splitlines())
        for line in lines:
            line["right"] = bool(random.random() < 0.5)
            line |= {"follows_donor": bool(random.random() < 0.5)} if line.get("follows_donor") is not None else {}
        (tmp_path / file.name).write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    assert evaluate(run, data, out, "--slots=all") == 0
    summary, own, relevant = summary_of(out), answers(out, "own"), answers(out, "own-relevant")
    assert (summary["questions"], summary["without_looks"], summary["skipped"]) == (len(MAPS), 0, 0)
    assert [row["name"] for row in summary["rows"]].count("own") == 1 and len(summary["rows"]) == len(FILES) - 2
    for row in summary["rows"]:
        lines = answers(out, row["name"] + "-states" * (row["replaced"] == "states"))
        right = [line["right"] for line in lines.values()]
        assert row["accuracy"] == np.mean(right) and row["samples"] == len(lines)
        if row["name"] == "own":
            assert row["difference"] is row["interval"] is row["p"] is None
            continue
        paired = compare([(relevant if about_edits(row["name"]) else own)[key]["right"] for key in lines], right, 0)
        assert (row["difference"], row["p"], row["own_accuracy"]) == (paired.difference, paired.p, paired.own)
        assert tuple(row["interval"]) == paired.interval
        # The path on FREE, which is there twice, is too short for a look.
        assert row["intervened"] == len(lines) - 2 * (row["name"] == "oracle")
        if not about_edits(row["name"]):
            in_the_way = [line["right"] for line in lines.values() if vsp_planning.holes_matter(MAPS[line["number"]])]
            assert row["groups"]["holes in the way"] == np.mean(in_the_way)
    for replaced, suffix in (("inputs", ""), ("states", "-states")):
        follows, unrelated, swapped = (
            np.mean([line["follows_donor"] for line in answers(out, name + suffix).values()])
            for name in ("donor", "unrelated", "swap")
        )
        donor = summary["donor"][replaced]
        assert (donor["follows"], donor["follows_unrelated"]) == (follows, unrelated)
        assert donor["difference"] == follows - unrelated and donor["follows_swap"] == swapped
        assert donor["accuracy_with_own_slots"] == np.mean([line["right"] for line in relevant.values()])
    content = summary["content"]
    assert len(content["cosine_between_samples"][0]) == len(content["movement"]["relevant"][0]) == 4
    assert 0 < content["movement"]["relevant"][0][0] < 2 and content["effective_rank"][0][0] > 0
    page = (tmp_path / "out-slots.html").read_text()
    assert page.count("<dt>") == len(INTERVENTIONS) and "4 questions of " in page
    assert all((tmp_path / f"out-slots.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))


def test_a_complete_evaluation_asks_nothing(run, data, finished, capsys, monkeypatch):
    before = {file: file.read_bytes() for file in files_of(finished)}
    summary = summary_of(finished)
    monkeypatch.setattr(Engine, "serve", None)
    assert evaluate(run, data, finished, "--slots=all") == 0
    out = capsys.readouterr().out
    assert "swap (states)" in out and "without looks" in out and "out-slots.html" in out
    assert {file: file.read_bytes() for file in files_of(finished)} == before and summary_of(finished) == summary
    assert evaluate(run, data, finished, "--slots=zero,swap") == 0  # fewer rows of the same files
    assert [row["name"] for row in summary_of(finished)["rows"]] == ["own", "zero", "swap", "swap"]
    assert evaluate(run, data, finished, "--slots=all") == 0 and summary_of(finished)["rows"] == summary["rows"]


def test_a_stopped_evaluation_is_completed(run, data, finished, tmp_path, capsys, monkeypatch):
    for file in files_of(finished):
        shutil.copy(file, tmp_path)
    for name in ("self", "donor-states", "own-irrelevant"):
        files_of(tmp_path / "out.jsonl", name)[0].unlink()
    (cut,) = files_of(tmp_path / "out.jsonl", "noise")
    cut.write_bytes(cut.read_bytes()[:-30])
    add, count = Results.add, iter(range(100))

    def stop_after_some(results, line):
        if next(count) == 7:
            raise KeyboardInterrupt
        add(results, line)

    with monkeypatch.context() as patched:
        patched.setattr(Results, "add", stop_after_some)
        assert evaluate(run, data, tmp_path / "out.jsonl", "--slots=all") == 130
    assert "answers, and the same command resumes it" in capsys.readouterr().err
    assert evaluate(run, data, tmp_path / "out.jsonl", "--slots=all") == 0
    for name in FILES:
        assert answers(tmp_path / "out.jsonl", name) == answers(finished, name)
    own = files_of(tmp_path / "out.jsonl", "own")[0]
    lines = own.read_text().replace('"text": "', '"text": "other ')
    own.write_text(lines)
    files_of(tmp_path / "out.jsonl", "zero")[0].unlink()
    assert evaluate(run, data, tmp_path / "out.jsonl", "--slots=zero") == 2
    assert "out-slots-own.jsonl must hold the answers that are given now, but that to" in capsys.readouterr().err


def test_one_look_or_place_is_replaced(run, data, tmp_path, capsys):
    flags = ("--slots-look=2", "--slots-place=3")
    assert evaluate(run, data, tmp_path / "out.jsonl", "--slots=all", *flags, "--limit=2") == 0
    assert "not tried: skip needs all looks and places; markers needs" in capsys.readouterr().err
    summary = summary_of(tmp_path / "out.jsonl", "-look2-place3")
    assert (summary["look"], summary["place"]) == (2, 3)
    assert (tmp_path / "out-slots-own.jsonl").exists() and (tmp_path / "out-slots-look2-place3-zero.jsonl").exists()
    assert "only look 2 is replaced; only place 3 is replaced" in (tmp_path / "out-slots-look2-place3.html").read_text()


@pytest.fixture(scope="module")
def tokenizer():
    records = [FrozenLakeSource(FrozenLakeConfig(), seed=0, count=30)[number] for number in range(30)]
    return train_tokenizer([*record_texts(records), "Which way?"])


K = 2


class SlotPlayer:
    """A fake engine whose slots hold the number of a map, and which answers with the path of the map in its slots.

    Questions about `stubborn` maps are answered from the image alone; those in `without_looks` have no slots.
    """

    def __init__(self, tokenizer, maps, stubborn=(), without_looks=()):
        self.tokenizer, self.special, self.maps = tokenizer, special_tokens(tokenizer), maps
        self.stubborn, self.without_looks, self.asked = stubborn, without_looks, []

    def serve(self, requests):
        for number, request in enumerate(requests):
            self.asked.append(request)
            own = self.number_of(request)
            looks = 0 if self.maps[own] in self.without_looks or request.method == "text" else 1
            given = request.given_slots
            seen = int(given.inputs[0, 0]) if given and self.maps[own] not in self.stubborn else own
            words = rf"\boxed{{{shortest_path(self.maps[seen % len(self.maps)])}}}"
            tokens = (*self.tokenizer.encode(words, add_special_tokens=False), self.special.im_end)
            slots = looks * K
            yield RequestOutput(
                number,
                0,
                request.name,
                tokens,
                words,
                (Look(0, slots),) * looks,
                "end",
                plain_text=words,
                latent_vectors=np.full((slots, 3), own, np.float32),
                slot_keys=np.zeros((1, slots, 1, 2), np.float32),
                slot_values=np.zeros((1, slots, 1, 2), np.float32),
                slot_positions=np.arange(slots),
            )

    def number_of(self, request):
        """Return the number of the map that a prompt shows, by its pixels."""
        (image,) = request.prompt.images
        cells = image.pixels.reshape(image.height // 2, image.width // 2, 2, 2, 3, 14, 14)
        pixels = cells.transpose(0, 2, 5, 1, 3, 6, 4).reshape(14 * image.height, 14 * image.width, 3)
        return next(n for n, m in enumerate(self.maps) if draw_map(m, 28).tobytes() == pixels.tobytes())


def play_slots(tokenizer, tmp_path, monkeypatch, maps, names, **changes):
    """Return the summary and the player after maps were evaluated with other slots."""
    records = [Record("?", (draw_map(m, 28),), (), map_desc=m, name=f"map {n}") for n, m in enumerate(maps)]
    edited = [edit.map_desc for record in records for edit in vsp_planning.edits(record, 0).values()]
    player = SlotPlayer(tokenizer, list(dict.fromkeys([*maps, *edited])), **changes)
    monkeypatch.setattr("ilvr_jax.evaluation.slot_evaluation.Engine", lambda *arguments: player)

    def embed(decoder, tokens):
        return np.zeros((1, 1, 3), np.float32)

    model = types.SimpleNamespace(geometry=WindowGeometry(2), config="a model", embed=embed)
    prompts = ExampleSettings(latent_size=K)
    trained = TrainedModel(model, {"decoder": {}}, tokenizer, player.special, prompts, looks=True)
    decoding = {"method": "latent", "latent_size": K, "sampling": SamplingParams(64)}
    evaluator = Evaluator(trained, "vsp_planning", EvaluationRecords(records, "maps"), decoding, controls=False)
    return run_slot_evaluation(evaluator, names, tmp_path / "out.jsonl", Chosen()), player


LEFT, RIGHT, DOWN = (  # each one is answered by moves that fail on the others, and on their relevant edits
    ((2, 0, 1), (0, 0, 0), (-1, 0, 0)),
    ((1, 0, 2), (0, 0, 0), (-1, 0, 0)),
    ((0, 0, 1), (0, 0, -1), (0, 0, 2)),
)


def test_answers_that_follow_donors_are_counted(tokenizer, tmp_path, monkeypatch):
    """All follow the slots that they get, except RIGHT's edit and DOWN, which are answered by what they show."""
    edited = vsp_planning.edits(Record("?", (draw_map(RIGHT, 28),), (), map_desc=RIGHT), 0)["relevant"].map_desc
    maps, names = [LEFT, RIGHT, DOWN], ["swap", "donor", "unrelated"]
    summary, _ = play_slots(tokenizer, tmp_path, monkeypatch, maps, names, stubborn=[edited, DOWN])
    for replaced in ("inputs", "states"):
        figures = summary["donor"][replaced]
        assert figures["samples"] == figures["unrelated_samples"] == figures["swap_samples"] == 3
        assert figures["follows"] == pytest.approx(2 / 3) and figures["follows_with_own_slots"] == 0
        assert figures["follows_unrelated"] == 0 and figures["difference"] == pytest.approx(2 / 3)
        assert figures["follows_swap"] == pytest.approx(2 / 3)
        assert figures["accuracy_with_own_slots"] == 1 and figures["accuracy"] == pytest.approx(1 / 3)
    own, swap, _, donor, _, _, _ = summary["rows"]
    assert (own["accuracy"], swap["accuracy"], donor["accuracy"]) == (1, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (donor["own_accuracy"], donor["difference"]) == (1, pytest.approx(-2 / 3))


def test_records_without_looks_keep_their_answers(tokenizer, tmp_path, monkeypatch):
    maps = [LEFT, RIGHT, DOWN, RIGHT]
    summary, player = play_slots(tokenizer, tmp_path, monkeypatch, maps, ["swap", "zero"], without_looks=[DOWN])
    assert summary["without_looks"] == 1 and summary["questions"] == 4
    assert {row["name"]: row.get("intervened") for row in summary["rows"]} == {"own": None, "swap": 2, "zero": 3}
    kept = answers(tmp_path / "out.jsonl", "swap")
    assert sum(not line["intervened"] for line in kept.values()) == 2 and kept[2, ""]["right"]
    assert len(player.asked) == 4 + 2 + 2 + 3


def test_oracles_are_the_inputs_of_stage_1(run, data):
    trained = load_model(str(run))
    dense = dataclasses.replace(trained.config.latents, selection="dense")
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, latents=dense))
    model, params = trained.model, trained.params
    source = FrozenLakeSource(trained.config.data.frozen_lake, seed=1, count=12)
    records = [source[number] for number in range(12)]
    settings = example_settings(trained.config, model.geometry, "latent")
    asked = dict(question="Find the shortest safe path.", steps=())
    files = [dataclasses.replace(record, **asked, images=(draw_map(record.map_desc),)) for record in records]
    made = [vsp_planning.with_steps(record, trained.config.data) for record in files]
    prompts = dataclasses.replace(trained.prompts, question=None)
    found = oracle_slots(trained, list(enumerate(made)), 4, prompts, seed=0)
    samples = [
        build_example(record, trained.tokenizer, trained.special, settings, number)
        for number, record in enumerate(records)
    ]
    batch = collate(
        samples,
        merge_layouts([required_layout(sample, model.geometry) for sample in samples]),
        trained.special,
        model.geometry,
    )
    losses = alignment_loss(model, params, {}, batch, dense, jax.random.key(0))
    pause = model.embed(decoder_params(params), np.full((1, 1), trained.special.latent_pad))
    inputs = fill_slots(model, decoder_params(params), losses.selection.targets, pause, None)
    assert np.asarray(losses.selection.valid).any() and len(found) > 6
    for number, sample in enumerate(samples):
        looks = len(sample.slot_starts)
        assert (number in found) == (looks > 0)
        if looks:
            assert np.asarray(losses.selection.valid)[number, :looks].all()
            expected = np.asarray(inputs)[number, :looks].reshape(4 * looks, -1)
            np.testing.assert_allclose(found[number].inputs, expected, rtol=1e-3, atol=1e-3)


def material(count=6, channels=5):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, 3, count, 2, 4))
    own = Slots(rng.normal(size=(count, channels)), keys[0], keys[1], np.arange(count) + 7)
    other = Slots(own.inputs + 1, keys[0] + 1, keys[1] + 1, own.positions + 1)
    return Material(own, Spread(np.ones(channels), np.eye(channels)), np.full(channels, 2.0), other, None, (3, 4))


def test_slots_of_each_intervention():
    made = material()
    own, slots = made.own, {name: function(made) for name, function in MAKERS.items()}
    assert MAKERS.keys() | {*WITHOUT_SLOTS} == {*NAMES} and slots["oracle"] is None
    assert slots["self"] is slots["donor"] is own and slots["swap"] is slots["unrelated"] is made.swap
    for name, value in (("zero", 0), ("mean", 1), ("pause", 2)):
        np.testing.assert_array_equal(slots[name].inputs, np.full((6, 5), value))
    assert slots["noise"].inputs.shape == (6, 5)
    for number in range(6):
        np.testing.assert_array_equal(slots["first"].inputs[number], own.inputs[0])
        np.testing.assert_array_equal(slots["first"].keys[:, number], own.keys[:, 0])
    assert slots["first"].positions.tolist() == [7] * 6
    order = slots["permute"].positions - 7
    assert sorted(order) == list(range(6)) and (order != np.arange(6)).all()
    np.testing.assert_array_equal(slots["permute"].values, own.values[:, order])
    np.testing.assert_array_equal(slots["permute"].inputs, shuffle(own, (3, 4)).inputs)
    assert {name for name, made in slots.items() if made and made.keys is not None} == {*WITH_STATES}
    assert len(shuffle(own.take(np.array([0])), (0,)).inputs) == 1


def test_noise_has_the_mean_and_covariance_of_the_slots():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 4)) @ rng.normal(size=(4, 4)) + 3
    spread = measure_spread([vectors[:100], vectors[100:]])
    noise = draw_noise(spread, 200_000, (1, 2))
    np.testing.assert_allclose(spread.mean, vectors.mean(0))
    np.testing.assert_allclose(spread.directions.T @ spread.directions, np.cov(vectors.T, bias=True), atol=1e-9)
    np.testing.assert_allclose(noise.mean(0), spread.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(noise.T), np.cov(vectors.T, bias=True), atol=0.15)
    np.testing.assert_array_equal(noise[:3], draw_noise(spread, 200_000, (1, 2))[:3])


def test_one_look_or_place_is_given():
    own = material().own
    assert chosen_slots(6, 2, None, None).all()
    assert chosen_slots(6, 2, 2, None).tolist() == [False, False, True, True, False, False]
    assert chosen_slots(6, 2, None, 1).tolist() == [True, False] * 3
    whole = give(own, True, 2)
    assert whole.inputs.dtype == np.float32 and whole.given.all() and whole.keys.shape == own.keys.shape
    assert give(own, False, 2).keys is None and give(None, False, 2) is None
    last = give(own, True, 2, look=3, place=2)  # further looks have their own slots: those of a look that is not given
    assert last.given.tolist() == [False] * 5 + [True] + [False] * 2 and last.keys.shape[1] == 8
    assert give(own.take(np.arange(5)), False, 2, look=3).given.tolist() == [False] * 4 + [True] + [False] * 3
    assert give(own, False, 2, look=4) is None


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(0, 5))
def test_others_are_of_another_kind(kinds, seed):
    others = pair_others(kinds, seed)
    assert len(others) == len(kinds)
    taken = [other for other in others if other is not None]
    assert len(set(taken)) == len(taken)
    assert all(kinds[other] != kind for other, kind in zip(others, kinds, strict=True) if other is not None)
    if kinds and 2 * max(map(kinds.count, kinds)) <= len(kinds):
        assert None not in others


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--slots=swap,slots"], "argument --slots: must be all, or names of self, zero, mean, "),
        (["--slots=own"], "with commas between them, got 'own'"),
        (
            ["--slots=all", "--method=text"],
            "--method must be latent or single for --slots, whose looks have slots, got",
        ),
        (["--slots=all", "--method=pixels"], "--method must be latent or single for --slots"),
        (["--slots=all", "--mesh=fsdp=1"], "--slots must be used on one device in one process, without --mesh"),
        (["--slots=all", "--samples-per-question=2"], "--samples-per-question must be 1 for --slots, got 2"),
        (["--slots=all", "--early-end"], "--early-end must not be given with --slots"),
        (["--slots-look=1"], "--slots must be given with --slots-look and --slots-place, got none"),
        (["--slots=all", "--slots-place=5"], "--slots-place must be at most the slots of a look (4), got 5"),
        (["--slots=all", "--slots-look=0"], "--slots-look must be a whole number from 1 to 2147483647, got 0"),
        (
            ["--slots=markers", "--slots-look=1"],
            "(self, zero, mean, noise, pause, first, permute, swap, donor, unrelated, oracle);",
        ),
        (["--slots=swap,donor", "--task=vsp_reasoning"], "swap, skip, markers); donor needs a task with `edits`"),
        (["--slots=oracle", "--task=vsp_reasoning"], "oracle needs held-out records with helper images, or a task"),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(run, data, tmp_path, capsys, flags, sentence):
    try:
        status = evaluate(run, data, tmp_path / "out.jsonl", *flags)
    except SystemExit as ended:
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2 and sentence in err and err.count("\n") == 1 and len(err) < 400


def test_a_checkpoint_without_latent_tokens_is_refused(data, tmp_path, capsys):
    save_published(tmp_path, dtype="float32", texts=["Which way?"])
    capsys.readouterr()
    assert evaluate(tmp_path, data, tmp_path / "out.jsonl", "--slots=all") == 2
    err = capsys.readouterr().err
    assert err == f"--slots must be used with a checkpoint that has latent tokens, got {tmp_path}\n"


def test_pictures_of_distances_are_those_of_training(tmp_path, data):
    run = untrained_run(tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    fields["data"]["frozen_lake"]["looks"] = "distances"
    (run / "config.json").write_text(json.dumps(fields))
    assert evaluate(run, data, tmp_path / "out.jsonl", "--method=pixels", "--limit=1", "--max-new-tokens=4") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[1:]]
    assert sum(line["looks"] for line in lines) and all(line["stop_reason"] != "picture" for line in lines)
    assert all(line["picture_tokens"] in (36 * line["looks"], 36 * (line["looks"] - 1)) for line in lines)
