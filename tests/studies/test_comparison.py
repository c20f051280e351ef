"""The figures of a study from files of finished runs: paired differences, shares of leads, estimates, the page."""

import dataclasses
import html
import itertools
import json
import re

import numpy as np
import pytest

from ilvr_jax.config.workdir import to_json
from ilvr_jax.evaluation.evaluator import summary_file
from ilvr_jax.evaluation.results import summarise
from ilvr_jax.evaluation.slot_evaluation import Chosen, Condition, condition_file
from ilvr_jax.files import write_json
from ilvr_jax.reports.study import study_rows
from ilvr_jax.studies import STUDIES, Study, Variant
from ilvr_jax.studies.comparison import compare_variants
from ilvr_jax.studies.results import StudyResults, estimate_seconds
from ilvr_jax.studies.runs import count_seeds, for_stages, open_run, read_seconds, remaining_commands
from tests.paths import REPOSITORY

STUDY = Study(
    "configs/base.py",
    {
        "own": Variant("Own slots.", slots=("swap", "noise")),
        "text": Variant("No <looks>.", variant="text", changes={"warm_up.steps": "7"}),
        "pixels": Variant("Pictures.", variant="pixels", method="pixels"),
        "pause": Variant("Pauses.", variant="pause"),
    },
    minutes=17,
    quick={"*.steps": "2", "eval.limit": "20"},
    leads=("text", "pixels", "pause"),
)
# Right or wrong by question, for seed 0 and seed 1.
OWN = [(1, 1, 0, 1), (1, 0, 0, 1)]
TEXT = [(0, 1, 0, 0), (0, 0, 0, 1)]
PIXELS = [(1, 1, 1, 1)]
SWAPPED = [(0, 0, 0, 1), (0, 0, 0, 0)]


def open_one(folder, name, seed=0, quick=False, study=STUDY):
    return open_run(study, name, seed, str(REPOSITORY / STUDY.config), folder, quick)


def line(number, right, **fields):
    counts = {"tokens": 30, "looks": 1, "slots": 20, "picture_tokens": 0}
    texts = {"form": "", "record": f"map {number}", "answer": "R", "text": "R", "stop_reason": "end"}
    return {"number": number, "sample": 0, "right": bool(right), "seconds": 1.0, **counts, **texts, **fields}


def write_answers(path, rights):
    """Write a results file with a control, which does not count, and return its counting lines."""
    lines = [line(number, right) for number, right in enumerate(rights)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"settings": {}}, *lines, line(0, True, form="painted over")]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return lines


def finish(folder, name, seed, rights, swapped=None):
    """Write the files of a finished run, as training and evaluation leave them, and return the run."""
    run = open_one(folder, name, seed)
    stages = {}
    common = {"model": "abc", "data": "maps", "records": "4", "limit": 0, "max_new_tokens": 192}
    for stage in run.config.stages:
        evaluation = {"stage": stage, **common, "samples": 1, **summarise(map(line, range(4), rights)), "seconds": 5.0}
        evaluation |= {"success_where_holes_matter": 0.5, "success_on_detours": None}
        stages[stage] = {"steps": run.config.stages[stage].steps, "seconds": 60.0, "evaluation": evaluation}
    write_answers(run.answers(), rights)
    run.answers_of("latent").touch()
    write_json(run.latent_summary, evaluation)
    write_json(summary_file(run.answers()), evaluation)
    write_json(run.workdir / "summary.json", {"stages": stages})
    (run.workdir / "config.json").write_text(to_json(run.config))
    if run.variant.slots:
        rows = [{"name": "own", "replaced": "", "groups": {}}]
        for kind in ("swap", "noise"):
            write_answers(condition_file(run.answers(), Condition(kind, "inputs"), Chosen()), swapped)
            rows.append({"name": kind, "replaced": "inputs", "groups": {"holes in the way": 0.25}})
        write_json(run.slots_summary(), {**common, "rows": rows, "seconds": 10.0})
    return run


