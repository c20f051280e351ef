"""Latency and throughput of the ways to look (slots, pictures, no looks, one look), beside the least they could take.

python -m benchmarks.latency [--model=3b] [--layers=4] [--quick] [--cases base ...] [--repeats=3] [--out=docs/latency]

Weights are random, in layers shaped like those of Qwen2.5-VL. With fewer layers than the model has, the blocks of the
vision tower and the vocabulary are fewer in proportion, so that what they take keeps its ratio; blocks are rounded
down, so that pictures are not made to cost more than they do. Every method writes the same number of text tokens and
looks at the same places. With --out a run goes on where an earlier one was stopped.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Parser, device_line, measure_peaks, positive, refuse
from ilvr_jax.analysis.flops import Cost, Peaks, decoder_cost, published_description, vision_cost
from ilvr_jax.inference.engine import Answer, Engine, Request, fit_settings
from ilvr_jax.method.layout import Sample, build_sample
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.images import MERGE, STILL_PATCH_DIM, PatchedImage
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL

MODELS = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
METHODS = ("latent", "pixels", "text", "single")
FIRST_WORD = 10  # the ids before it are those of special tokens
SPECIAL = SpecialTokens(*range(FIRST_WORD))
QUESTION = 32  # words of a prompt beside its image
LAYERS_ON_CPU = 4
VOCABULARY_STEP = 64
LONG_ENOUGH = 20.0  # seconds after which an answer is not repeated
GRIDS = {64: (8, 8), 256: (16, 16), 512: (16, 32), 1024: (32, 32), 2048: (32, 64)}  # of vision tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked for."""

    name: str
    vision_tokens: int = 1024  # of the prompt's image and of each picture, one of GRIDS
    looks: int = 4
    slots: int = 8  # K
    batch: int = 1  # requests served at once
    text: int = 32  # tokens before, between and after the looks
    shared: bool = False  # whether all requests have the same prompt

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: image and question with their markers."""
        return self.vision_tokens + QUESTION + 6

    @property
    def shape(self) -> str:
        shared = ", one prompt" if self.shared else ""
        return f"{self.vision_tokens} / {self.looks} / {self.slots} / {self.text} / {self.batch}{shared}"


SHAPE = "vision tokens / looks / K / text / batch"
SMALL_GAIN = "long-text"
CASES = (
    Case("base"),
    *(Case(f"tokens-{count}", vision_tokens=count) for count in (256, 512, 2048)),
    *(Case(f"looks-{count}", looks=count) for count in (1, 8)),
    *(Case(f"slots-{count}", slots=count) for count in (4, 16)),
    Case(SMALL_GAIN, vision_tokens=64, looks=1, text=256),
    Case("shared-16", batch=16, shared=True),
    *(Case(f"batch-{count}", vision_tokens=256, batch=count) for count in (4, 16, 64)),
)
FOUR_METHODS = ("base", "tokens-256", "tokens-512", "tokens-2048")  # cases that all are measured in, others two
QUICK = ("tokens-256", "looks-1", SMALL_GAIN)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Where an answer's steps stand: columns that each sees, itself included, and those before each picture."""

    text: tuple[int, ...]
    slots: tuple[int, ...]
    pictures: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.text) + len(self.slots)


def forced_tokens(case: Case, method: str) -> tuple[int, ...]:
    """Return the tokens that an answer is made of, -1 for what the method decides."""
    text = (FIRST_WORD,) * case.text
    slots = (SPECIAL.latent_start, *(-1,) * (case.slots + 1))
    if method == "single":
        return slots + text * (case.looks + 1)
    look = {"latent": slots, "pixels": (SPECIAL.latent_start,), "text": ()}[method]
    return text + (look + text) * case.looks


def trace(case: Case, method: str) -> Trace:
    """Return the steps of an answer, of which the last token is written and not read."""
    length, text, slots, pictures = case.prompt, [], [], []
    for token in forced_tokens(case, method)[:-1]:
        if method == "pixels" and token == SPECIAL.latent_start:
            pictures.append(length)
            length += case.vision_tokens + 4
            continue
        length += 1
        (text if token == FIRST_WORD else slots).append(length)
    return Trace(tuple(text), tuple(slots), tuple(pictures))


