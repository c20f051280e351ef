"""Evaluation on maps: batched decoding, answers played on their maps, and a baseline to compare their success with."""

import dataclasses
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, PyTree
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast

from ilvr_jax.config.schema import RunConfig
from ilvr_jax.data.examples import ExampleSettings, build_prompt
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import MapDesc, Record
from ilvr_jax.data.sources import prompt_settings
from ilvr_jax.errors import InputError
from ilvr_jax.files import read_object, read_text, write_json, written
from ilvr_jax.inference.decode import Decoded, DecodeSettings, generate
from ilvr_jax.inference.transcript import show_text, split_at_looks
from ilvr_jax.method.layout import Batch, Sample, collate, merge_layouts, required_layout
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import ImageGeometry
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import divisor, fill_rows, place_rows
from ilvr_jax.tasks.vsp_planning import (
    Outcome,
    Rates,
    check,
    hole_blind_rates,
    hole_blind_success,
    mean_success,
    paint_holes_over,
    parse_moves,
    play,
    stated_moves,
)

SMALLEST_BUCKET = 64  # tokens; prompts up to this length share one layout


@dataclasses.dataclass(frozen=True)
class MapAnswer:
    """The answer to one map and its outcome when played.

    `text` has a mark such as ‹8 slots› for each look; `moves_before_looks` are the moves written before each look.
    """

    name: str
    map_desc: MapDesc
    text: str
    moves: str | None  # letters of UDLR; None if no moves could be read
    moves_without_holes: str | None  # the answer to the same map with its holes painted over
    outcome: Outcome
    slots: tuple[int, ...]  # of each look
    moves_before_looks: tuple[str, ...]

    @property
    def success(self) -> bool:
        return self.outcome == Outcome.GOAL

    @property
    def level(self) -> int:
        return len(self.map_desc)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The answers to all records of a source."""

    answers: tuple[MapAnswer, ...]
    seconds: float  # with compilation, and with the second decoding with holes painted over

    @property
    def success(self) -> Rates:
        return mean_success([answer.map_desc for answer in self.answers], [answer.success for answer in self.answers])

    @property
    def hole_blind(self) -> Rates:
        return hole_blind_rates([answer.map_desc for answer in self.answers])

    @property
    def unchanged_when_holes_painted_over(self) -> float | None:
        """The share of equal moves on the map and on the same map without holes, among readable answers."""
        readable = [answer for answer in self.answers if answer.moves is not None]
        return (
            sum(answer.moves == answer.moves_without_holes for answer in readable) / len(readable) if readable else None
        )

    def summary(self) -> dict[str, Any]:
        """Return the figures as a JSON object; rates are from 0 to 1, None for a group without maps."""
        success, hole_blind = self.success, self.hole_blind
        return {
            "samples": len(self.answers),
            "success_rate": success.overall,
            "success_by_level": {str(level): rate for level, rate in success.by_level.items()},
            "success_where_holes_matter": success.where_holes_matter,
            "success_on_detours": success.on_detours,
            "hole_blind_rate": hole_blind.overall,
            "hole_blind_by_level": {str(level): rate for level, rate in hole_blind.by_level.items()},
            "hole_blind_where_holes_matter": hole_blind.where_holes_matter,
            "hole_blind_on_detours": hole_blind.on_detours,
            "unchanged_when_holes_painted_over": self.unchanged_when_holes_painted_over,
            "unparsed": sum(answer.moves is None for answer in self.answers),
            "latent_segments": sum(len(answer.slots) for answer in self.answers),
            "latent_slots": sum(sum(answer.slots) for answer in self.answers),
            "seconds": round(self.seconds, 2),
        }

    def write(self, path: Path) -> None:
        """Write the answers to `samples_path(path)`, then the summary to `path`, each whole or not at all."""
        with written(samples_path(path)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for answer in self.answers:
                blind = hole_blind_success(answer.map_desc)
                derived = {"level": answer.level, "success": answer.success, "hole_blind_success": blind}
                groups = {"holes_matter": blind < 1, "detour": blind == 0}
                line = dataclasses.asdict(answer) | derived | groups
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        write_json(path, self.summary())


def samples_path(path: Path) -> Path:
    """Return the path of the answers of an evaluation whose summary is at `path`."""
    return path.with_suffix(".samples.jsonl")


def read_answers(path: Path) -> tuple[MapAnswer, ...]:
    """Return the answers of an evaluation whose summary is at `path`; raise InputError, naming the file's line."""
    path = samples_path(path)
    answers = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            answers.append(_read_answer(json.loads(line)))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"{path} line {number} must be an answer, but cannot be read ({error})") from error
    return tuple(answers)


def read_evaluation(path: Path, source: Source) -> dict[str, Any] | None:
    """Return the summary of an evaluation at `path`, None if it is missing, damaged or of other records."""
    try:
        summary, answers = read_object(path), read_answers(path)
    except InputError:
        return None
    if len(answers) != len(source) or summary != Evaluation(answers, summary.get("seconds", 0)).summary():
        return None
    return summary


def _read_answer(fields: dict[str, Any]) -> MapAnswer:
    values = {field.name: fields[field.name] for field in dataclasses.fields(MapAnswer)}
    values["map_desc"] = tuple(map(tuple, values["map_desc"]))
    values["outcome"] = Outcome(values["outcome"])
    return MapAnswer(**values | {name: tuple(values[name]) for name in ("slots", "moves_before_looks")})