@pytest.fixture
def runs(tmp_path):
    own = [finish(tmp_path, "own", seed, OWN[seed], SWAPPED[seed]) for seed in (0, 1)]
    text = [finish(tmp_path, "text", seed, TEXT[seed]) for seed in (0, 1)]
    return [*own, *text, finish(tmp_path, "pixels", 0, PIXELS[0])]


def by_name(comparison):
    return {row["name"]: row for row in comparison["rows"]}


def test_rows_are_means_over_seeds(runs):
    rows = by_name(compare_variants(STUDY, runs, []))
    assert list(rows) == ["own", "own, swap (inputs)", "own, noise (inputs)", "text", "pixels"]
    own, text, pixels = (rows[name] for name in ("own", "text", "pixels"))
    assert (own["accuracy"], own["accuracies"], own["seeds"]) == (0.625, [0.75, 0.5], [0, 1])
    assert own["spread"] == pytest.approx(np.sqrt(2 * 0.125**2)) and pixels["spread"] is None
    assert own["groups"] == {"holes in the way": 0.5, "detour needed": None}
    assert (text["steps"], text["minutes"], text["slots"], text["text_tokens"]) == (7, 1.0, 20, 10)
    stages = runs[0].config.stages.values()
    assert (own["steps"], own["minutes"]) == (sum(stage.steps for stage in stages), len(stages))
    assert rows["own, noise (inputs)"]["groups"] == {"holes in the way": 0.25}


def test_differences_are_paired_by_question_over_shared_seeds(runs):
    rows = by_name(compare_variants(STUDY, runs, []))
    text, pixels = rows["text"], rows["pixels"]
    # Means over both seeds: own 1, 1/2, 0, 1; text 0, 1/2, 0, 1/2.
    differences = (-1.0, 0.0, 0.0, -0.5)
    assert text["difference"] == sum(differences) / 4 == -0.375 and text["shared_seeds"] == [0, 1]
    resamples = [np.mean(values) for values in itertools.product(differences, repeat=4)]  # all that are possible
    assert text["interval"] == pytest.approx(np.quantile(resamples, [0.025, 0.975]), abs=1e-9)
    assert text["p"] is None
    # With the first seed alone: own 1, 1, 0, 1; pixels 1 everywhere.
    assert (pixels["difference"], pixels["shared_seeds"], pixels["p"]) == (0.25, [0], 1.0)
    assert rows["own"]["difference"] is None
    swap = rows["own, swap (inputs)"]
    assert (swap["accuracy"], swap["difference"]) == (0.125, (-1 - 0.5 - 0 - 0.5) / 4)


def test_shares_of_leads(runs):
    leads = compare_variants(STUDY, runs, [])["leads"]
    assert leads.keys() == {"text"}  # no run of pause, and no lead over pixels
    assert leads["text"] == {"lead": 0.375, "lost": 0.5, "share": pytest.approx(0.5 / 0.375), "seeds": [0, 1]}
    assert compare_variants(STUDY, [runs[0], *runs[2:]], [])["leads"]["text"] == {
        "lead": 0.5,
        "lost": 0.5,
        "share": 1.0,
        "seeds": [0],
    }
    assert compare_variants(STUDY, runs[2:], [])["leads"] == {}


def test_a_variant_without_finished_runs_has_a_row_of_failures(runs):
    rows = by_name(compare_variants(STUDY, runs[2:], ["pause-seed1", "text-seed2", "pause-seed0"]))
    assert rows["pause"]["failed_seeds"] == [0, 1] and rows["pause"]["accuracy"] is None
    assert rows["text"]["failed_seeds"] == [2] and rows["text"]["difference"] is None
    header, lines = study_rows(list(rows.values()))
    assert len(header) == len(lines[0]) and lines[-1][0] == "pause" and lines[-1][-1] == "0, 1"


def test_finished_runs_need_no_command(runs):
    assert [remaining_commands(run) for run in runs] == [[]] * 5


def commands(run):
    return [command[2:] for command in remaining_commands(run)]