def least(config: ModelConfig, case: Case, method: str, peaks: Peaks) -> dict[str, float]:
    """Return the least seconds for each figure that is measured, of the batch as a whole."""
    size = jnp.dtype(config.dtype).itemsize
    steps = trace(case, method)

    def seconds(cost: Cost) -> float:
        return peaks.seconds(cost.flops, size * cost.reads)

    def step(columns: int) -> float:
        return seconds(decoder_cost(config, columns - 1, 1, case.batch, case.prompt if case.shared else 0))

    def shown(start: int, count: int, rows: int) -> float:
        return seconds(vision_cost(config, case.vision_tokens, rows) + decoder_cost(config, start, count, rows))

    prompts = shown(0, case.prompt, 1 if case.shared else case.batch)
    text = [step(columns) for columns in steps.text]
    looks = [step(columns) for columns in steps.slots]
    looks += [shown(start, case.vision_tokens + 4, case.batch) for start in steps.pictures]
    return figures(prompts, sum(text), sum(looks), steps, method, case)


def figures(prompts: float, text: float, looks: float, steps: Trace, method: str, case: Case) -> dict[str, float]:
    """Return the seconds to all first tokens, of a look, of a text token and of the whole, from those of each part."""
    count = {"latent": case.looks, "pixels": case.looks, "single": 1, "text": 0}[method]
    found = {"first_token": prompts, "text_token": text / len(steps.text), "answer": prompts + text + looks}
    return found | {"text": text, "looks": looks} | ({"look": looks / count} if count else {})


def scaled_config(model: str, layers: int | None, dtype: str) -> ModelConfig:
    """Return the shape of a published model with so many layers, its vision tower and vocabulary in proportion."""
    full = model_config_from_hf(published_description(MODELS[model]), dtype=dtype)
    if not layers or layers == full.num_hidden_layers:
        return full
    share = layers / full.num_hidden_layers
    vision = full.vision
    depth = max(1, int(vision.depth * share))
    joined = int(len(vision.fullatt_block_indexes) * share)
    ends = tuple(depth * (block + 1) // joined - 1 for block in range(joined))
    return dataclasses.replace(
        full,
        num_hidden_layers=layers,
        vocab_size=round(full.vocab_size * share / VOCABULARY_STEP) * VOCABULARY_STEP,
        vision=dataclasses.replace(vision, depth=depth, fullatt_block_indexes=ends),
    )


def describe(config: ModelConfig, model: str) -> str:
    """Says how the model's shape was made smaller, and what that does to what is compared."""
    full = scaled_config(model, None, config.dtype)

    def share(config: ModelConfig) -> float:
        picture = decoder_cost(config, 1062, 1028, 1)
        return vision_cost(config, 1024, 1).flops / picture.flops

    return (
        f"Qwen2.5-VL {model.upper()}'s layer shapes with random {config.dtype} weights: {config.num_hidden_layers} of "
        f"{full.num_hidden_layers} decoder layers, {config.vision.depth} of {full.vision.depth} vision blocks, "
        f"{len(config.vision.fullatt_block_indexes)} of {len(full.vision.fullatt_block_indexes)} with full attention, "
        f"{config.vocab_size} of {full.vocab_size} tokens. To encode a picture of 1024 vision tokens takes "
        f"{share(config):.2f} times the arithmetic of its prefill; in the full model {share(full):.2f} times."
    )


def random_params(model: Qwen2_5VL) -> PyTree:
    """Return random parameters in the model's dtype, which never end an answer."""

    @jax.jit
    def make() -> PyTree:
        params = model.init(jax.random.key(0))
        head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
        params["decoder"][head] = params["decoder"][head].at[SPECIAL.im_end].set(0.0)  # others have logits above 0
        return jax.tree.map(lambda leaf: leaf.astype(model.config.dtype), params)

    return jax.block_until_ready(make())


class Pictures:
    """Random still images of one size, each one unlike those before."""

    def __init__(self, vision_tokens: int):
        self._rows, self._columns = GRIDS[vision_tokens]
        shape = (vision_tokens * MERGE**2, STILL_PATCH_DIM)
        self._pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self._made = 0

    def __call__(self, *_: object) -> PatchedImage:
        self._made += 1
        pixels = self._pixels.copy()
        pixels[0, :8] = np.frombuffer(self._made.to_bytes(8, "big"), np.uint8)
        return PatchedImage(pixels, self._rows * MERGE, self._columns * MERGE)


def make_prompt(image: PatchedImage, seed: int) -> Sample:
    """Return a prompt of one image and a question of random words."""
    words = np.random.default_rng(seed).integers(FIRST_WORD, 1000, QUESTION)
    pads = [SPECIAL.image_pad] * image.vision_tokens
    tokens = [SPECIAL.im_start, SPECIAL.vision_start, *pads, SPECIAL.vision_end, *words]
    tokens += [SPECIAL.im_end, SPECIAL.im_start, SPECIAL.assistant]
    return build_sample(np.array(tokens), [image], [], SPECIAL, 1)


def make_requests(case: Case, method: str, pictures: Pictures) -> list[Request]:
    """Return the requests of a case, with images that no earlier ones had."""
    prompts = [make_prompt(pictures(), seed) for seed in range(1 if case.shared else case.batch)]
    tokens = forced_tokens(case, method)
    given = () if method == "single" else tokens  # a look first, and then what the model writes
    return [
        Request(
            prompts[number % len(prompts)],
            max_new_tokens=len(tokens),
            latent_size=case.slots,
            method=method,
            draw_look=pictures if method == "pixels" else None,
            forced_tokens=given,
        )
        for number in range(case.batch)
    ]


def check_answer(answer: Answer, case: Case, method: str) -> None:
    """Raise RuntimeError if an answer is not what the case asks for."""
    looks = {"latent": case.looks, "pixels": case.looks, "single": 1, "text": 0}[method]
    written = len(answer.tokens), len(answer.looks), answer.stop_reason
    if written != (len(forced_tokens(case, method)), looks, "length"):
        raise RuntimeError(f"{case.name}, {method}: wrote (tokens, looks, reason) {written}; {answer.error}")


def measure(model: Qwen2_5VL, params: PyTree, case: Case, method: str, repeats: int) -> dict[str, object]:
    """Serve a case's requests several times and returns the medians, in seconds for the batch as a whole."""
    pictures = Pictures(case.vision_tokens)
    requests = make_requests(case, method, pictures)
    settings = fit_settings(requests, case.batch, model.geometry, pictures=case.looks, share_prefixes=case.shared)
    engine = Engine(model, params, SPECIAL, settings)
    start = time.perf_counter()
    engine.warm_up()
    warm_up = time.perf_counter() - start
    steps, runs = trace(case, method), []
    while len(runs) < repeats and not (runs and runs[-1]["answer"] > LONG_ENOUGH):
        requests = make_requests(case, method, pictures)
        start = time.perf_counter()
        answers = engine.answer(requests)
        seconds = time.perf_counter() - start
        for answer in answers:
            check_answer(answer, case, method)
        prompts = sum(answer.timings.first_token for answer in answers)
        shown = sum(answer.timings.pictures for answer in answers)
        a_step = (seconds - prompts - shown) / steps.steps
        text, looks = a_step * len(steps.text), a_step * len(steps.slots) + shown
        runs.append(figures(prompts, text, looks, steps, method, case))
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**middle, "runs": runs, "warm_up": warm_up, "columns": settings.columns}