def evaluate(
    config: RunConfig,
    source: Source,
    model: Qwen2_5VL,
    params: PyTree,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
    console: Console | None = None,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Answer every record of a source with the settings of the config; with a mesh, batches are sharded over it.

    Raises ValueError as `prompt_settings` and `decode_settings` do, BadRecord as `evaluate_maps` does.
    """
    decoding = decode_settings(config)

    def decode(batch: Batch, seeds: Int[np.ndarray, " rows"]) -> Decoded:
        if mesh is not None:
            batch, seeds = place_rows(fill_rows((batch, seeds), divisor("rows", mesh)), mesh)
        decoded = generate(model, params, batch, seeds, decoding, special)
        return decoded if jax.process_count() == 1 else multihost_utils.process_allgather(decoded, tiled=True)

    return evaluate_maps(
        source,
        decode,
        tokenizer,
        special,
        prompt_settings(config, model.geometry),
        model.geometry,
        config.eval.batch_size,
        config.seed,
        console,
    )


def decode_settings(config: RunConfig) -> DecodeSettings:
    """Return the settings of decoding from the config's `eval` and `latents`; raise ValueError for a bad value."""
    return DecodeSettings(
        max_new_tokens=config.eval.max_new_tokens,
        latent_size=config.latents.latent_size,
        temperature=config.eval.temperature,
        top_k=config.eval.top_k,
        top_p=config.eval.top_p,
        early_end=config.eval.early_end,
    )


def evaluate_maps(
    source: Source,
    decode: Callable[[Batch, Int[np.ndarray, " rows"]], Decoded],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
    settings: ExampleSettings,
    geometry: ImageGeometry,
    batch_size: int,
    seed: int = 0,
    console: Console | None = None,
) -> Evaluation:
    """Answer every record of a source, once as it is and once with its holes painted over, and play the moves.

    `decode(batch, seeds)` decodes a batch of prompts. A record's seed depends only on `seed` and its number, and is the
    same both times. With a console, progress is shown on it.

    Raises BadRecord, naming the record, if it has no map or not exactly one image, or an image cannot be read.
    """
    started = time.monotonic()
    records = [source[number] for number in range(len(source))]
    for record in records:
        check(record)
    build = functools.partial(build_prompt, tokenizer=tokenizer, special=special, settings=settings)
    samples = [build(record, number=number) for number, record in enumerate(records)]
    samples += [build(paint_holes_over(record), number=number) for number, record in enumerate(records)]
    tokens: dict[int, Int[np.ndarray, " time"]] = {}
    batches = list(prompt_batches(samples, batch_size, special, geometry))
    silent = console is None or not console.is_terminal
    for members, batch in track(batches, "evaluating", console=console, disable=silent, transient=True):
        seeds = np.array([_seed(seed, number) for number in batch.record], np.uint32)
        decoded = decode(batch, seeds)
        # Rows past the members repeat the last one to fill the batch; zip drops them.
        for member, row, length in zip(members, *map(np.asarray, decoded), strict=False):
            tokens[member] = row[:length]
    answers = tuple(
        read_answer(record, tokens[number], tokens[len(records) + number], tokenizer, special)
        for number, record in enumerate(records)
    )
    return Evaluation(answers, time.monotonic() - started)


def prompt_batches(
    samples: Sequence[Sample], batch_size: int, special: SpecialTokens, geometry: ImageGeometry
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of prompts, each with the indices of the samples in its rows.

    Prompts whose lengths round up to the same power of two share a layout, so that few are compiled. They are sorted by
    length, since answers to maps of one level are about equally long and a batch decodes until its longest answer ends.
    Batches of a layout have the same number of rows; surplus rows repeat the last sample.
    """
    buckets = defaultdict(list)
    for index, sample in enumerate(samples):
        buckets[max(SMALLEST_BUCKET, 1 << (len(sample.tokens) - 1).bit_length())].append(index)
    for _, members in sorted(buckets.items()):
        members.sort(key=lambda index: len(samples[index].tokens))
        layout = merge_layouts([required_layout(samples[index], geometry) for index in members])
        rows = min(batch_size, len(members))
        for first in range(0, len(members), rows):
            batch = members[first : first + rows]
            filled = [samples[index] for index in batch + batch[-1:] * (rows - len(batch))]
            yield batch, collate(filled, layout, special, geometry)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, int(number))).generate_state(1)[0])


def read_answer(
    record: Record,
    tokens: Int[np.ndarray, " time"],
    tokens_without_holes: Int[np.ndarray, " time"],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
) -> MapAnswer:
    """Return the answer in the tokens decoded for a record, with its holes and without, and its outcome."""
    texts, slots = split_at_looks(tokens, tokenizer, special)
    moves = parse_moves("".join(texts))
    return MapAnswer(
        name=record.name,
        map_desc=record.map_desc,
        text=show_text(texts, [f"‹{count} slots›" for count in slots]),
        moves=moves,
        moves_without_holes=parse_moves("".join(split_at_looks(tokens_without_holes, tokenizer, special)[0])),
        outcome=play(record.map_desc, moves),
        slots=slots,
        moves_before_looks=tuple(stated_moves("".join(texts[: look + 1])) for look in range(len(slots))),
    )