def test_commands_are_those_that_the_files_lack(runs, tmp_path):
    own, text, pixels = runs[0], runs[2], runs[4]
    batch = "--batch-size=50"
    file, folder = REPOSITORY / "configs/base.py", tmp_path
    slots = ["ilvr_jax.evaluate", str(own.workdir), "--method=latent", batch, "--slots=swap,noise"]
    own.slots_summary().unlink()
    assert commands(own) == [slots]
    summary_file(pixels.answers()).write_text('{"model": "of an earlier training"}')
    assert commands(pixels) == [["ilvr_jax.evaluate", str(pixels.workdir), "--method=pixels", batch]]
    runs[1].answers().unlink()
    assert [command[0] for command in commands(runs[1])] == ["ilvr_jax.train", "ilvr_jax.evaluate"]
    (own.workdir / "summary.json").unlink()
    train = ["ilvr_jax.train", f"--config={file}", f"--workdir={folder / 'own-seed0'}", "--config.seed=0"]
    assert commands(own) == [train, slots]
    (text.workdir / "config.json").write_text(to_json(open_one(folder, "text", seed=3).config))
    flags = ["--config.warm_up.steps=7", "--config.seed=0"]
    assert commands(text) == [["ilvr_jax.train", f"--config={file}:text", f"--workdir={text.workdir}", *flags]]


@pytest.fixture
def with_more(runs, tmp_path):
    """The study with more data, and its runs of the first seed of own slots and of text, evaluated on that as well."""
    study = dataclasses.replace(STUDY, more_data={"detours": str(tmp_path / "detours.jsonl")})
    found = [open_one(tmp_path, name, study=study) for name in ("own", "text")]
    for run, rights in zip(found, ((0, 1, 1), (0, 0, 0)), strict=True):
        lines = write_answers(run.answers("detours"), rights)
        common = {"model": "abc", "data": str(run.data["detours"]), "records": "3", "limit": 0, "max_new_tokens": 192}
        summary = {**common, "samples": 1, **summarise(lines), "success_on_detours": 0.25, "seconds": 7.0}
        write_json(summary_file(run.answers("detours")), summary)
    own = found[0]
    for kind in ("swap", "noise"):
        write_answers(condition_file(own.answers("detours"), Condition(kind, "inputs"), Chosen()), (0, 0, 1))
    rows = [{"name": name, "replaced": "inputs", "groups": {}} for name in ("swap", "noise")]
    write_json(own.slots_summary("detours"), {**common, "rows": rows, "seconds": 3.0})
    return study, found


def test_more_data_has_a_comparison_of_its_own(with_more):
    study, found = with_more
    comparison = compare_variants(study, found, [], "detours")
    rows = by_name(comparison)
    assert list(rows) == ["own", "own, swap (inputs)", "own, noise (inputs)", "text"]
    assert [row["accuracy"] for row in rows.values()] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])
    assert rows["text"]["difference"] == pytest.approx(-2 / 3) and rows["own"]["groups"] == {"detour needed": 0.25}
    assert comparison["leads"]["text"]["share"] == pytest.approx(0.5)
    assert by_name(compare_variants(study, found, []))["own"]["accuracy"] == 0.75  # the config's own data
    assert read_seconds(found[1]) == 60 + 5 + 7 and [remaining_commands(run) for run in found] == [[], []]


def test_more_data_is_evaluated_by_commands_of_its_own(with_more, tmp_path):
    own, text = with_more[1]
    on = [f"--data={tmp_path / 'detours.jsonl'}", f"--out={own.answers('detours')}", "--limit=0"]
    evaluate = ["ilvr_jax.evaluate", str(own.workdir), "--method=latent", "--batch-size=50", *on]
    own.slots_summary("detours").unlink()
    assert commands(own) == [[*evaluate, "--slots=swap,noise"]]
    own.answers("detours").unlink()
    assert commands(own) == [evaluate, [*evaluate, "--slots=swap,noise"]]
    write_json(summary_file(text.answers("detours")), {**json.loads(text.latent_summary.read_text()), "data": "others"})
    assert [command[0] for command in commands(text)] == ["ilvr_jax.evaluate"]


