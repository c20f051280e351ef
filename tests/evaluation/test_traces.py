"""python -m ilvr_jax.evaluate --page: maps by plain definitions, answers of the ordinary evaluation, and bad flags."""

import base64
import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from ilvr_jax.analysis.slot_probes import run_probes
from ilvr_jax.analysis.traces import DIFFERS, TURNED, run_traces
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.config.schema import FrozenLakeConfig, SamplingParams
from ilvr_jax.data.export import write_records
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.evaluate import main
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.evaluation.slot_maps import measure_maps, measure_slots, own_sample
from ilvr_jax.evaluation.slot_vectors import complete_looks, own_answers, questions_of
from ilvr_jax.inference.decode import decode_steps
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.progress import Progress
from tests.samples import SKETCH_SIDE, sketch_run

K = SKETCH_SIDE**2
ATOL = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = {"model__slot_input": "placed", "latents__slot_positions": "turning_grid", "model__num_hidden_layers": 1}
    return sketch_run(tmp_path_factory.mktemp("traces") / "run", **changes)


@pytest.fixture(scope="module")
def data(run):
    maps = FrozenLakeSource(FrozenLakeConfig(levels=(3, SKETCH_SIDE), cell_pixels=64), seed=5, count=14)
    write_records([maps[number] for number in range(14)], run.parent / "maps")
    return run.parent / "maps" / "train.jsonl"


def evaluator_of(run, count=14, **changes):
    trained = load_model(str(run))
    source = FrozenLakeSource(trained.config.data.frozen_lake, seed=7, count=count)
    trained = dataclasses.replace(trained, prompts=dataclasses.replace(trained.prompts, image_scale=1.0))
    latents = trained.config.latents
    decoding = {"method": "latent", "latent_size": K, "sampling": SamplingParams(3 * K)}
    decoding |= {name: getattr(latents, name) for name in ("image_visibility", "slot_positions")}
    records = EvaluationRecords([source[number] for number in range(count)], "maps")
    return Evaluator(trained, "vsp_planning", records, decoding | changes, rows=5)