def show_seconds(seconds: float) -> str:
    """Return a time with three digits that count."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


Grid = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def tables(results: dict, cases: Sequence[Case]) -> list[Grid]:
    """Return the tables of what was measured so far."""
    columns = ["case", SHAPE, "method", "first token", "a look", "a text token", "whole answer", "answers/s"]
    times, ratios = [], []
    for case in cases:
        found = results.get(case.name, {})
        for method in (method for method in METHODS if method in found):
            measured, floor = found[method]["measured"], found[method]["least"]
            cells = [
                f"{show_seconds(measured[name])} ({show_seconds(floor[name])})" if name in measured else ""
                for name in ("first_token", "look", "text_token", "answer")
            ]
            times.append([case.name, case.shape, method, *cells, f"{case.batch / measured['answer']:.3g}"])
        if {"latent", "pixels"} <= found.keys():
            pairs = [(found["pixels"][kind], found["latent"][kind]) for kind in ("measured", "least")]
            shown = [f"{pixels[name] / latent[name]:.2f}" for name in ("look", "answer") for pixels, latent in pairs]
            ratios.append([case.name, case.shape, *shown])
    compared = ["a look", "a look, least", "whole answer", "whole answer, least"]
    return [
        ("time, and in brackets the least it could take", columns, times),
        ("pixels / latent", ["case", SHAPE, *compared], ratios),
    ]


NOTES = (
    "Times are those of the whole batch: until every request has its first token (prompts are prefilled one after "
    "another), for one look of every request, for one text token of each. A look is K slots and two markers, or a "
    "picture that is encoded and prefilled.",
    "The least time is the larger of arithmetic over the measured peak and bytes (weights, and keys and values that "
    "are there) over the measured bandwidth; activations are not counted.",
)


def show(console: Console, results: dict, cases: Sequence[Case], lines: Sequence[str]) -> None:
    """Print the tables and what they were measured with."""
    for title, columns, rows in tables(results, cases):
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in lines:
        console.print(line, highlight=False)


def write_markdown(path: Path, results: dict, cases: Sequence[Case], lines: Sequence[str], command: str) -> None:
    """Write the tables as a page."""
    parts = ["# Latency: slots against pictures", f"![ratios and parts]({path.stem}.png)", *lines]
    for title, columns, rows in tables(results, cases):
        body = [columns, ["---"] * len(columns), *rows]
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join(f"| {' | '.join(row)} |" for row in body)]
    path.write_text("\n\n".join([*parts, f"Made with `{command}`."]) + "\n")


LATENT, PIXELS = "#173a8c", "#d0202e"
PARTS = (("first_token", "prompt", "#9aa5b1"), ("text", "text", "#f2b134"), ("looks", "looks", "#3f88c5"))
DRAWN = ("tokens-2048", "base", "tokens-256", "looks-1", SMALL_GAIN)


def draw(path: Path, results: dict, cases: Sequence[Case], caption: str) -> None:
    """Draw the ratios against the vision tokens of a picture, and where the time of answers goes."""
    both = [case for case in cases if {"latent", "pixels"} <= results.get(case.name, {}).keys()]
    figure = Figure(figsize=(15, 6.4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_ratios(left, results, both)
    by_name = {case.name: case for case in both}
    _draw_parts(right, results, [by_name[name] for name in DRAWN if name in by_name])
    figure.text(0.5, 0.015, caption, ha="center", fontsize=7.5, color="#555555")
    figure.subplots_adjust(left=0.06, right=0.985, top=0.92, bottom=0.17, wspace=0.42)
    figure.savefig(path, format="png")


def _draw_ratios(panel: Axes, results: dict, cases: Sequence[Case]) -> None:
    base = Case("base")
    line = [case for case in cases if dataclasses.replace(case, name="base", vision_tokens=1024) == base]
    line.sort(key=lambda case: case.vision_tokens)
    others = [case for case in cases if case not in line and case.batch == 1 and case.slots == base.slots]

    def ratio(case: Case, name: str) -> float:
        found = results[case.name]
        return found["pixels"]["measured"][name] / found["latent"]["measured"][name]

    for name, label, colour in (("look", "a look", PIXELS), ("answer", "a whole answer", LATENT)):
        sizes = [case.vision_tokens for case in line]
        ratios = [ratio(case, name) for case in line]
        panel.plot(sizes, ratios, "o-", color=colour, label=f"{label}, {base.looks} looks")
        # What a look costs hardly depends on how many there are: it is drawn once for each size.
        apart = others if name == "answer" else [case for case in others if case.vision_tokens not in sizes]
        places = [(case.vision_tokens, ratio(case, name)) for case in apart]
        panel.plot(*zip(*places, strict=True) if places else ((), ()), "D", color=colour, mfc="white")
        for case, place in zip(apart, places, strict=True):
            text = f"{case.looks} look{'s' * (case.looks > 1)}, {case.text} a text"
            style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            aside, side = ((-7, 4), "right") if case.looks > base.looks else ((7, -9), "left")
            panel.annotate(text, place, aside, ha=side, **style)
    panel.axhline(1, color="#777777", lw=1, ls="--")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(GRIDS), [str(size) for size in GRIDS])
    panel.set_xlim(min(GRIDS) / 1.3, max(GRIDS) * 1.6)
    low, high = min(panel.get_ylim()[0], 0.45), max(panel.get_ylim()[1], 5.5)
    panel.set_ylim(low, high)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.set_xlabel("vision tokens of a picture")
    panel.set_title(f"time with pictures over time with slots (K {base.slots}, one request)", fontsize=12)
    panel.legend(fontsize=8, loc="upper left")


def _draw_parts(panel: Axes, results: dict, cases: Sequence[Case]) -> None:
    names = []
    for number, case in enumerate(cases):
        whole = results[case.name]["pixels"]["measured"]["answer"]
        for line, method in enumerate(("pixels", "latent")):
            measured, start = results[case.name][method]["measured"], 0.0
            height = 3 * number + line
            names.append((height, method))
            for name, label, colour in PARTS:
                width = measured[name] / whole * 100
                panel.barh(height, width, 0.85, start, color=colour, label=label if not number + line else None)
                start += width
            panel.text(start + 1, height, show_seconds(measured["answer"]), va="center", fontsize=9)
        looks = f"{case.looks} look{'s' * (case.looks > 1)}"
        title = f"{case.vision_tokens} vision tokens, {looks}, {case.text} tokens a text"
        panel.text(0, 3 * number - 0.78, title, va="center", fontsize=9, weight="bold")
    panel.set_yticks([height for height, _ in names], [name for _, name in names])
    panel.set_ylim(3 * len(cases) - 1, -1.4)
    panel.set_xlim(0, 118)
    panel.set_xlabel("% of the answer with pictures")
    panel.set_title("where an answer's time goes", fontsize=12)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, -0.09), ncols=3, frameon=False)


def open_results(path: Path | None, settings: dict, make_peaks: Callable[[], Peaks]) -> dict:
    """Return an earlier run's results to go on with, or empty ones. Ends the program if they are of something else."""
    if path is None or not path.exists():
        return {"settings": settings, "peaks": dataclasses.asdict(make_peaks()), "cases": {}, "results": {}}
    try:
        kept = json.loads(path.read_text())
        same = kept["settings"] == settings
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        refuse(f"--out must be a new file or one of the same machine, model and repeats, got {path}")
    return kept


