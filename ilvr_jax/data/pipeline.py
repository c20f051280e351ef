"""The input pipeline: shuffled records -> samples (in grain workers) -> batches of few static shapes, endlessly."""

import collections
import functools
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.method.layout import NO_IMAGE, Batch, Layout, Sample, collate, fits, required_layout
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import ImageGeometry
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage, PatchedImage

PREFETCHED_BATCHES = 2
PREFETCHED_SAMPLES = 16  # a worker
LOGGED_SKIPS = 20  # bad records that are named; those that follow are counted only


class Source(Protocol):
    """Records by number.

    A source should have a method `fingerprint() -> str`: the same text for the same records in the same order, another
    one for others. A run is resumed with the records that it was stopped with alone; see `fingerprint`.

    A source that reads neighbours together may have a method `shuffled(random: numpy.random.Generator)`, which returns
    the numbers of all records in an order for an epoch that keeps the neighbours near each other.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def fingerprint(source: Source) -> str:
    """Return a source's fingerprint; for one without the method it covers no more than the number of records."""
    return source.fingerprint() if hasattr(source, "fingerprint") else f"{len(source)} records of unknown content"


class Loaded(NamedTuple):
    """A record on its way to a batch: a sample and its bucket, or why there is none."""

    number: int
    sample: Sample | None = None
    bucket: int = -1
    problem: str = ""


class Share(NamedTuple):
    """What one of several processes does: it loads every count-th record, and has some rows of each batch."""

    rows: Sequence[int]
    process: int = 0
    count: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]  # what each process calls it with, told to all


def make_iterator(
    source: Source,
    to_sample: Callable[..., Sample],
    buckets: Sequence[Layout],
    batch_size: int,
    seed: int,
    special: SpecialTokens,
    geometry: ImageGeometry,
    workers: int = 0,
    on_bad_record: str = "error",
    no_image: PatchedImage | EncodedImage = NO_IMAGE,
    share: Share | None = None,
) -> grain.DatasetIterator[Batch]:
    """Return an endless iterator over batches, every epoch in another order.

    `to_sample(record, number=...)` makes a sample of record `number`; it goes to the first of `buckets` that holds
    it, and a batch is made when a bucket has `batch_size` samples. Part-full buckets are carried into the next
    epoch. With `workers` processes or none (a thread), the batches are the same. The state (`get_state`,
    `set_state`) is small and plain JSON, and may be restored with another number of workers. All images are of the kind
    that `no_image` is, patched or encoded. With a `share`, batches are those of one process and have its rows of them.

    A bad record raises BadRecord at the next batch, or with `on_bad_record="skip"` is skipped: the
    first are logged, and `skipped_records` lists all. Raises ValueError on settings that make no sense.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record must be error or skip, got {on_bad_record!r}")
    sizes = (("the number of buckets", len(buckets), 1), ("batch_size", batch_size, 1), ("workers", workers, 0))
    for name, size, least in sizes:
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if not len(source):
        raise BadRecord("the source holds no records; at least one is needed")
    load = functools.partial(
        load_sample,
        source=source,
        to_sample=to_sample,
        buckets=tuple(buckets),
        geometry=geometry,
        no_image=no_image,
    )
    records = shuffled_numbers(source, seed).map(load)
    grain.config.update("py_traceback_filtering", "off")  # it would add lines of its own to an error's sentence
    batches = BatchIterator(
        records,
        functools.partial(collate, special=special, geometry=geometry, no_image=no_image),
        buckets,
        batch_size,
        workers,
        skip=on_bad_record == "skip",
        source_length=len(source),
        records_fingerprint=fingerprint(source),
        share=share or Share(range(batch_size)),
    )
    return grain.experimental.ThreadPrefetchDatasetIterator(batches, PREFETCHED_BATCHES)


def shuffled_numbers(source: Source, seed: int) -> grain.MapDataset[int]:
    """Return the endless order of records: each once an epoch, every epoch in another order."""
    if hasattr(source, "shuffled"):
        return grain.MapDataset.range(sys.maxsize).map(EpochOrder(source, seed))
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


class EpochOrder:
    """The number of the record at a position of the endless order, where the source shuffles its records itself."""

    def __init__(self, source: Source, seed: int):
        self._source, self._seed = source, seed
        self._current: tuple[int, Sequence[int]] = (-1, ())  # an epoch and its order

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, len(self._source))
        known, order = self._current
        if epoch != known:
            order = self._source.shuffled(np.random.default_rng((self._seed, epoch)))
            self._current = (epoch, order)
        return int(order[place])


def is_place(state: Any) -> bool:
    """Return whether a value has the form of an iterator's state: what is read from a damaged file may not."""
    if not isinstance(state, dict) or not isinstance(state.get("records", ""), str):
        return False
    lists = (state.get("pending"), state.get("skipped"), [state.get("position")])
    return all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in lists)


