"""The input pipeline, endless: shuffled records -> samples (in grain workers) -> batches of a few static shapes."""

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
PREFETCHED_SAMPLES = 16  # per worker
LOGGED_SKIPS = 20  # bad records that are logged; later ones are only counted


class Source(Protocol):
    """Records by number.

    A source should have a method `fingerprint() -> str`, equal for equal records in the same order and different for
    others: a run resumes only with the same records; see `fingerprint`.

    A source that reads neighbours together may have a method `shuffled(random: numpy.random.Generator)`, which returns
    the numbers of all records in the order of an epoch, with neighbours near each other.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def fingerprint(source: Source) -> str:
    """Return a source's fingerprint; without the method it is the number of records alone."""
    return source.fingerprint() if hasattr(source, "fingerprint") else f"{len(source)} records of unknown content"


class Loaded(NamedTuple):
    """A record that was loaded: its sample and the number of its bucket, or the problem."""

    number: int
    sample: Sample | None = None
    bucket: int = -1
    problem: str = ""


class ProcessShard(NamedTuple):
    """The part of one of several processes: it loads every count-th record, and holds some rows of each batch."""

    rows: Sequence[int]  # of each batch
    process: int = 0  # its number
    count: int = 1  # of processes
    all_gather: Callable[[Any], list[Any]] = lambda value: [value]  # returns the value of each process


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
    shard: ProcessShard | None = None,
) -> grain.DatasetIterator[Batch]:
    """Return an endless iterator over batches, with a new order in every epoch.

    `to_sample(record, number=...)` makes the sample of record `number`. It goes to the first of `buckets` that holds
    it, and a bucket with `batch_size` samples becomes a batch. Partly filled buckets are carried into the next epoch.
    All images are of the kind of `no_image`, patched or encoded. With `shard`, batches have the rows of one process
    alone. The number of `workers` (processes; 0: a thread) changes no batch, and the state (`get_state`, `set_state`),
    small and plain JSON, may be restored with another.

    A bad record raises BadRecord at the next batch, or with `on_bad_record="skip"` is skipped: the first ones are
    logged, and `skipped_records` lists all. Raises ValueError for invalid settings.
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
    grain.config.update("py_traceback_filtering", "off")  # it adds lines to the messages of errors
    batches = BatchIterator(
        records,
        functools.partial(collate, special=special, geometry=geometry, no_image=no_image),
        buckets,
        batch_size,
        workers,
        skip=on_bad_record == "skip",
        source_length=len(source),
        records_fingerprint=fingerprint(source),
        shard=shard or ProcessShard(range(batch_size)),
    )
    return grain.experimental.ThreadPrefetchDatasetIterator(batches, PREFETCHED_BATCHES)


def shuffled_numbers(source: Source, seed: int) -> grain.MapDataset[int]:
    """Return the endless order of records: all once per epoch, with a new order in every epoch."""
    if hasattr(source, "shuffled"):
        return grain.MapDataset.range(sys.maxsize).map(EpochOrder(source, seed))
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


class EpochOrder:
    """The number of the record at a position of the endless order, for a source that shuffles its records itself."""

    def __init__(self, source: Source, seed: int):
        self._source, self._seed = source, seed
        self._current: tuple[int, Sequence[int]] = (-1, ())  # an epoch and its order

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, len(self._source))
        current, order = self._current
        if epoch != current:
            order = self._source.shuffled(np.random.default_rng((self._seed, epoch)))
            self._current = (epoch, order)
        return int(order[place])


def is_place(state: Any) -> bool:
    """Return whether a value has the form of an iterator's state; one read from a damaged file may not."""
    if not isinstance(state, dict) or not isinstance(state.get("records", ""), str):
        return False
    lists = (state.get("pending"), state.get("skipped"), [state.get("position")])
    return all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in lists)