def save(path: Path, kept: dict) -> None:
    """Write the raw results; a run stopped meanwhile leaves the former ones."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(partial, path)


def read_flags() -> argparse.Namespace:
    """Return the flags; a bad value ends the program with a sentence."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="3b")
    parser.add_argument("--layers", type=positive, help=f"of the decoder; all, on a CPU {LAYERS_ON_CPU}")
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(QUICK)}")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--repeats", type=positive, default=3, help=f"1 where one takes over {LONG_ENOUGH:.0f} s")
    parser.add_argument("--out", type=Path, metavar="PATH", help="writes PATH.md, PATH.json and PATH.png")
    arguments = parser.parse_args()
    known = [case.name for case in CASES]
    arguments.cases = arguments.cases or (list(QUICK) if arguments.quick else known)
    if unknown := [name for name in arguments.cases if name not in known]:
        refuse(f"--cases must be some of {', '.join(known)}, got {unknown[0]!r}")
    full = scaled_config(arguments.model, None, "float32").num_hidden_layers
    if arguments.layers is None:
        arguments.layers = LAYERS_ON_CPU if jax.default_backend() == "cpu" else full
    if arguments.layers > full:
        refuse(f"--layers must be from 1 to {full}, got {arguments.layers}")
    return arguments


def main() -> None:
    """Measure case by case, keeps what it has after each method, and prints and writes tables and a picture."""
    arguments = read_flags()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = scaled_config(arguments.model, arguments.layers, dtype)
    settings = {
        "machine": device_line(["jax", "jaxlib", "numpy"]),
        "model": describe(config, arguments.model),
        "repeats": arguments.repeats,
    }
    console, began = Console(width=170), time.monotonic()
    raw = arguments.out and arguments.out.with_name(arguments.out.name + ".json")
    kept = open_results(raw, settings, lambda: measure_peaks(dtype))
    results, peaks = kept["results"], Peaks(**kept["peaks"])
    if raw:
        raw.parent.mkdir(parents=True, exist_ok=True)
        save(raw, kept)
    measured_peaks = (
        f"Measured peaks: {peaks.flops / 1e9:,.0f} GFLOP/s in {dtype} products, {peaks.bandwidth / 1e9:.1f} GB/s."
    )
    console.print(f"{settings['model']} {measured_peaks}", highlight=False)
    model = Qwen2_5VL(config)
    params = random_params(model)
    cases = [case for case in CASES if case.name in arguments.cases]
    for number, case in enumerate(cases):
        if kept["cases"].get(case.name) != dataclasses.asdict(case):
            kept["cases"][case.name], results[case.name] = dataclasses.asdict(case), {}
        for method in METHODS if case.name in FOUR_METHODS else METHODS[:2]:
            if method in results[case.name]:
                continue
            measured = measure(model, params, case, method, arguments.repeats)
            results[case.name][method] = {"measured": measured, "least": least(config, case, method, peaks)}
            if raw:
                save(raw, kept)
            console.print(
                f"case {number + 1} of {len(cases)}, {case.name}, {method}: {show_seconds(measured['answer'])}, least "
                f"{show_seconds(results[case.name][method]['least']['answer'])}; compiled and warmed up in "
                f"{show_seconds(measured['warm_up'])}; {(time.monotonic() - began) / 60:.1f} minutes since the start",
                highlight=False,
            )
    shown = [case for case in CASES if case.name in results]
    lines = [*NOTES, settings["model"], measured_peaks, settings["machine"]]
    show(console, results, shown, lines)
    if arguments.out:
        page, picture = (arguments.out.with_name(f"{arguments.out.name}.{kind}") for kind in ("md", "png"))
        command = f"python -m benchmarks.latency {' '.join(sys.argv[1:])}"
        write_markdown(page, results, shown, lines, command)
        draw(picture, results, shown, f"{settings['model']}\n{settings['machine']}")


if __name__ == "__main__":
    main()
