"""Train the variants of a study with several seeds and compare them: python -m ilvr_jax.study slots"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ilvr_jax.command import DONE, FAILED, ArgumentParser, command, fail, path_flag
from ilvr_jax.config.experiments import evaluation_file
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.errors import listed, quote
from ilvr_jax.files import locked_folder
from ilvr_jax.generation_flags import flag_errors
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.interrupts import STOPPED, stop_sentence
from ilvr_jax.progress import Progress
from ilvr_jax.reports.study import TABLE_WIDTH, lead_sentences, study_table
from ilvr_jax.studies import STUDIES, Study
from ilvr_jax.studies.children import Children, Stopped, child_processes
from ilvr_jax.studies.results import StudyResults
from ilvr_jax.studies.runs import MOST_SEEDS, StudyRun, count_seeds, open_run, remaining_commands
from ilvr_jax.studies.settings import check_settings, settings_of, write_settings

RESUMES = "stopped; the same command resumes the study"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 some runs failed, 2 bad input, 130 stopped."""
    options = read_flags(arguments)
    study, workdir = STUDIES[options.study], options.workdir
    runs, refused = open_runs(options, study)
    chosen = [run for run in runs if run.name in options.variants and run.seed < options.seeds]
    settings = settings_of(options.study, options.config, chosen, options.quick)
    with stop_sentence(lambda: RESUMES), locked_folder(workdir):
        settings = check_settings(workdir, settings)
        results = StudyResults(study, settings, workdir, runs, refused)
        write_settings(workdir, settings)
        with Progress(workdir / "study.log") as progress, child_processes() as children:
            try:
                run_all(chosen, results, children, progress)
            except Stopped:
                progress.log("stopped")
                return fail(STOPPED, RESUMES)
    console = Console(width=max(Console().width, TABLE_WIDTH))
    for data, comparison in results.comparisons.items():
        console.print(study_table(comparison["rows"], data))
        for sentence in lead_sentences(comparison["leads"], study.base):
            print(sentence)
    names = ["index.html", "results.json", *(path.name for path in results.plots())]
    print(f"Results written to {workdir}: {', '.join(names)}")
    failed = [key for key in (*refused, *(run.key for run in chosen)) if key in results.failed]
    return fail(FAILED, f"failed: {listed(failed)}; the same command tries them again") if failed else DONE


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's flags; raise InputError, naming the flag, for a bad value."""
    parser = ArgumentParser(prog="python -m ilvr_jax.study", description=__doc__)
    parser.add_argument("study", choices=STUDIES, help="an entry of STUDIES in ilvr_jax/studies/__init__.py")
    parser.add_argument("--config", help="a config file that has the study's variants (default: the study's)")
    parser.add_argument("--workdir", type=path_flag, help="the folder of all runs (default: runs/study-NAME)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, with the seeds from 0 (default: 3)")
    parser.add_argument(
        "--variants", help="names with commas between them; the base is always among them (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and questions, in a workdir of its own, as a test"
    )
    options = parser.parse_args(arguments)
    with flag_errors():
        check_whole("seeds", options.seeds, 1, MOST_SEEDS)
    study = STUDIES[options.study]
    names = list(study.variants) if options.variants is None else options.variants.split(",")
    for name in names:
        if name not in study.variants:
            known = ", ".join(study.variants)
            raise BadConfig(f"--variants must name variants of the study ({known}), got {quote(name)}")
    options.variants = [name for name in study.variants if name in (study.base, *names)]
    options.config = study.config if options.config is None else options.config
    if ":" in options.config:
        raise BadConfig(f"--config must be a file without a variant, got {quote(options.config)}")
    options.workdir = options.workdir or Path("runs") / f"study-{options.study}{'-quick' * options.quick}"
    return options


def open_runs(options: argparse.Namespace, study: Study) -> tuple[list[StudyRun], dict[str, str]]:
    """Return the runs of all variants, seed by seed, and why those that were chosen cannot be run, by name.

    Runs of earlier calls, with more seeds or other variants, are among them. Raises BadConfig if the base cannot be run
    or is not evaluated.
    """
    runs, refused = [], {}
    for seed in range(max(options.seeds, count_seeds(options.workdir))):
        for name in study.variants:
            try:
                runs.append(open_run(study, name, seed, options.config, options.workdir, options.quick))
            except BadConfig as error:
                if name == study.base:
                    raise
                if name in options.variants and seed < options.seeds:
                    refused[f"{name}-seed{seed}"] = str(error)
    if evaluation_file(runs[0].config) is None and not runs[0].config.eval.fraction:
        raise BadConfig(f"--config must be a file with `eval.data` or `eval.fraction`, got {options.config}")
    return runs, refused


def run_all(chosen: Sequence[StudyRun], results: StudyResults, children: Children, progress: Progress) -> None:
    """Complete runs in their order, and write the results after each; one that fails stops no other.

    Raises Stopped after a signal.
    """
    waiting = [run for run in chosen if remaining_commands(run)]
    results.write()
    progress.log(results.time_left(waiting))
    for number, run in enumerate(waiting, start=1):
        progress.log(f"{run.key}: started, in {run.workdir}")
        error = complete(run, children)
        if error:
            results.failed[run.key] = error
        results.write()
        progress.log(f"{run.key}: {f'failed: {error}' if error else 'finished'}; {results.time_left(waiting[number:])}")


def complete(run: StudyRun, children: Children) -> str | None:
    """Run the commands that a run needs; return None if that completes it, else one sentence about the error."""
    while commands := remaining_commands(run):
        error = children.run(commands[0])
        if len(remaining_commands(run)) >= len(commands):  # records that are skipped end an evaluation with an error
            return error or f"{' '.join(commands[0][1:4])} ended, but its results are not complete"
    return None


if __name__ == "__main__":
    sys.exit(main())
