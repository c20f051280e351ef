"""Latency and throughput of decoding methods (slots, pictures, no looks, one look), with lower bounds.

python -m benchmarks.latency [--model=3b] [--layers=4] [--quick] [--cases base ...] [--repeats=3] [--out=docs/latency]

Weights are random, in layers shaped like those of Qwen2.5-VL. With fewer layers than the model has, the blocks of the
vision tower and the vocabulary are reduced in proportion, so that their shares of the time stay the same; blocks are
rounded down, so that the cost of pictures is not overestimated. Every method writes the same number of text tokens and
has looks at the same places. With --out a run resumes where an earlier one stopped.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from benchmarks.latency_cases import (
    CASES,
    FIRST_WORD,
    FOUR_METHODS,
    GRIDS,
    METHODS,
    QUESTION,
    QUICK,
    SPECIAL,
    Case,
    Trace,
    forced_tokens,
    trace,
)
from benchmarks.latency_report import NOTES, draw, show, show_seconds, write_markdown
from benchmarks.machine import Parser, device_line, measure_peaks, positive, refuse
from ilvr_jax.analysis.flops import Cost, Peaks, decoder_cost, published_description, vision_cost
from ilvr_jax.config.schema import SamplingParams
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Request, RequestOutput
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.method.layout import Sample, build_sample
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.images import MERGE, STILL_PATCH_DIM, PatchedImage
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL

MODELS = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
LAYERS_ON_CPU = 4
VOCABULARY_STEP = 64
LONG_ENOUGH = 20.0  # seconds; a longer answer is not repeated


def least(config: ModelConfig, case: Case, method: str, peaks: Peaks) -> dict[str, float]:
    """Return a lower bound of the seconds of each figure, for the whole batch."""
    size = jnp.dtype(config.dtype).itemsize
    steps = trace(case, method)

    def seconds(cost: Cost) -> float:
        return peaks.seconds(cost.flops, size * cost.reads)

    def step(columns: int) -> float:
        return seconds(decoder_cost(config, columns - 1, 1, case.batch, case.prompt if case.shared else 0))

    def picture(start: int, count: int, rows: int) -> float:
        return seconds(vision_cost(config, case.vision_tokens, rows) + decoder_cost(config, start, count, rows))

    prompts = picture(0, case.prompt, 1 if case.shared else case.batch)
    text = [step(columns) for columns in steps.text]
    looks = [step(columns) for columns in steps.slots]
    looks += [picture(start, case.vision_tokens + 4, case.batch) for start in steps.pictures]
    return figures(prompts, sum(text), sum(looks), steps, method, case)


def figures(prompts: float, text: float, looks: float, steps: Trace, method: str, case: Case) -> dict[str, float]:
    """Return the seconds to all first tokens, per look, per text token and in total, from the seconds of each part."""
    count = {"latent": case.looks, "pixels": case.looks, "single": 1, "text": 0}[method]
    seconds = {"first_token": prompts, "text_token": text / len(steps.text), "answer": prompts + text + looks}
    return seconds | {"text": text, "looks": looks} | ({"look": looks / count} if count else {})


def scaled_config(model: str, layers: int | None, dtype: str) -> ModelConfig:
    """Return the shape of a published model with `layers` layers, its vision tower and vocabulary in proportion."""
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
    """Return a description of how the shape was reduced, and of the effect on the comparison."""
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
    """Return random parameters in the model's dtype, with which no answer ends early."""

    @jax.jit
    def make() -> PyTree:
        params = model.init(jax.random.key(0))
        head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
        params["decoder"][head] = params["decoder"][head].at[SPECIAL.im_end].set(0.0)  # other logits are above 0
        return jax.tree.map(lambda leaf: leaf.astype(model.config.dtype), params)

    return jax.block_until_ready(make())


class Pictures:
    """Maker of random still images of one size, all different."""

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
    """Return the requests of a case, with new images."""
    prompts = [make_prompt(pictures(), seed) for seed in range(1 if case.shared else case.batch)]
    tokens = forced_tokens(case, method)
    forced = () if method == "single" else tokens  # "single" has a look first, and then what the model writes
    return [
        Request(
            prompts[number % len(prompts)],
            SamplingParams(max_new_tokens=len(tokens)),
            case.slots,
            method=method,
            draw_look=pictures if method == "pixels" else None,
            forced_tokens=forced,
        )
        for number in range(case.batch)
    ]


