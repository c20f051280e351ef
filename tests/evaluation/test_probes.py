"""python -m ilvr_jax.evaluate --probes: vectors of the same places, probes that find planted states, and retrieval."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from ilvr_jax.analysis.slot_probes import probe_figures, retrieval_figures
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.config.schema import FrozenLakeConfig, SamplingParams
from ilvr_jax.data.examples import build_example
from ilvr_jax.data.export import write_records
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.evaluate import main
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.oracle import oracle_slots
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.evaluation.slot_vectors import (
    SlotVectors,
    fresh_records,
    gather_vectors,
    measure_answers,
    questions_of,
    true_vectors,
)
from ilvr_jax.inference.decode import decode_steps
from ilvr_jax.method.layout import collate, required_layout
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.progress import Progress
from ilvr_jax.reports.probes import READERS
from tests.published import save_published
from tests.samples import SKETCH_SIDE, sketch_run

SIDE = SKETCH_SIDE
K = SIDE**2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sketch_run(tmp_path_factory.mktemp("probes") / "run")


@pytest.fixture(scope="module")
def data(run):
    lake = FrozenLakeConfig(levels=(3, SIDE), cell_pixels=64)
    maps = FrozenLakeSource(lake, seed=5, count=24)
    write_records([maps[number] for number in range(24)], run.parent / "maps")
    return run.parent / "maps" / "train.jsonl"


def evaluate(run, data, out, *flags) -> int:
    flags = ("--method=single", "--max-new-tokens=24", *flags)
    return main([str(run), "--task=vsp_planning", f"--data={data}", f"--out={out}", *flags])


def evaluator_of(run, count=12, rows=4, **changes):
    trained = load_model(str(run))
    source = FrozenLakeSource(trained.config.data.frozen_lake, seed=7, count=count)
    trained = dataclasses.replace(trained, prompts=dataclasses.replace(trained.prompts, image_scale=1.0, **changes))
    decoding = {"method": "single", "latent_size": K, "sampling": SamplingParams(K + 4)}
    latents = trained.config.latents
    decoding |= {name: getattr(latents, name) for name in ("image_visibility", "slot_positions")}
    records = EvaluationRecords([source[number] for number in range(count)], "maps")
    return Evaluator(trained, "vsp_planning", records, decoding, controls=False, rows=rows)


def test_the_command_writes_figures_and_a_page(run, data, tmp_path, capsys):
    before = measure_answers._cache_size(), decode_steps._cache_size()
    assert evaluate(run, data, tmp_path / "out.jsonl", "--probes=20", "--limit=14") == 0
    assert (measure_answers._cache_size() - before[0], decode_steps._cache_size() - before[1]) == (1, 1)
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out-probes.summary.json").read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"out-probes.{kind}" for kind in ("html", "log", "summary.json")
    ]
    assert (summary["fitted_on"], summary["fitted_records"]) == ("generated records", 20)
    assert (summary["scored_records"], summary["skipped"], len(summary["looks"])) == (14, 0, 3)
    page = (tmp_path / "out-probes.html").read_text()
    first = summary["looks"][0]
    assert first["places"] and first["places"] + first["skipped_places"] == K
    for figures in (first["accuracy"], first["macro"]):
        assert (
            set(figures) == set(READERS) and f"{figures['slots']:.3f}" in printed and f"{figures['text']:.3f}" in page
        )
    # Sketches can be read from their features even before training, and the answers have one look.
    assert first["accuracy"]["targets"] > first["accuracy"]["majority"] + 0.2
    assert first["retrieval"]["samples"] == first["retrieval"]["candidates"] == 14
    assert summary["looks"][1]["places"] == 0 and summary["looks"][1]["accuracy"]["slots"] is None
    assert summary["looks"][2]["retrieval"] == {"samples": 0, "candidates": 0}
    assert "look 3, macro" in page and "–" in page


def test_a_run_on_files_fits_on_half_of_the_records(tmp_path, data, capsys):
    run = sketch_run(tmp_path / "run", data__source="vsp", data__path=str(data))
    assert evaluate(run, data, tmp_path / "out.jsonl", "--probes=11") == 0
    summary = json.loads((tmp_path / "out-probes.summary.json").read_text())
    assert (summary["fitted_records"], summary["scored_records"]) == (11, 12)
    assert summary["fitted_on"] == f"every second one of {summary['data']}"
    capsys.readouterr()
    assert evaluate(run, data, tmp_path / "few.jsonl", "--probes", "--limit=13") == 2
    sentence = "--probes must have 10 records or more to fit on, and as many to score, got 7 and 6\n"
    assert capsys.readouterr().err == sentence


def test_generated_records_are_none_that_are_evaluated(run):
    evaluator = evaluator_of(run, 40)
    fresh = fresh_records(evaluator, 60)
    evaluated = {evaluator.source[number].map_desc for number in range(40)}
    assert len(fresh.source) == 60 and not evaluated & {record.map_desc for record in fresh.source}
    assert all(len(question.states) == 3 for question in questions_of(fresh))  # none asks for the map in words
    assert fresh.trained.prompts.image_scale == 1 and fresh.limit == 0


@pytest.fixture(scope="module")
def gathered(run):
    """The questions of maps of both sizes, and the vectors of answers to them that consist of one look."""
    questions = questions_of(evaluator_of(run, 6))
    numbers, vectors = gather_vectors(questions, Progress(None))
    assert numbers == list(range(6)) and {len(question.record.map_desc) for question in questions} == {3, SIDE}
    return questions, vectors


def test_hidden_states_in_a_batch_of_unequal_prompts_are_those_of_each_alone(gathered):
    questions, vectors = gathered
    sides = [len(question.record.map_desc) for question in questions]
    for number in (sides.index(3), sides.index(SIDE)):
        alone = true_vectors([(0, questions[number])], rows=1)[0]
        for name in ("pause", "targets", "text"):
            np.testing.assert_allclose(getattr(vectors, name)[number], getattr(alone, name), atol=1e-5, err_msg=name)


def test_the_first_slot_is_what_its_place_computes_by_itself(gathered):
    """No slot precedes it: the decode core and the pass over the true answer have the same hidden state before it."""
    questions, vectors = gathered
    assert vectors.valid[:, 0].all() and not vectors.valid[:, 1:].any()
    np.testing.assert_allclose(vectors.slots[:, 0, 0], vectors.pause[:, 0, 0], atol=1e-4)
    assert np.abs(vectors.slots[:, 0, 1] - vectors.pause[:, 0, 1]).max() > 1e-2
    states = np.stack([question.states for question in questions])
    np.testing.assert_array_equal(vectors.states[:, 0], states[:, 0])
    assert (vectors.states[:, 1:] == "").all() and (states[:, 1:] != "").any()
    np.testing.assert_array_equal(vectors.take([3, 1]).text, vectors.text[[3, 1]])


def test_vectors_of_true_answers_are_those_of_a_plain_pass(gathered):
    (question, *_), vectors = gathered
    evaluator, trained = question.evaluator, question.evaluator.trained
    model, decoder, record = trained.model, decoder_params(trained.params), evaluator.asked(question.record)
    settings = dataclasses.replace(evaluator.prompts, latent_size=K)
    sample = build_example(record, trained.tokenizer, trained.special, settings)
    batch = collate([sample], required_layout(sample, model.geometry), trained.special, model.geometry)

    def final_states():
        features = model.encode_images(trained.params["vision"], batch.images)
        embedded = model.embed(decoder, batch.tokens, batch.image_index, features)
        return model.decode(decoder, embedded, batch.positions, batch.causal_mask(trained.config.latents))[0]

    hidden = np.asarray(jax.jit(final_states)())[0]
    starts = np.array(sample.slot_starts)
    prompt = evaluator.prompt(question.record, 0)
    np.testing.assert_allclose(vectors.pause[0], hidden[starts[:, None] - 1 + np.arange(K)], atol=1e-5)
    np.testing.assert_allclose(vectors.text[0], hidden[len(prompt.tokens) - 1], atol=1e-5)
    oracle = oracle_slots(trained, [(0, record)], K, evaluator.prompts, seed=0)[0]
    np.testing.assert_allclose(vectors.targets[0].reshape(oracle.inputs.shape), oracle.inputs, atol=1e-5)


def test_slots_have_no_codes_of_their_places(tmp_path):
    changes = {"model__slot_input": "placed", "latents__slot_positions": "turning_grid"}
    questions = questions_of(evaluator_of(sketch_run(tmp_path / "run", **changes), 6))
    _, vectors = gather_vectors(questions, Progress(None))
    np.testing.assert_allclose(np.square(vectors.slots[:, 0]).mean(-1), 1, rtol=1e-3)  # of states scaled to it
    codes = next(iter(true_vectors(list(enumerate(questions)), rows=4).values())).added
    assert len(np.unique(codes[0].round(4), axis=0)) == K
    np.testing.assert_array_equal(codes[1], codes[0, ::-1])  # the second look is turned


def test_pauses_of_the_rule_pause_are_its_own(gathered):
    questions, vectors = gathered
    trained, (evaluator, *_) = questions[0].evaluator.trained, questions[0]
    decoder = trained.params["decoder"]
    model = dataclasses.replace(trained.model, config=dataclasses.replace(trained.model.config, slot_input="pause"))
    pad = np.asarray(decoder["embed_tokens"])[trained.special.latent_pad]
    for changed, same in ((pad, True), (pad + 1, False)):
        params = {**trained.params, "decoder": {**decoder, "slot_input": {"embedding": changed}}}
        other = dataclasses.replace(evaluator, trained=dataclasses.replace(trained, model=model, params=params))
        asked = [(number, question._replace(evaluator=other)) for number, question in enumerate(questions)]
        found = np.stack([measured.pause for measured in true_vectors(asked, evaluator.rows).values()])
        assert np.allclose(found, vectors.pause, atol=1e-5) == same


def planted(samples, seed, places=6, channels=24):
    """Returns vectors of which slots and targets show the states, and pauses and texts do not.

    The state of place 4 never varies, and few records have one at place 5.
    """
    random = np.random.default_rng(seed)
    states = random.integers(0, 4, (samples, 1, places))
    states[:, :, 4] = 2
    directions = np.random.default_rng(99).normal(size=(4, channels))
    noise = [random.normal(size=(samples, 1, places, channels)) for _ in range(3)]
    names = np.array(["0", "1", "hole", "elf"])[states]
    names[5:, :, 5] = ""
    return SlotVectors(
        states=names,
        valid=np.ones(names.shape, bool),
        slots=directions[states] + 0.3 * noise[0],
        pause=noise[1],
        targets=directions[states] + 0.01 * noise[2],
        text=random.normal(size=(samples, channels)),
    )


def test_probes_find_planted_states_in_slots_alone():
    figures = probe_figures(planted(150, 0), planted(200, 1), 0, seed=0)
    assert (figures["places"], figures["skipped_places"]) == (4, 2)
    for name in ("accuracy", "macro"):
        found = figures[name]
        assert found["slots"] > 0.95 and found["targets"] == 1
        assert all(0.15 < found[other] < 0.35 for other in ("majority", "text", "pause"))
    assert figures["macro"]["majority"] != figures["accuracy"]["majority"]


def test_planted_slots_find_their_own_helper_images():
    vectors = planted(120, 2, places=12)
    figures = retrieval_figures(vectors, 0, seed=0)
    assert (figures["samples"], figures["candidates"]) == (120, 100)
    slots, pause = figures["slots"], figures["pause"]
    assert slots["recall_at_1"] == 1 and slots["mean_reciprocal_rank"] == 1
    assert pause["recall_at_1"] < 0.1 and pause["recall_at_10"] < 0.3
    assert slots["cosine_with_own"] > 0.9 > 0.6 > slots["cosine_with_others"]
    assert abs(pause["cosine_with_own"] - pause["cosine_with_others"]) < 0.1
    vectors.valid[1:] = False
    assert retrieval_figures(vectors, 0, seed=0) == {"samples": 1, "candidates": 1}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--probes=5"], "--probes must be a whole number from 10 to 2147483647, got 5"),
        (["--probes", "--slots=all"], "--probes must not be given with --slots"),
        (["--probes", "--method=text"], "--method must be latent or single for --probes, whose looks have slots, got"),
        (["--probes", "--mesh=fsdp=1"], "--probes must be used on one device in one process"),
        (["--probes", "--early-end"], "--early-end must not be given with --probes"),
        (
            ["--probes", "--task=comt"],
            "--task must be one whose slots have states (vsp_planning) for --probes, got comt",
        ),
        (
            ["--probes", "--latent-size=9"],
            "--latent-size must be at least the places of a look (16) for --probes, got 9",
        ),
        (
            ["--probes=10", "--limit=10", "--method=latent", "--max-new-tokens=1"],
            "--probes must be used with a model that",
        ),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(run, data, tmp_path, capsys, flags, sentence):
    try:
        status = evaluate(run, data, tmp_path / "out.jsonl", *flags)
    except SystemExit as ended:
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2 and sentence in err and err.count("\n") == 1 and len(err) < 400


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents__selection": "top_k"}, "`latents.selection` must be dense for --probes, .*, got top_k\n"),
        ({"data__frozen_lake": {"looks": "moves"}}, "`data.frozen_lake.looks` must be distances for .*\n"),
    ],
)
def test_a_run_whose_slots_have_no_states_is_refused(tmp_path, data, capsys, changes, sentence):
    run = sketch_run(tmp_path / "run", **changes)
    assert evaluate(run, data, tmp_path / "out.jsonl", "--probes") == 2
    assert re.fullmatch(sentence, capsys.readouterr().err)


def test_a_checkpoint_without_latent_tokens_is_refused(data, tmp_path, capsys):
    save_published(tmp_path, dtype="float32", texts=["Which way?"])
    capsys.readouterr()
    assert evaluate(tmp_path, data, tmp_path / "out.jsonl", "--probes") == 2
    err = capsys.readouterr().err
    assert err == f"--probes must be used with a checkpoint that has latent tokens, got {tmp_path}\n"