def next_epoch(state: dict[str, Any], records: int) -> dict[str, Any]:
    """Return the state of an iterator over so many other records, at the first epoch that begins after `state`."""
    return {"position": -(-state["position"] // records) * records, "pending": [], "skipped": []}


def skipped_records(iterator: grain.DatasetIterator) -> list[int]:
    """Return the numbers of the records skipped so far, each once however often it came up."""
    return list(iterator.get_state()["skipped"])


def load_sample(
    number: int,
    source: Source,
    to_sample: Callable[..., Sample],
    buckets: Sequence[Layout],
    geometry: ImageGeometry,
    no_image: PatchedImage | EncodedImage = NO_IMAGE,
) -> Loaded:
    """Load one record and finds its bucket; a bad record is returned as such, to be judged in the main process."""
    try:
        record = source[number]
        sample = to_sample(record, number=number)
        bucket = find_bucket(sample, record.name, buckets, geometry)
        if any(type(image) is not type(no_image) for image in (*sample.images, *sample.helper_images)):
            raise BadRecord(
                f"{record.name}: an image has no features, since it was another or unreadable when they were computed; "
                "the same command computes them"
            )
        return Loaded(number, sample, bucket)
    except BadRecord as error:
        return Loaded(number, problem=str(error))


def find_bucket(sample: Sample, name: str, buckets: Sequence[Layout], geometry: ImageGeometry) -> int:
    """Return which of `buckets` a sample goes to, the first that holds it; raises BadRecord, naming it, if none."""
    for bucket, layout in enumerate(buckets):
        if fits(sample, layout, geometry):
            return bucket
    raise BadRecord(f"{name}: {_too_large(required_layout(sample, geometry), buckets[-1])}")


def stream(items: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    """Return the items in their order, made in `workers` processes, or here if there are none."""
    ordered = items.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl's flags for debug settings before it starts a worker
            flags.FLAGS.mark_as_parsed()
        ordered = ordered.mp_prefetch(grain.MultiprocessingOptions(workers, PREFETCHED_SAMPLES), _ignore_ctrl_c)
    return iter(ordered)


def _ignore_ctrl_c(worker: int, workers: int) -> None:
    """Leave Ctrl-C, which reaches all processes, to the main one: it ends the workers."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _too_large(need: Layout, largest: Layout) -> str:
    """Says what of a sample does not fit; all its sizes where only their combination is too large."""
    rooms = {
        "images": (need.images, largest.images),
        "vision tokens an image": (need.image_tokens, largest.image_tokens),
    }
    if need.segments:
        last = max(0, largest.segments - need.segments + 1) * largest.text + largest.tail
        rooms |= {
            "tokens before the first latent segment": (need.prefix, largest.prefix),
            "latent segments": (need.segments, largest.segments),
            "slots a segment": (need.latent_size, largest.latent_size),
            "tokens between segments": (need.text, largest.text),
            "tokens after the last segment": (need.text + need.tail, last),
            "vision tokens a helper image": (need.helper_tokens, largest.helper_tokens),
        }
    else:
        rooms["tokens"] = (need.prefix, len(largest.text_columns))
    over = {name: sizes for name, sizes in rooms.items() if sizes[0] > sizes[1]} or rooms
    needs, holds = ([f"{sizes[side]} {name}" for name, sizes in over.items()] for side in (0, 1))
    return f"fits no bucket: it takes {', '.join(needs)}; the largest bucket holds {', '.join(holds)}"


class BatchIterator(grain.DatasetIterator):
    """Assemble batches from `records`, a random-access dataset of Loaded.

    The state is a position in the (endless, shuffled) order of records and the positions of the samples that
    wait in part-full buckets. Those are loaded again after a restore. `records`, the source's fingerprint, is for
    comparison with another source's: `set_state` does not look at it.

    Of several processes each loads its part of the records and tells the others which buckets they go to, so that all
    make the same batches. Of its rows it then loads those that another process has sized.
    """

    def __init__(
        self,
        records: grain.MapDataset,
        make_batch: Callable[[Sequence[Sample], Layout], Batch],
        buckets: Sequence[Layout],
        batch_size: int,
        workers: int,
        skip: bool,
        source_length: int,
        records_fingerprint: str,
        share: Share,
    ):
        super().__init__()
        self._share = share
        self._records, self._make_batch, self._buckets = records, make_batch, tuple(buckets)
        self._batch_size, self._workers = batch_size, workers
        self._skip, self._source_length, self._fingerprint = skip, source_length, records_fingerprint
        self._stream = None
        self.set_state({"position": 0, "pending": [], "skipped": []})

    def get_state(self) -> dict[str, Any]:
        waiting = [position for bucket in self._waiting for position, _ in bucket]
        return {
            "position": self._position,
            "pending": sorted([*self._to_reload, *waiting]),
            "skipped": sorted(self._skipped),
            "records": self._fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._close_stream()
        self._position = state["position"]
        self._to_reload = list(state["pending"])
        self._skipped = set(state["skipped"])
        self._waiting: list[list[tuple[int, Sample | None]]] = [[] for _ in self._buckets]
        self._ahead: collections.deque[Loaded] = collections.deque()

    def __next__(self) -> Batch:
        self._assert_not_closed()
        while self._to_reload:
            position = self._to_reload[0]
            self._put(position, self._records[position])
            self._to_reload.pop(0)
        while True:
            for layout, waiting in zip(self._buckets, self._waiting, strict=True):
                if len(waiting) >= self._batch_size:
                    mine = [waiting[row] for row in self._share.rows]
                    del waiting[: self._batch_size]
                    samples = [sample or self._records[position].sample for position, sample in mine]
                    return self._make_batch(samples, layout)
            if not self._ahead:
                self._read_ahead()
            self._put(self._position, self._ahead.popleft())
            self._position += 1

    def _read_ahead(self) -> None:
        """Load some of the next records, this process's share of them, and learns the others' buckets."""
        _, process, count, exchange = self._share
        if self._stream is None:
            self._stream = stream(self._records.slice(slice(self._position + process, None, count)), self._workers)
        mine = [next(self._stream) for _ in range(1 if count == 1 else -(-self._batch_size // count))]
        told = exchange([[loaded.number, loaded.bucket, loaded.problem] for loaded in mine])
        for place, of_place in enumerate(zip(*told, strict=True)):
            for owner, (number, bucket, problem) in enumerate(of_place):
                sample = mine[place].sample if owner == process else None
                self._ahead.append(Loaded(number, sample, bucket, problem))

    def _put(self, position: int, loaded: Loaded) -> None:
        if not loaded.problem:
            self._waiting[loaded.bucket].append((position, loaded.sample))
        elif not self._skip:
            raise BadRecord(loaded.problem)
        elif loaded.number not in self._skipped:
            self._skipped.add(loaded.number)
            if len(self._skipped) <= LOGGED_SKIPS:
                logging.getLogger(__name__).warning("skipped: %s", loaded.problem)
        if len(self._skipped) == self._source_length:
            raise BadRecord(f"every record was skipped, the last because: {loaded.problem}")

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def close(self) -> None:
        super().close()
        self._close_stream()
