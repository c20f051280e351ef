"""python -m ilvr_jax.evaluate: how often a model answers the questions of a task correctly."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ilvr_jax.checkpoints.trained import TrainedModel, load_model
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import evaluation_file
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.pipeline import fingerprint
from ilvr_jax.errors import quote
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.results import open_results
from ilvr_jax.files import check_output, write_json
from ilvr_jax.generation_flags import add_decoding_flags, check_sizes, decoding_fields, flag_errors, usable_method
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.progress import Progress
from ilvr_jax.tasks import TASKS

MOST_SAMPLES, MOST_ROWS = 2**16, 2**16
LABELS = {  # of figures whose names in the summary need an explanation
    "unparsed": "without a readable answer",
    "cut_off": "stopped before their end",
    "accuracy_interval": "accuracy, 95 % interval",
    "pass_at": "pass@k",
    "majority": "accuracy of majority votes",
    "skipped": "skipped records",
    "success_where_holes_matter": "success, holes in the way",
    "success_on_detours": "success, detour needed",
    "hole_blind_success": "success of ignoring holes",
    "hole_blind_where_holes_matter": "the same, holes in the way",
    "unchanged_when_holes_painted_over": "same answer without holes",
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 some records skipped, 2 bad input, 130 stopped."""
    options = read_flags(arguments)
    trained = load_model(options.checkpoint, options.stage, options.dtype)
    options.method = usable_method(options, trained)
    evaluator = make_evaluator(options, trained)
    settings = settings_of(options, evaluator)
    out = options.out or default_out(options, trained)
    summary_path = out.with_suffix(".summary.json")
    check_output(summary_path)
    with (
        open_results(out, settings, len(evaluator.source)) as results,
        stop_sentence(lambda: f"stopped; {out} holds {results.stop()} answers, and the same command resumes it"),
        Progress(out.with_suffix(".log")) as progress,
    ):
        for sentence in results.damaged:
            print(sentence, file=sys.stderr)
        seconds = evaluator.answer_all(results, progress)
        figures = evaluator.summary(results, seconds)
        Console().print(figures_table(f"{options.task}, method {options.method}", figures))
        write_json(summary_path, settings | figures)
    print(f"Answers written to {out}, figures to {summary_path}")
    return 1 if evaluator.skipped else 0


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's flags; raise InputError, naming the flag, for a bad value of this command's own."""
    parser = ArgumentParser(prog="python -m ilvr_jax.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a run's workdir, a Qwen2.5-VL (folder or hub name), or ADAPTER[@BASE]")
    parser.add_argument("--task", choices=TASKS, required=True, help="decides how answers are read and scored")
    parser.add_argument(
        "--data", type=path_flag, help="the records, in a format of the task (default: the run's eval.data)"
    )
    parser.add_argument("--root", type=path_flag, help="folder that image paths start from (default: that of --data)")
    parser.add_argument(
        "--follow-links",
        action=argparse.BooleanOptionalAction,
        help="read images behind links out of the data folder (default: the run's data.follow_links, or yes)",
    )
    parser.add_argument(
        "--question", help="asked in place of every record's own; empty: the records' own (default: the run's)"
    )
    parser.add_argument(
        "--instruction", default="", help="text after every question, for models that were not trained on the task"
    )
    parser.add_argument(
        "--samples-per-question", type=int, default=1, help="answers per question; needs a temperature above 0"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="answers decoded in parallel (default: 16)")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT records")
    parser.add_argument(
        "--out", type=path_flag, help="a .jsonl file for the answers; a file with some of them is completed"
    )
    add_decoding_flags(parser)
    options = parser.parse_args(arguments)
    with flag_errors():
        for name, most in (("samples_per_question", MOST_SAMPLES), ("batch_size", MOST_ROWS)):
            check_whole(name, getattr(options, name), 1, most)
        if options.limit is not None:
            check_whole("limit", options.limit, 1)
    if options.samples_per_question > 1 and not options.temperature:
        raise BadConfig("--temperature must be above 0 for --samples-per-question above 1, or all samples are equal")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise BadConfig(f"--out must be a file whose name ends with .jsonl, got {quote(str(options.out))}")
    return options


def make_evaluator(options: argparse.Namespace, trained: TrainedModel) -> Evaluator:
    """Return the evaluator for the flags; raise InputError for a bad flag or records that cannot be read."""
    task, config = TASKS[options.task], trained.config
    if options.method == "pixels" and not hasattr(task, "draw_look"):
        drawing = ", ".join(name for name, module in TASKS.items() if hasattr(module, "draw_look"))
        raise BadConfig(f"--task must be one that draws pictures ({drawing}) for --method=pixels, got {options.task}")
    decoding = decoding_fields(options, trained.prompts, trained.max_new_tokens)
    data = options.data or (None if config is None else evaluation_file(config))
    if data is None:
        raise BadConfig(f"--data must be a file of records, since {options.checkpoint} has no eval.data")
    follow_links = options.follow_links
    if follow_links is None:
        follow_links = config is None or config.data.follow_links
    source = task.open_source(data, options.root, "skip", follow_links)
    for remark in getattr(source, "remarks", ()):
        print(remark, file=sys.stderr)
    return Evaluator(
        trained,
        options.task,
        data,
        source,
        decoding,
        functools.partial(check_sizes, options),
        question=options.question,
        instruction=options.instruction,
        samples=options.samples_per_question,
        rows=options.batch_size,
        limit=options.limit,
        seed=options.seed,
    )


def settings_of(options: argparse.Namespace, evaluator: Evaluator) -> dict[str, Any]:
    """Return everything that an answer depends on, for the first line of the results; the number of questions is not.

    A results file is completed only with the same settings.
    """
    return {
        "checkpoint": str(options.checkpoint),
        "stage": evaluator.trained.stage,
        "step": evaluator.trained.step,
        "model": evaluator.trained.digest(),
        "data": str(evaluator.data),
        "root": None if options.root is None else str(options.root),
        "records": fingerprint(evaluator.source),
        **{name: getattr(options, name) for name in ("task", "dtype", "question", "instruction", "seed")},
        **evaluator.decoding,
    }


def default_out(options: argparse.Namespace, trained: TrainedModel) -> Path:
    """Return the results file of an evaluation: in a run's workdir, or below the current folder for other models."""
    name, folder = f"{options.task}-{options.method}.jsonl", Path(options.checkpoint)
    if trained.config is not None:
        return folder / "evaluations" / name
    return Path("evaluations") / f"{folder.absolute().name}-{name}"


def figures_table(title: str, figures: dict[str, Any]) -> Table:
    """Return the table of an evaluation's figures."""
    table = Table(title=title, show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(LABELS.get(name, name.replace("_", " ")), format_figure(value))
    return table


def format_figure(value: Any) -> str:
    """Return a figure as text: rates with three decimals, figures by group in a row, a dash for none."""
    if isinstance(value, dict):
        return "  ".join(f"{key}: {format_figure(share)}" for key, share in value.items())
    if isinstance(value, list):
        return "–".join(map(format_figure, value))
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
