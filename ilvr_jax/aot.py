"""Compile a config for a TPU topology on any machine, and print whether it fits.

python -m ilvr_jax.aot --config=configs/qwen2_5_vl.py:7b-stage1 --topology=v5e:4x4 --config.stage1.batch_size=16
python -m ilvr_jax.aot --sweep=docs/scale.jsonl
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ilvr_jax.analysis.compilation import (
    DoesNotFit,
    Report,
    compile_decoding,
    compile_train_step,
    config_model,
    open_topology,
)
from ilvr_jax.analysis.flops import GIB, Chip
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import BASE, load_config, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.flags import read_config_flags
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.data.sources import config_buckets
from ilvr_jax.method.layout import padded_tokens
from ilvr_jax.models.base import Model
from ilvr_jax.training.run import check_choices

SPARE = 0.05  # the share of a chip's memory that must remain free
# The cases of docs/scale.md: size, trained parts and topology; one row per chip, all arrays divided over all chips.
SWEEP = (
    ("7b", "full", "v5e:4x4"),
    ("7b", "full", "v5e:8x8"),
    ("7b", "lora", "v5e:2x4"),
    ("72b", "full", "v5p:2x4x4"),
    ("3b", "full", "v5e:2x4"),
    ("32b", "full", "v5p:2x2x4"),
    ("7b", "full", "v6e:2x4"),
    ("3b", "lora", "v5e:2x2"),
    ("32b", "lora", "v6e:2x4"),
    ("72b", "lora", "v5p:2x2x2"),
)
SWEEP_BUCKET = "few_looks"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 all fits, 1 something does not, 2 bad input."""
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here, and runs nothing
    parser = ArgumentParser(prog="python -m ilvr_jax.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="such as v5e:4x4, v5p:2x2x2 or v6e:4x4")
    parser.add_argument("--sweep", type=path_flag, help="compile the cases of docs/scale.md into this file")
    parser.add_argument(
        "--stage", help="the stage to compile, or decoding (default: the config's stages, then decoding)"
    )
    parser.add_argument("--bucket", help="of data.buckets (default: the one with the most tokens)")
    console = Console(highlight=False, soft_wrap=True)
    options = read_config_flags(parser, arguments, BASE)
    if options.sweep:
        return sweep(options.sweep, console)
    if options.config_file is None or options.topology is None:
        raise BadConfig("--config and --topology (such as v5e:4x4), or --sweep, must be given")
    check_choices(options.config)
    config, model = options.config, config_model(options.config)
    stages = [options.stage] if options.stage else [*config.stages, "decoding"]
    known = (*config.stages, "decoding")
    if stages[0] not in known:
        raise BadConfig(f"--stage must be one of {', '.join(known)}, got {stages[0]!r}")
    bucket = options.bucket or largest_bucket(config)
    if bucket not in config.data.buckets:
        raise BadConfig(f"--bucket must be one of {', '.join(config.data.buckets)}, got {bucket!r}")
    chip, devices = open_topology(options.topology)
    fits = True
    for stage in stages:
        try:
            reports = compile_stage(config, stage, bucket, model, chip, devices)
        except DoesNotFit as error:
            fits = False
            console.print(f"[bold]{stage}, {bucket}[/]: does not fit: {error}; {advice(config, stage)}")
            continue
        for report in reports:
            fits &= report.spare >= SPARE
            show(report, options.topology, console)
            if report.spare < SPARE:
                console.print(f"does not fit with {SPARE:.0%} to spare; {advice(config, stage)}")
    return 0 if fits else 1


def compile_stage(
    config: RunConfig, stage: str, bucket: str, model: Model, chip: Chip, devices: list[jax.Device]
) -> list[Report]:
    """Compile a stage's train step, or the programs of decoding; raises as `compile_train_step` does."""
    if stage == "decoding":
        return compile_decoding(config, bucket, model, chip, devices)
    return [compile_train_step(config, stage, bucket, model, chip, devices)]


def sweep(path: Path, console: Console) -> int:
    """Compile the cases that the file lacks, append a line for each, and print all as a Markdown table."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = {tuple(line["case"]): line for line in map(json.loads, lines)}
    cases = [(*case, stage) for case in SWEEP for stage in ("stage1", "stage2")]
    for case in cases:
        if case not in results:
            results[case] = sweep_case(*case)
            with path.open("a") as file:
                file.write(json.dumps(results[case]) + "\n")
            console.print(f"{' '.join(case)}: {results[case]}")
    print(sweep_table([results[case] for case in cases]))
    return 0


def sweep_case(size: str, trained: str, topology: str, stage: str) -> dict[str, Any]:
    """Compile a case and return the result as a JSON object."""
    variant = "-".join([size, *["lora"] * (trained == "lora"), stage])
    config = load_config(f"configs/qwen2_5_vl.py:{variant}")
    chip, devices = open_topology(topology)
    config[stage].batch_size = config[stage].accumulation = len(devices)  # one row per chip
    config = parse(config)
    case = {"case": [size, trained, topology, stage], "chips": len(devices), "libtpu": version("libtpu")}
    try:
        report = compile_train_step(config, stage, SWEEP_BUCKET, config_model(config), chip, devices)
    except DoesNotFit as error:
        return {**case, "fits": False, "wanted": str(error)}
    return {
        **case,
        "fits": report.spare >= SPARE,
        "spare": round(report.spare, 3),
        "gib": {kind: round(size / GIB, 2) for kind, size in report.memory.items()},
        "used_gib": round(report.used / GIB, 2),
        "tflop": round(report.flops / 1e12, 1),
        "least_ms": round(report.flops / report.chips / report.chip.flops * 1e3),
        "collectives": {call.kind: [call.count, round(call.bytes / GIB, 2)] for call in report.collectives}
        if report.collectives is not None
        else None,
        "compiled_s": round(report.seconds),
    }


def sweep_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        "| model | trained | stage | topology | weights | optimizer | teacher | temporaries | total, GiB per chip | "
        "spare | arithmetic at peak, ms | sent per chip, GiB | compile time, s |",
        "| --- | --- | --- | --- " + "| ---: " * 9 + "|",
    ]
    for line in lines:
        size, trained, topology, stage = line["case"]
        head = f"| {size.upper()} | {trained} | {stage} | {topology} "
        if "gib" not in line:
            rows.append(head + f"| does not fit: {line['wanted']} " + "| " * 8 + "|")
            continue
        memory = [f"{line['gib'][kind]:.2f}" for kind in ("weights", "optimizer", "teacher", "temporaries")]
        calls = line["collectives"]
        sent = "unknown" if calls is None else f"{sum(size for _, size in calls.values()):.0f}"
        figures = [*memory, f"{line['used_gib']:.2f}", f"{line['spare']:.0%}"]
        figures += [str(line["least_ms"]), sent, str(line["compiled_s"])]
        rows.append(head + "".join(f"| {figure} " for figure in figures) + "|")
    return "\n".join(rows)


def largest_bucket(config: RunConfig) -> str:
    """Return the name of the bucket with the most columns and vision tokens."""
    buckets = config_buckets(config, "latent")
    return max(buckets, key=lambda name: padded_tokens(buckets[name]))


def show(report: Report, topology: str, console: Console) -> None:
    """Print the memory, arithmetic and communication of a program."""
    table = Table("memory per chip", "GiB", title=f"{report.name} on {topology}", title_justify="left")
    for kind, size in report.memory.items():
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"of {report.chip.memory / GIB:.0f} GiB", f"{report.used / GIB:.2f}")
    console.print(table)
    sent = "; ".join(f"{call.count} {call.kind}, {call.bytes / GIB:.3g} GiB" for call in report.collectives or ())
    if report.collectives is None:
        sent = "unknown, since this jaxlib cannot read the program that libtpu compiled"
    at_peak = report.flops / report.chips / report.chip.flops
    at_bandwidth = report.traffic / report.chip.bandwidth
    moved = "weights, optimizer and cache read and written"
    if report.reads is not None:
        moved = f"the program reads {report.reads / GIB:.2f} GiB per chip; weights and cache in use"
    console.print(
        f"{'fits' if report.spare >= SPARE else 'too tight'}: {report.spare:.0%} to spare\n"
        f"model arithmetic {report.flops / 1e12:.2f} TFLOP, {at_peak * 1e3:.2f} ms on {report.chips} chips; "
        f"{moved} {report.traffic / GIB:.2f} GiB per chip, {at_bandwidth * 1e3:.2f} ms\n"
        f"communication per chip: {sent or 'none'}; calls of attention kernels: {report.kernels}\n"
        f"compiled in {report.seconds:.0f} s; not run"
    )


def advice(config: RunConfig, stage: str) -> str:
    """Return what to change, in order of effect."""
    if stage == "decoding":
        return "use more chips, divide weights further (mesh.fsdp, mesh.tensor) or lower eval.batch_size"
    ways = ["use more chips"]
    if config.mesh.fsdp == 1 and config.mesh.tensor == 1:
        ways = ["divide parameters over the mesh (mesh.fsdp=-1, mesh.data=1)"]
    if config.model.remat_policy != "full":
        ways.append("set model.remat_policy=full")
    if not config.model.lora.rank:
        ways.append("train adapters (model.lora.rank)")
    ways.append(f"give each chip fewer rows at a time ({stage}.batch_size, {stage}.accumulation) or smaller buckets")
    return "; or ".join(ways)


if __name__ == "__main__":
    sys.exit(main())
