"""A survey of a data set, record by record: its sizes, the records to skip and why, and the buckets it needs."""

import dataclasses
import functools
import itertools
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from ilvr_jax.data.images import PATCH
from ilvr_jax.data.pipeline import Source, find_bucket, stream
from ilvr_jax.data.records import BadRecord, Record, Text
from ilvr_jax.method.layout import Layout, Sample, merge_layouts, padded_tokens, required_layout
from ilvr_jax.method.tokens import Role
from ilvr_jax.models.base import ImageGeometry

QUOTED = 3  # sentences of each reason
MOST_REASONS = 1000  # that are counted separately
MOST_BUCKETS = 4
CANDIDATES = 16  # layouts that are merged at a time; finding the best pair takes the square of it
SPARED_BUCKET = 0.02  # two buckets are merged if padding grows by no more than this share of all tokens


class View(NamedTuple):
    """The making of samples for the stages that treat helper images alike."""

    stages: str
    helper_images: str  # as in ExampleSettings; empty: prompts alone, for decoding
    to_sample: Callable[..., Sample]
    buckets: Mapping[str, Layout]  # in the order in which they are tried; empty: none needed


class Measured(NamedTuple):
    """The measurements of a record under a view; without a sample, the problem alone."""

    problem: str = ""
    need: Layout | None = None
    tokens: int = 0  # in columns and vision tokens, as padded_tokens counts them
    bucket: str = ""
    counts: Mapping[str, int] = {}  # by quantity
    images: Sequence[tuple[int, int, bool]] = ()  # width and height in pixels, and whether it is a helper image


def measurements(
    source: Source, views: Sequence[View], geometry: ImageGeometry, count: int, workers: int
) -> grain.DatasetIterator[tuple[Measured, ...]]:
    """Return the measurements of the first `count` records under each view, made in `workers` processes or here."""
    work = functools.partial(_measure_record, source=source, views=tuple(views), geometry=geometry)
    return stream(grain.MapDataset.range(count).map(work), workers)


def _measure_record(
    number: int, source: Source, views: Sequence[View], geometry: ImageGeometry
) -> tuple[Measured, ...]:
    try:
        record = source[number]
    except BadRecord as error:
        return (Measured(str(error)),) * len(views)
    return tuple(_measure(record, number, view, geometry) for view in views)


def _measure(record: Record, number: int, view: View, geometry: ImageGeometry) -> Measured:
    try:
        sample = view.to_sample(record, number=number)
    except BadRecord as error:
        return Measured(str(error))
    bucket = problem = ""
    if view.buckets:
        try:
            bucket = list(view.buckets)[find_bucket(sample, record.name, list(view.buckets.values()), geometry)]
        except BadRecord as error:
            problem = str(error)
    images = [(image, position >= len(record.images)) for position, image in enumerate(sample.images)]
    images += [(image, True) for image in sample.helper_images]
    return Measured(
        problem,
        required_layout(sample, geometry),
        len(sample.tokens) + sum(image.vision_tokens for image, _ in images),
        bucket,
        _counts(record, sample, bool(view.helper_images)),
        [(image.width * PATCH, image.height * PATCH, helper) for image, helper in images],
    )


def _counts(record: Record, sample: Sample, answered: bool) -> dict[str, int]:
    # The header `<|im_start|>assistant` ends the prompt: the tokens after it carry loss.
    end = int(np.argmax(sample.roles == Role.ANSWER)) + 2 if answered else len(sample.tokens)
    counts = {
        "user images": len(record.images),
        "helper images": sum(not isinstance(step, Text) for step in record.steps),
        "latent segments": len(sample.slot_starts),
    }
    for kind, roles in (("text", (Role.PROMPT, Role.ANSWER)), ("vision", (Role.IMAGE,))):
        mask = np.isin(sample.roles, roles)
        for part, section in (("prompt", mask[:end]), ("answer", mask[end:]), ("total", mask)):
            counts[f"{kind} tokens, {part}"] = int(section.sum())
    counts["vision tokens for the teacher"] = sum(image.vision_tokens for image in sample.helper_images)
    counts["all tokens"] = len(sample.tokens)
    return counts


def pair_of_zeros() -> Int[np.ndarray, " pair"]:
    """Return the counts of no samples and no tokens."""
    return np.zeros(2, np.int64)


class Tally:
    """The sums of a view's measurements."""

    def __init__(self):
        self.quantities: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.images: Counter[tuple[int, int, bool]] = Counter()
        # Samples and their tokens by bucket ("" for none) and by the layout that they need, rounded up so that layouts
        # are few for any data set.
        self.filled: defaultdict[tuple[str, Layout], Int[np.ndarray, " pair"]] = defaultdict(pair_of_zeros)

    def add(self, measured: Measured) -> None:
        """Add a record, if it has a sample."""
        if measured.need is not None:
            for name, value in measured.counts.items():
                self.quantities[name][value] += 1
            self.images.update(measured.images)
            self.filled[measured.bucket, round_up(measured.need)] += (1, measured.tokens)