def test_more_data_has_a_table_and_plots(with_more, tmp_path):
    study, found = with_more
    StudyResults(study, {"study": "slots", "config": STUDY.config, "quick": False}, tmp_path, found, {}).write()
    written = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 2 and page.index("<h2>Accuracy</h2>") < page.index("<h2>Accuracy on detours</h2>")
    for rows in (written["rows"], written["more_data"]["detours"]["rows"]):
        for cells in study_rows(rows)[1]:
            assert "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) in page
    assert page.count("A diamond marks") == 2 and page.count("takes away: 0.50") == 1
    for name in ("accuracy.svg", "accuracy-detours.png", "accuracy-detours.svg"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_quick_study_shortens_every_stage(tmp_path):
    assert for_stages({"*.steps": "2", "eval.limit": "20"}, ["a", "b"]) == {
        "a.steps": "2",
        "b.steps": "2",
        "eval.limit": "20",
    }
    run = open_one(tmp_path, "text", quick=True)
    assert {name: stage.steps for name, stage in run.config.stages.items()} == {"warm_up": 2}
    assert run.config.eval.limit == 20
    for name in STUDIES["slots"].variants:
        run = open_run(STUDIES["slots"], name, 1, str(REPOSITORY / "configs/base.py"), tmp_path, quick=True)
        assert max(stage.steps for stage in run.config.stages.values()) <= 10 and run.config.seed == 1


def test_estimates_use_the_same_variant_then_all_then_the_table():
    left = ["a", "a", "b"]
    assert estimate_seconds(left, {}, minutes=17) == 3 * 17 * 60
    assert estimate_seconds(left, {"a": [10, 20], "c": [60]}, minutes=17) == 15 + 15 + 30
    assert estimate_seconds([], {}, minutes=17) == 0


def test_the_time_left_counts_finished_runs(runs, tmp_path):
    seconds = len(runs[0].config.stages) * (60 + 5) + 10
    assert read_seconds(runs[0]) == seconds and read_seconds(runs[4]) == 60 + 5 + 5
    settings = {"study": "slots", "config": STUDY.config, "quick": False}
    results = StudyResults(STUDY, settings, tmp_path, runs, {})
    assert results.time_left([]) == "no runs are left"
    assert results.time_left(runs[2:3]) == "1 run is left, about 1 min"
    assert results.time_left(runs[:1] * 40) == f"40 runs are left, about {40 * seconds / 3600:.1f} h"
    nothing = StudyResults(STUDY, settings, tmp_path, [], {})
    assert nothing.time_left(runs[:2]) == "2 runs are left, about 34 min (17 minutes per run on 2 cores)"
    quick = StudyResults(STUDY, {**settings, "quick": True}, tmp_path, [], {})
    assert quick.time_left(runs[:2]) == "2 runs are left; the time that they take is unknown until one is finished"
    assert count_seeds(tmp_path) == 2 and count_seeds(tmp_path / "absent") == 0


def test_files_hold_every_row_and_the_page_fetches_nothing(runs, tmp_path):
    settings = {"study": "slots", "config": STUDY.config, "quick": False}
    results = StudyResults(STUDY, settings, tmp_path, runs, {"pause-seed0": "it <failed>"})
    results.write()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == results.comparisons[""]["rows"] and written["leads"] == results.comparisons[""]["leads"]
    page = (tmp_path / "index.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page
    assert all(link.startswith("#") for link in re.findall(r"""(?:href|src)="([^"]*)\"""", page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))
    _, lines = study_rows(written["rows"])
    for cells in lines:
        assert "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) in page
    assert "No &lt;looks&gt;." in page and "it &lt;failed&gt;" in page and page.count('class="reference"') == 1
    assert "share of the lead of own over text (0.375) that swapping inputs takes away: 1.33" in page
    assert 'aria-label="Accuracy of 5 variants' in page and (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    again = StudyResults(STUDY, settings, tmp_path, runs, {})
    assert again.failed == {"pause-seed0": "it <failed>"}


def test_studies_are_complete():
    for study in STUDIES.values():
        assert (REPOSITORY / study.config).is_file() and study.minutes > 0
        assert set(study.leads) < study.variants.keys()
        assert all(variant.meaning.endswith(".") for variant in study.variants.values())