def evaluate(run, data, out, *flags) -> int:
    flags = ("--max-new-tokens=24", "--limit=3", *flags)
    return main([str(run), "--task=vsp_planning", f"--data={data}", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def measured(run):
    """The questions of maps of both sizes, their answers with looks, and the maps of these."""
    questions = questions_of(evaluator_of(run, 7))
    outputs = own_answers(questions, Progress(None))
    before = measure_slots._cache_size()
    maps = measure_maps(questions, outputs, rows=4)
    assert measure_slots._cache_size() - before == 1
    assert {len(question.record.map_desc) for question in questions} == {3, SKETCH_SIDE}
    assert maps and all(len(complete_looks(outputs[number], K)) == len(maps[number].cosines) for number in maps)
    return questions, outputs, maps


def test_maps_in_a_batch_of_unequal_answers_are_those_of_each_alone(measured):
    questions, outputs, maps = measured
    sides = [len(questions[number].record.map_desc) for number in maps]
    for number in (list(maps)[sides.index(3)], list(maps)[sides.index(SKETCH_SIDE)]):
        alone = measure_maps(questions, {number: outputs[number]}, rows=1)[number]
        for name in ("cosines", "attention"):
            np.testing.assert_allclose(getattr(maps[number], name), getattr(alone, name), atol=ATOL, err_msg=name)
        for ours, theirs in zip(maps[number].helper_cosines, alone.helper_cosines, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=ATOL)


def test_cosines_are_those_of_numpy(measured):
    questions, outputs, maps = measured
    number, trained = next(iter(maps)), questions[0].evaluator.trained
    sample, geometry = own_sample(questions[number], outputs[number], number), trained.model.geometry
    waves = 2.0 * 8.0 ** (np.arange(8) / 7)  # of the rule `placed`, with 32 channels
    vectors = complete_looks(outputs[number], K)

    def features(image):
        stacked = geometry.stack([[image]], 1, geometry.room(image), image)
        return np.asarray(trained.model.encode_images(trained.params["vision"], stacked))[0, 0, : image.vision_tokens]

    def cosines(slots, others):
        slots, others = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (slots, others))
        return slots @ others.T

    for look, found in enumerate(maps[number].cosines):
        cells = np.indices((SKETCH_SIDE, SKETCH_SIDE)).reshape(2, -1).T[:: -1 if look % 2 else 1]
        angles = 2 * np.pi * cells[..., None] / waves
        codes = np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(K, 32)
        np.testing.assert_allclose(found, cosines(vectors[look] - codes, features(sample.images[0])), atol=ATOL)
        helper = features(sample.helper_images[look])
        np.testing.assert_allclose(maps[number].helper_cosines[look], cosines(vectors[look] - codes, helper), atol=ATOL)


def test_attention_is_that_of_a_plain_pass_over_the_whole_answer(measured):
    """Also what follows the last complete look changes nothing, and the image is hidden from text alone."""
    questions, outputs, maps = measured
    number, trained = next(iter(maps)), questions[0].evaluator.trained
    model, decoder = trained.model, decoder_params(trained.params)
    sample = own_sample(questions[number], outputs[number], number)
    image = sample.images[0]
    stacked = model.geometry.stack([[image]], 1, model.geometry.room(image), image)
    features = model.encode_images(trained.params["vision"], stacked)[0, 0, : image.vision_tokens]
    places = sample.tokens == trained.special.image_pad
    slots = np.flatnonzero(sample.tokens == trained.special.latent_pad)
    inputs = np.array(model.embed(decoder, sample.tokens[None]))
    inputs[0, places], inputs[0, slots] = features, complete_looks(outputs[number], K).reshape(len(slots), -1)
    mask = np.tril(np.ones((len(sample.tokens),) * 2, bool))
    first = np.flatnonzero(sample.tokens == trained.special.latent_start)[0]
    hidden = np.arange(len(mask)) > first
    hidden[slots] = False
    mask[hidden, places.argmax() : first + 1] = False
    everything = np.arange(len(mask))
    weights = jax.jit(model.attention_weights, static_argnums=5)(
        decoder, inputs, sample.positions[None], mask[None], everything, 2
    )
    weights = np.asarray(weights)[0].mean((0, 1))
    expected = weights[slots][:, places].reshape(maps[number].attention.shape)
    np.testing.assert_allclose(maps[number].attention, expected, atol=ATOL)
    assert hidden.any() and not weights[hidden][:, places].any() and (expected > 0).all()


def embedded(page):
    """Returns the index and the samples in a page."""
    index, *samples = re.findall(r'<script type="application/json" id="[a-z]+(?:-\d+)?">(.*?)</script>', page)
    return json.loads(index), [json.loads(sample) for sample in samples]


def read_map(packed, slots):
    steps = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).astype(float) / 255
    return (packed["low"] + (packed["high"] - packed["low"]) * steps).reshape(slots, -1)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The folder of a page, its evaluator and its figures; probes are fitted on 20 records."""
    folder, evaluator = tmp_path_factory.mktemp("page"), evaluator_of(run)
    before = measure_slots._cache_size()
    figures = run_traces(evaluator, 20, folder / "out.jsonl")
    assert measure_slots._cache_size() - before == 1
    return folder, evaluator, figures


def test_the_page_has_the_answers_of_the_results_file_and_their_maps(page, measured):
    folder, evaluator, figures = page
    names = ["out-trace.html", "out-trace.log", "out.jsonl", "out.log", "out.summary.json"]
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) == names
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()[1:]]
    assert {line["form"] for line in lines} == {"", "without holes"}  # the ordinary evaluation, with its controls
    lines = {line["number"]: line for line in lines if not line["form"]}
    content = (folder / "out-trace.html").read_text()
    index, samples = embedded(content)
    assert TURNED in content and "No states" not in content
    assert (figures.answers, figures.differing, figures.no_states) == (14, 0, "") and figures.read > 0.2
    questions = questions_of(dataclasses.replace(evaluator, controls=False))
    outputs = own_answers(questions, Progress(None))
    maps = measure_maps(questions, outputs, rows=5)
    assert sorted(entry["number"] for entry in index) == sorted(lines) == list(range(14))
    for entry, sample in zip(index, samples, strict=True):
        line = lines[entry["number"]]
        outcome = "unparsed" if line["answer"] is None else "right" if line["right"] else "wrong"
        assert (entry["outcome"], entry["tokens"], sample["answer"]) == (outcome, line["tokens"], line["answer"])
        assert entry["level"] == f"level {len(evaluator.source[entry['number']].map_desc)}"
        marks = "".join(
            f"‹looking: {look['slots']} slots›{text}"
            for look, text in zip(sample["looks"], sample["texts"][1:], strict=True)
        )
        assert sample["texts"][0] + marks == line["text"] and not sample["remark"]
        measured = maps.get(entry["number"])
        for number, look in enumerate(sample["looks"]):
            if measured is None or number >= len(measured.cosines):
                assert look["cosines"] is None
                continue
            assert look["columns"] == SKETCH_SIDE and sample["images"][0]["rows"] == measured.grids[0][0]
            for name in ("cosines", "attention"):
                packed, exact = look[name], getattr(measured, name)[number]
                step = (packed["high"] - packed["low"]) / 255
                np.testing.assert_allclose(read_map(packed, K), exact, atol=0.51 * step + ATOL)
            np.testing.assert_allclose(look["attention_shares"], measured.attention[number].sum(-1)[:, None], rtol=1e-3)


def test_cells_are_those_that_the_command_for_probes_reads(page, tmp_path):
    folder, evaluator, figures = page
    probes = run_probes(dataclasses.replace(evaluator, controls=False), 20, tmp_path / "out.jsonl")
    _, samples = embedded((folder / "out-trace.html").read_text())
    looks = [sample["looks"][0] for sample in samples if sample["looks"] and sample["looks"][0]["states"]]
    true, read = (np.array([look[name] for look in looks]) for name in ("states", "read"))
    right = [(true[:, place] == read[:, place])[read[:, place] != ""] for place in range(K)]
    shares = [share.mean() for share in right if len(share)]
    assert len(shares) == probes["looks"][0]["places"] > 0
    assert np.mean(shares) == pytest.approx(probes["looks"][0]["accuracy"]["slots"])
    assert {cell for cell in true.ravel()} > {"hole", ""} and (read[true == ""] == "").all()


def test_an_answer_that_differs_from_the_file_has_no_maps(page, tmp_path):
    folder, evaluator, _ = page
    content = (folder / "out.jsonl").read_text().splitlines()
    other = [json.loads(line) for line in content]
    for line in other[1:]:
        line["text"] = "‹looking: 7 slots› <b>elsewhere" if line["number"] == 2 else line["text"]
    (tmp_path / "out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in other))
    figures = run_traces(evaluator, 20, tmp_path / "out.jsonl")
    index, samples = embedded((tmp_path / "out-trace.html").read_text())
    sample = samples[[entry["number"] for entry in index].index(2)]
    assert (figures.differing, sample["remark"], sample["texts"]) == (1, DIFFERS, ["", " <b>elsewhere"])
    assert sample["looks"][0]["cosines"] is None and sample["looks"][0]["slots"] == 7 and sample["images"]


def test_the_command_names_why_no_states_are_read(run, data, tmp_path, capsys):
    before = decode_steps._cache_size()
    other = sketch_run(tmp_path / "run", latents__selection="top_k")
    assert evaluate(other, data, tmp_path / "page.jsonl", "--page") == 0
    assert decode_steps._cache_size() - before == 2  # with slots recorded, and without
    printed = capsys.readouterr().out
    assert "no states are read from slots, as by --probes: `latents.selection` must be dense for --probes" in printed
    assert f"page written to {tmp_path / 'page-trace.html'}" in printed
    page = (tmp_path / "page-trace.html").read_text()
    assert "No states are read from slots, as by --probes: `latents.selection` must be dense" in page
    assert TURNED not in page  # its slots have the positions of text
    _, samples = embedded(page)
    assert len(samples) == 3 and not any(look["states"] for sample in samples for look in sample["looks"])
    assert all(look["columns"] == look["slots"] for sample in samples for look in sample["looks"])  # a row
    assert evaluate(other, data, tmp_path / "plain.jsonl") == 0

    def answers(name):
        lines = (tmp_path / name).read_text().splitlines()[1:]
        return sorted(({**json.loads(line), "seconds": 0} for line in lines), key=str)

    assert answers("page.jsonl") == answers("plain.jsonl")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--slots=all"], "--page must not be given with --slots, which writes a page of its own"),
        (["--probes"], "--page must not be given with --probes, which writes a page of its own"),
        (["--method=text"], "--method must be latent or single for --page, whose looks have slots, got text"),
        (["--mesh=fsdp=1"], "--page must be used on one device in one process"),
        (["--samples-per-question=2"], "--samples-per-question must be 1 for --page, got 2"),
        (["--early-end"], "--early-end must not be given with --page"),
        (["--latent-size=0"], "--page must be used with looks that have slots, got --latent-size=0"),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(run, data, tmp_path, capsys, flags, sentence):
    assert evaluate(run, data, tmp_path / "out.jsonl", "--page", *flags) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and len(err) < 400
    assert not list(tmp_path.iterdir())