class Survey:
    """The counts of a data set over the records added."""

    def __init__(self, views: Sequence[View]):
        self.views, self.tallies = views, [Tally() for _ in views]
        self.usable = self.left_out = 0
        self.samples = array("q")  # numbers of the records that have a sample, in a bucket or not
        self.reasons: Counter[str] = Counter()
        self.sentences: defaultdict[str, list[str]] = defaultdict(list)  # the first few of each reason

    def add(self, number: int, measured: Sequence[Measured]) -> None:
        """Add a record; it is skipped if it cannot be used under one of the views."""
        for tally, measurement in zip(self.tallies, measured, strict=True):
            tally.add(measurement)
        if measured[0].need is not None:
            self.samples.append(number)
        if problems := [measurement.problem for measurement in measured if measurement.problem]:
            self.leave_out(problems)
        else:
            self.usable += 1

    def leave_out(self, problems: Sequence[str]) -> None:
        """Count a record that cannot be used, once under each reason."""
        self.left_out += 1
        for reason, sentence in {reason_of(problem): problem for problem in reversed(problems)}.items():
            if len(self.reasons) >= MOST_REASONS and reason not in self.reasons:
                reason = "other reasons"
            self.reasons[reason] += 1
            if len(self.sentences[reason]) < QUOTED:
                self.sentences[reason].append(sentence)

    def needs(self) -> dict[Layout, Int[np.ndarray, " pair"]]:
        """Return samples and their tokens by the layout that they need in training, over all views."""
        needs = defaultdict(pair_of_zeros)
        for view, tally in self.distinct():
            if view.helper_images:  # prompts are decoded in layouts of their own
                for (_, need), filled in tally.filled.items():
                    needs[need] += filled
        return needs

    def distinct(self) -> list[tuple[View, Tally]]:
        """Return views and tallies, without "slots" if "latent" is there, whose tokens are the same."""
        treatments = {view.helper_images for view in self.views}
        repeated = "slots" if "latent" in treatments else None
        pairs = zip(self.views, self.tallies, strict=True)
        return [(view, tally) for view, tally in pairs if view.helper_images != repeated]


def reason_of(problem: str) -> str:
    """Return a problem's sentence without what varies between records: name, numbers, paths and asides."""
    sentence = re.sub(r" \(.*\)", "", problem.partition(": ")[2])
    sentence = re.sub(r"(, got [^'\"]*?)b?['\"].*", r"\1…", sentence)
    problem, semicolon, advice = sentence.partition("; ")
    problem = re.sub(r"'[^']*'|[^\s:,]*[/\\.][^\s:,]*|(?<![\w-])\d+(x\d+)?", "…", problem)
    return re.sub(r"…( …)+", "…", problem) + semicolon + advice


def round_up(need: Layout) -> Layout:
    """Return a layout with each run of columns rounded up, to a multiple of 8 or by at most an eighth of it."""

    def rounded(columns: int) -> int:
        step = 1 << max(3, columns.bit_length() - 4)
        return -(-columns // step) * step

    return dataclasses.replace(need, **{side: rounded(getattr(need, side)) for side in ("prefix", "text", "tail")})


def suggest_buckets(needs: Mapping[Layout, int], most: int = MOST_BUCKETS) -> dict[str, Layout]:
    """Return up to `most` named layouts, the cheapest first, that together hold all `needs` (samples by layout).

    The two layouts whose union adds the least padding are merged repeatedly.
    """
    groups: Counter[Layout] = Counter()
    members: defaultdict[Layout, list[Layout]] = defaultdict(list)
    union, cost = functools.cache(merge_layouts), functools.cache(padded_tokens)

    def padding(pair: tuple[Layout, Layout]) -> int:
        return sum(groups[layout] * (cost(union(pair)) - cost(layout)) for layout in pair)

    waiting = list(needs)
    while waiting or len(groups) > 1:
        if waiting and len(groups) < CANDIDATES:
            need = waiting.pop()
            groups[need] += needs[need]
            members[need].append(need)
            continue
        pair = min(itertools.combinations(groups, 2), key=padding)
        padded = sum(samples * cost(layout) for layout, samples in groups.items())
        if len(groups) <= most and padding(pair) > SPARED_BUCKET * padded:
            break
        samples, joined = sum(groups.pop(layout) for layout in pair), [*members.pop(pair[0]), *members.pop(pair[1])]
        groups[union(pair)] += samples
        members[union(pair)] += joined
    # A union of unions may have columns that the union of all their members does not need.
    merged = sorted((merge_layouts(members[layout]) for layout in groups), key=cost)
    return {f"bucket_{number}": layout for number, layout in enumerate(merged, start=1)}


def first_holding(need: Layout, buckets: Mapping[str, Layout]) -> str:
    """Return the name of the first bucket that holds all samples that `need` holds."""
    return next(name for name, bucket in buckets.items() if merge_layouts((bucket, need)) == bucket)
