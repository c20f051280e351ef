"""python -m ilvr_jax.evaluate: how often a model answers the questions of a task correctly."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ilvr_jax.analysis import slot_probes, slot_use, traces
from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.distributed import add_flags, initialize_distributed, is_main
from ilvr_jax.errors import quote
from ilvr_jax.evaluation.evaluator import Evaluator, results_file, run_evaluation, summary_file
from ilvr_jax.evaluation.records import EvaluationRecords, open_records
from ilvr_jax.evaluation.slot_evaluation import NAMES, Chosen, missing_needs
from ilvr_jax.generation_flags import (
    add_decoding_flags,
    check_sizes,
    decoding_fields,
    flag_errors,
    load_on_mesh,
    set_defaults,
)
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.reports.probes import describe_records, probe_tables
from ilvr_jax.reports.slots import slot_table
from ilvr_jax.tasks import TASKS

MOST_SAMPLES, MOST_ROWS = 2**16, 2**16
PROBE_RECORDS = 400  # that probes are fitted on
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
    "hole_blind_by_level": "the same by level",
    "hole_blind_where_holes_matter": "the same, holes in the way",
    "hole_blind_on_detours": "the same, detour needed",
    "unchanged_when_holes_painted_over": "same answer without holes",
    "differing": "different when slots were recorded",
    "read": "states read right by probes",
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 some records skipped, 2 bad input, 130 stopped."""
    options = read_flags(arguments)
    initialize_distributed(options)
    with load_on_mesh(options) as trained:
        flag = slot_flag(options)
        if flag and not trained.looks:
            raise BadConfig(f"{flag} must be used with a checkpoint that has latent tokens, got {options.checkpoint}")
        set_defaults(options, trained)
        if options.slots:
            return evaluate_slots(options, trained)
        if options.probes is not None:
            return evaluate_probes(options, trained)
        if options.page:
            return evaluate_page(options, trained)
        evaluator = make_evaluator(options, trained)
        out = options.out or default_out(options, trained)
        summary = run_evaluation(evaluator, out)
    apart = {"limit", "samples", *evaluator.settings(None)}
    figures = {name: value for name, value in summary.items() if name not in apart}
    if not is_main():
        return 1 if evaluator.skipped else 0
    Console().print(figures_table(f"{options.task}, method {options.method}", figures))
    print(f"Answers written to {out}, figures to {summary_file(out)}")
    return 1 if evaluator.skipped else 0


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's flags; raise InputError, naming the flag, for a bad value of this command's own."""
    parser = ArgumentParser(prog="python -m ilvr_jax.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a run's workdir, a Qwen2.5-VL (folder or hub name), or ADAPTER[@BASE]")
    parser.add_argument("--task", choices=TASKS, help="decides how answers are read and scored (default: the run's)")
    parser.add_argument(
        "--data", type=path_flag, help="the records, in a format of the task (default: those the run is evaluated on)"
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
        "--samples-per-question",
        type=int,
        help="answers per question, for a temperature above 0 (default: the run's eval.n, or 1)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="answers decoded in parallel (default: 16)")
    parser.add_argument(
        "--limit", type=int, help="ask only the first LIMIT records; 0: all (default without --data: the run's)"
    )
    parser.add_argument(
        "--out", type=path_flag, help="a .jsonl file for the answers; a file with some of them is completed"
    )
    parser.add_argument(
        "--slots",
        type=slots_flag,
        help=f"ask everything again with other slots: all, or names, with commas between them, of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--probes",
        type=int,
        nargs="?",
        const=PROBE_RECORDS,
        help="read from slots, with linear probes that are fitted on so many records, what they should show "
        f"(default: {PROBE_RECORDS})",
    )
    parser.add_argument(
        "--page", action="store_true", help="write a page of every answer, with what the slots of its looks point at"
    )
    parser.add_argument("--slots-look", type=int, help="replace the slots of this look alone, from 1 (default: all)")
    parser.add_argument("--slots-place", type=int, help="replace this slot of each look alone, from 1 (default: all)")
    add_decoding_flags(parser)
    add_flags(parser)
    options = parser.parse_args(arguments)
    with flag_errors():
        for name, most in (("samples_per_question", MOST_SAMPLES), ("batch_size", MOST_ROWS)):
            if getattr(options, name) is not None:
                check_whole(name, getattr(options, name), 1, most)
        for name, least in (("limit", 0), ("slots_look", 1), ("slots_place", 1), ("probes", slot_probes.FEWEST)):
            if getattr(options, name) is not None:
                check_whole(name, getattr(options, name), least)
    if options.out is not None and options.out.suffix != ".jsonl":
        raise BadConfig(f"--out must be a file whose name ends with .jsonl, got {quote(str(options.out))}")
    if options.root is not None and options.data is None:
        raise BadConfig(f"--root must come with --data, got {quote(str(options.root))} alone")
    if slot_flag(options):
        _check_slot_flags(options)
    if not options.slots and (options.slots_look or options.slots_place):
        raise BadConfig("--slots must be given with --slots-look and --slots-place, got none")
    return options


def slot_flag(options: argparse.Namespace) -> str | None:
    """Return the flag that asks for figures or a page of slots, None without one."""
    return next(iter(_slot_flags(options)), None)


def _slot_flags(options: argparse.Namespace) -> list[str]:
    given = {"--page": options.page, "--slots": options.slots, "--probes": options.probes is not None}
    return [flag for flag, value in given.items() if value]


def slots_flag(text: str) -> list[str]:
    """Return the interventions that a flag names; raise ArgumentTypeError for an unknown name."""
    names = list(NAMES) if text == "all" else text.split(",")
    for name in names:
        if name not in NAMES:
            known = f"all, or names of {', '.join(NAMES)}"
            raise argparse.ArgumentTypeError(f"must be {known}, with commas between them, got {quote(name)}")
    return list(NAMES) if text == "all" else [name for name in NAMES if name in names]


def _check_slot_flags(options: argparse.Namespace) -> None:
    """Raise BadConfig, naming the flag, for flags that cannot be used with --slots, --probes or --page."""
    flag, *others = _slot_flags(options)
    if flag == "--page" and others:
        raise BadConfig(f"--page must not be given with {others[0]}, which writes a page of its own")
    if options.slots and options.probes is not None:
        raise BadConfig("--probes must not be given with --slots, which asks all questions again")
    if options.method not in ("latent", "single"):
        raise BadConfig(f"--method must be latent or single for {flag}, whose looks have slots, got {options.method}")
    if options.mesh is not None or options.distributed or (options.processes or 1) > 1:
        raise BadConfig(f"{flag} must be used on one device in one process, without --mesh and --distributed")
    if (options.samples_per_question or 1) > 1:
        raise BadConfig(f"--samples-per-question must be 1 for {flag}, got {options.samples_per_question}")
    if options.early_end:
        raise BadConfig(f"--early-end must not be given with {flag}, which counts the slots of whole looks")


def evaluate_slots(options: argparse.Namespace, trained: TrainedModel) -> int:
    """Ask the questions with own and with other slots, print the figures, and return the exit status."""
    _check_looks(options)
    chosen = Chosen(options.slots_look, options.slots_place)
    if (chosen.place or 1) > options.latent_size:
        raise BadConfig(
            f"--slots-place must be at most the slots of a look ({options.latent_size}), got {chosen.place}"
        )
    evaluator = _whole_looks(options, trained)
    names = _served(options, evaluator, chosen)
    out = options.out or default_out(options, trained)
    summary = slot_use.run_slot_evaluation(evaluator, names, out, chosen)
    Console().print(slot_table(summary["rows"]))
    Console().print(figures_table(f"{options.task}, slots", slot_use.main_figures(summary)))
    files = slot_use.report_files(out, chosen)
    print(f"Figures written to {files['summary']}, page to {files['html']}")
    return 1 if evaluator.skipped else 0


def _whole_looks(options: argparse.Namespace, trained: TrainedModel) -> Evaluator:
    """Return an evaluator of one answer per question, without controls, whose looks have all their slots."""
    options.samples_per_question = 1
    _check_early_end(options)
    return dataclasses.replace(make_evaluator(options, trained), controls=False)


def _check_early_end(options: argparse.Namespace) -> None:
    """Raise BadConfig if a run lets looks end before their last slot."""
    if options.early_end:
        raise BadConfig(
            f"--no-early-end must be given with {slot_flag(options)}, which counts the slots of whole looks"
        )


def _check_looks(options: argparse.Namespace) -> None:
    """Raise BadConfig if looks have no slots."""
    if not options.latent_size:
        raise BadConfig(f"{slot_flag(options)} must be used with looks that have slots, got --latent-size=0")


def evaluate_probes(options: argparse.Namespace, trained: TrainedModel) -> int:
    """Read states from slots with probes, print the figures, and return the exit status."""
    evaluator = _whole_looks(options, trained)
    out = options.out or default_out(options, trained)
    summary = slot_probes.run_probes(evaluator, options.probes, out)
    for table in probe_tables(summary):
        Console().print(table)
    print(describe_records(summary))
    files = slot_probes.report_files(out)
    print(f"Figures written to {files['summary']}, page to {files['html']}")
    return 1 if evaluator.skipped else 0


def evaluate_page(options: argparse.Namespace, trained: TrainedModel) -> int:
    """Complete the answers, write a page of them, print its figures, and return the exit status."""
    _check_looks(options)
    _check_early_end(options)
    evaluator = make_evaluator(options, trained)
    out = options.out or default_out(options, trained)
    figures = traces.run_traces(evaluator, PROBE_RECORDS, out)
    if figures.no_states:
        print(f"no states are read from slots, as by --probes: {figures.no_states}")
    shown = {name: value for name, value in figures._asdict().items() if name != "no_states"}
    Console().print(figures_table(f"{options.task}, page", shown))
    print(f"Answers in {out}, page written to {traces.report_files(out)['html']}")
    return 1 if evaluator.skipped else 0


def _served(options: argparse.Namespace, evaluator: Evaluator, chosen: Chosen) -> list[str]:
    """Return the interventions to try; with --slots=all those that cannot be tried are dropped, with a line on stderr.

    Raises BadConfig for the others.
    """
    missing = missing_needs(evaluator, chosen)
    lacking = {name: need for name, need in missing.items() if name in options.slots}
    served = [name for name in options.slots if name not in lacking]
    reasons = "; ".join(f"{name} needs {need}" for name, need in lacking.items())
    if lacking and len(options.slots) < len(NAMES):
        can = ", ".join(name for name in NAMES if name not in missing)
        raise BadConfig(f"--slots must be among those that can be tried here ({can}); {reasons}")
    if lacking:
        print(f"not tried: {reasons}", file=sys.stderr)
    return served


def make_evaluator(options: argparse.Namespace, trained: TrainedModel) -> Evaluator:
    """Return the evaluator for the flags, whose defaults for a run are its settings; raise InputError as `open_data`.

    Sets the task and the limit of the flags to those that are used.
    """
    config = trained.config
    if options.task is None:
        if config is None:
            raise BadConfig(f"--task must be one of {', '.join(TASKS)} for {options.checkpoint}, which is not a run")
        options.task = config.eval.task
    task = TASKS[options.task]
    if options.method == "pixels" and not hasattr(task, "draw_look"):
        drawing = ", ".join(name for name, module in TASKS.items() if hasattr(module, "draw_look"))
        raise BadConfig(f"--task must be one that draws pictures ({drawing}) for --method=pixels, got {options.task}")
    if options.limit is None:
        options.limit = config.eval.limit if config and options.data is None else 0
    if options.samples_per_question is None:
        options.samples_per_question = config.eval.n if config else 1
    if options.samples_per_question > 1 and not options.temperature:
        raise BadConfig("--temperature must be above 0 for --samples-per-question above 1, or all samples are equal")
    decoding = decoding_fields(options)
    records = open_data(options, config)
    for remark in getattr(records.source, "remarks", ()):
        print(remark, file=sys.stderr)
    return Evaluator(
        trained,
        options.task,
        records,
        decoding,
        functools.partial(check_sizes, options),
        question=options.question,
        instruction=options.instruction,
        samples=options.samples_per_question,
        rows=options.batch_size,
        limit=options.limit,
        seed=options.seed,
    )


def open_data(options: argparse.Namespace, config: RunConfig | None) -> EvaluationRecords:
    """Return the records of --data, or else those of the run's config; raise InputError if there are none."""
    follow_links = options.follow_links
    if follow_links is None:
        follow_links = config is None or config.data.follow_links
    if options.data is not None:
        source = TASKS[options.task].open_source(options.data, options.root, "skip", follow_links)
        images = f", images in {options.root}" if options.root else ""
        return EvaluationRecords(source, f"{options.data}{images}")
    records = None
    if config is not None:
        data = dataclasses.replace(config.data, follow_links=follow_links)
        section = dataclasses.replace(config.eval, task=options.task)
        records = open_records(dataclasses.replace(config, data=data, eval=section))
    if records is None:
        raise BadConfig(f"--data must be a file of records, since {options.checkpoint} has none to be evaluated on")
    return records


def default_out(options: argparse.Namespace, trained: TrainedModel) -> Path:
    """Return the results file of an evaluation: in a run's workdir, or below the current folder for other models."""
    folder = Path(options.checkpoint)
    if trained.config is not None:
        return results_file(folder, trained.config, trained.stage, trained.step, options.task, options.method)
    return Path("evaluations") / f"{folder.absolute().name}-{options.task}-{options.method}.jsonl"


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