def next_epoch(state: dict[str, Any], records: int) -> dict[str, Any]:
    """Return the state of an iterator over other `records`, at the first epoch that begins after `state`."""
    return {"position": -(-state["position"] // records) * records, "pending": [], "skipped": []}


def skipped_records(iterator: grain.DatasetIterator) -> list[int]:
    """Return the numbers of the records skipped so far, each once."""
    return list(iterator.get_state()["skipped"])


def load_sample(
    number: int,
    source: Source,
    to_sample: Callable[..., Sample],
    buckets: Sequence[Layout],
    geometry: ImageGeometry,
    no_image: PatchedImage | EncodedImage = NO_IMAGE,
) -> Loaded:
    """Load one record and find its bucket. A bad record is returned as a problem, which the main process handles."""
    try:
        record = source[number]
        sample = to_sample(record, number=number)
        bucket = find_bucket(sample, record.name, buckets, geometry)
        if any(type(image) is not type(no_image) for image in (*sample.images, *sample.helper_images)):
            raise BadRecord(
                f"{record.name}: an image must have the features that are computed at the start, but changed or was "
                "unreadable then; run the command again to compute them"
            )
        return Loaded(number, sample, bucket)
    except BadRecord as error:
        return Loaded(number, problem=str(error))


def find_bucket(sample: Sample, name: str, buckets: Sequence[Layout], geometry: ImageGeometry) -> int:
    """Return the number of the first bucket that holds a sample. Raises BadRecord, naming it, if none does."""
    for bucket, layout in enumerate(buckets):
        if fits(sample, layout, geometry):
            return bucket
    raise BadRecord(f"{name}: {_too_large(required_layout(sample, geometry), buckets[-1])}")


def stream(items: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    """Return the items in order, made in `workers` processes, or in this one if there are none."""
    ordered = items.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads debug settings from absl's flags when it starts a worker
            flags.FLAGS.mark_as_parsed()
        ordered = ordered.mp_prefetch(grain.MultiprocessingOptions(workers, PREFETCHED_SAMPLES), _ignore_ctrl_c)
    return iter(ordered)


def _ignore_ctrl_c(worker: int, workers: int) -> None:
    """Ignore Ctrl-C, which reaches all processes: the main one ends the workers."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _too_large(need: Layout, largest: Layout) -> str:
    """Return which sizes of a sample do not fit, or all of them if only their combination is too large."""
    rooms = {
        "images": (need.images, largest.images),
        "vision tokens per image": (need.image_tokens, largest.image_tokens),
    }
    if need.segments:
        last = max(0, largest.segments - need.segments + 1) * largest.text + largest.tail
        rooms |= {
            "tokens before the first latent segment": (need.prefix, largest.prefix),
            "latent segments": (need.segments, largest.segments),
            "slots per segment": (need.latent_size, largest.latent_size),
            "tokens between segments": (need.text, largest.text),
            "tokens after the last segment": (need.text + need.tail, last),
            "vision tokens per helper image": (need.helper_tokens, largest.helper_tokens),
        }
    else:
        rooms["tokens"] = (need.prefix, len(largest.text_columns))
    over = {name: sizes for name, sizes in rooms.items() if sizes[0] > sizes[1]} or rooms
    needs, holds = ([f"{sizes[side]} {name}" for name, sizes in over.items()] for side in (0, 1))
    return f"must fit a bucket, but takes {', '.join(needs)}; the largest bucket holds {', '.join(holds)}"


class BatchIterator(grain.DatasetIterator):
    """Batches from `records`, a random-access dataset of Loaded.

    The state is a position in the (endless, shuffled) order of records and the positions of the samples that wait in
    partly filled buckets, which are loaded again after a restore. The source's fingerprint in it, `records`, is for
    comparison with another source's; `set_state` ignores it.

    Each of several processes loads its part of the records and sends their buckets to the others, so that all make the
    same batches. It then loads those of its own rows that another process had loaded.
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
        shard: ProcessShard,
    ):
        super().__init__()
        self._shard = shard
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
                    rows = [waiting[row] for row in self._shard.rows]
                    del waiting[: self._batch_size]
                    samples = [sample or self._records[position].sample for position, sample in rows]
                    return self._make_batch(samples, layout)
            if not self._ahead:
                self._read_ahead()
            self._put(self._position, self._ahead.popleft())
            self._position += 1

    def _read_ahead(self) -> None:
        """Load this process's part of the next records, and receive the buckets of the others'."""
        _, process, count, all_gather = self._shard
        if self._stream is None:
            self._stream = stream(self._records.slice(slice(self._position + process, None, count)), self._workers)
        local = [next(self._stream) for _ in range(1 if count == 1 else -(-self._batch_size // count))]
        gathered = all_gather([[loaded.number, loaded.bucket, loaded.problem] for loaded in local])
        for loaded, headers in zip(local, zip(*gathered, strict=True), strict=True):
            for owner, (number, bucket, problem) in enumerate(headers):
                self._ahead.append(Loaded(number, loaded.sample if owner == process else None, bucket, problem))

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