def check_answer(answer: RequestOutput, case: Case, method: str) -> None:
    """Raise RuntimeError if an answer does not have the tokens and looks of the case."""
    looks = {"latent": case.looks, "pixels": case.looks, "single": 1, "text": 0}[method]
    written = len(answer.tokens), len(answer.looks), answer.stop_reason
    if written != (len(forced_tokens(case, method)), looks, "length"):
        raise RuntimeError(f"{case.name}, {method}: wrote (tokens, looks, reason) {written}; {answer.error}")


def measure(model: Qwen2_5VL, params: PyTree, case: Case, method: str, repeats: int) -> dict[str, object]:
    """Serve a case's requests several times, and return the medians, in seconds for the whole batch."""
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
        prompts = max(answer.timings.first_token for answer in answers)  # prompts and pictures are prefilled together
        pictures_shown = max(answer.timings.pictures for answer in answers)
        per_step = (seconds - prompts - pictures_shown) / steps.steps
        text, looks = per_step * len(steps.text), per_step * len(steps.slots) + pictures_shown
        runs.append(figures(prompts, text, looks, steps, method, case))
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**middle, "runs": runs, "warm_up": warm_up, "columns": settings.columns}


def open_results(path: Path | None, settings: dict, make_peaks: Callable[[], Peaks]) -> dict:
    """Return an earlier run's results to resume from, or empty ones; ends the program if their settings differ."""
    if path is None or not path.exists():
        return {"settings": settings, "peaks": dataclasses.asdict(make_peaks()), "cases": {}, "results": {}}
    try:
        saved = json.loads(path.read_text())
        same = saved["settings"] == settings
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        refuse(f"--out must be a new file or one of the same machine, model and repeats, got {path}")
    return saved


def save(path: Path, saved: dict) -> None:
    """Write the raw results; a run that stops meanwhile leaves the earlier ones."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(saved, indent=1) + "\n")
    os.replace(partial, path)


def read_flags() -> argparse.Namespace:
    """Read the flags; a bad value ends the program with a message."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="3b")
    parser.add_argument("--layers", type=positive, help=f"of the decoder (default: all, on a CPU {LAYERS_ON_CPU})")
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(QUICK)}")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--repeats", type=positive, default=3, help=f"1 where one takes over {LONG_ENOUGH:.0f} s")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.md, PATH.json and PATH.png")
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
    """Measure case by case, saving after each method, and print and write tables and a picture."""
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
    saved = open_results(raw, settings, lambda: measure_peaks(dtype))
    results, peaks = saved["results"], Peaks(**saved["peaks"])
    if raw:
        raw.parent.mkdir(parents=True, exist_ok=True)
        save(raw, saved)
    measured_peaks = (
        f"Measured peaks: {peaks.flops / 1e9:,.0f} GFLOP/s in {dtype} products, {peaks.bandwidth / 1e9:.1f} GB/s."
    )
    console.print(f"{settings['model']} {measured_peaks}", highlight=False)
    model = Qwen2_5VL(config)
    params = random_params(model)
    cases = [case for case in CASES if case.name in arguments.cases]
    for number, case in enumerate(cases):
        if saved["cases"].get(case.name) != dataclasses.asdict(case):
            saved["cases"][case.name], results[case.name] = dataclasses.asdict(case), {}
        for method in METHODS if case.name in FOUR_METHODS else METHODS[:2]:
            if method in results[case.name]:
                continue
            measured = measure(model, params, case, method, arguments.repeats)
            results[case.name][method] = {"measured": measured, "least": least(config, case, method, peaks)}
            if raw:
                save(raw, saved)
            console.print(
                f"case {number + 1} of {len(cases)}, {case.name}, {method}: {show_seconds(measured['answer'])}, lower "
                f"bound {show_seconds(results[case.name][method]['least']['answer'])}; compiled and warmed up in "
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
