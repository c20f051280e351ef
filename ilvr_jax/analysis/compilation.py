"""Ahead-of-time compilation for TPU topologies: memory per chip, arithmetic and communication."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ilvr_jax.analysis.flops import CHIPS, GIB, SHAPES, Chip, decoder_flops, published_description, train_flops
from ilvr_jax.analysis.hlo import Collective, collectives, memory_reads
from ilvr_jax.checkpoints.pretrained import open_init_from
from ilvr_jax.checkpoints.runs import abstract_params
from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.data.sources import config_buckets
from ilvr_jax.inference.decode import decode_steps, init_decode_state, prefill
from ilvr_jax.inference.kv_cache import AXES, init_kv_cache
from ilvr_jax.inference.sizes import PREFILL_CHUNK, EngineSettings, group_sizes
from ilvr_jax.method.layout import NO_IMAGE, Batch, Layout, collate
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models import build_model
from ilvr_jax.models.attention import QUERY_BLOCK, KVCache
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage
from ilvr_jax.models.sharding import ROWS, RULES, check_mesh, divisor, make_mesh, on_mesh
from ilvr_jax.training.setup import make_step
from ilvr_jax.training.state import abstract_train_state

# libtpu would otherwise look these up on a TPU machine.
NO_CLOUD = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
NO_CLOUD["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs, so that processes may compile in parallel

# A compiled program does not depend on their values.
SPECIAL = SpecialTokens(*range(10))


class DoesNotFit(Exception):
    """Raised when a program does not fit into a chip's memory; its message has the size."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory, arithmetic and communication of a compiled program."""

    name: str
    chip: Chip
    chips: int
    memory: Mapping[str, int]  # bytes per chip by kind
    flops: float  # of the model on all chips, without recomputation by rematerialisation
    traffic: float  # bytes between a chip and its memory, a lower bound
    kernels: int  # calls of Pallas kernels
    collectives: Sequence[Collective] | None  # None if jaxlib cannot read the program that libtpu compiled
    seconds: float  # of compilation
    reads: int | None = None  # bytes that a chip reads in a step of decoding, from the program; None as `collectives`

    @property
    def used(self) -> int:
        """Bytes of a chip's memory."""
        return sum(self.memory.values())

    @property
    def spare(self) -> float:
        """The share of a chip's memory that remains free."""
        return 1.0 - self.used / self.chip.memory


def open_topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """Return the chip and the devices of a TPU topology such as "v5e:4x4"; raises BadConfig for an unknown name."""
    generation, _, shape = name.partition(":")
    chip = CHIPS.get(generation)
    if chip is None or not shape:
        examples = ", ".join(f"{name}:{chip.topologies[3]}" for name, chip in CHIPS.items())
        raise BadConfig(f"--topology must be one of {', '.join(CHIPS)}, a colon and a shape ({examples}), got {name!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise BadConfig("libtpu, the compiler for TPUs, is not installed: pip install -r requirements-tpu.txt")
    for variable, value in NO_CLOUD.items():
        os.environ.setdefault(variable, value)
    try:
        return chip, list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        if not re.search("INVALID_ARGUMENT|Invalid", str(error)):
            raise
        known = ", ".join(f"{generation}:{shape}" for shape in chip.topologies)
        raise BadConfig(f"--topology must be one of {known}, got {name!r}") from error


def config_model(config: RunConfig) -> Model:
    """Return the model of a config, without reading any weights."""
    name = config.model.init_from
    with config_errors("model"):
        if name in SHAPES:
            return build_model(config.model, 0, published_description(name))
        if name:
            return build_model(config.model, 0, open_init_from(name, weights=False).hf_config)
        # A run's own tokenizer has some hundred tokens.
        return build_model(config.model, 256)


def compile_train_step(
    config: RunConfig, stage: str, bucket: str, model: Model, chip: Chip, devices: list[jax.Device]
) -> Report:
    """Compile the train step of a stage for a bucket of its batches, on the mesh of the config.

    Raises BadConfig if the mesh does not fit the devices, the batch or the model, DoesNotFit if memory is too small.
    """
    settings = config.stages[stage]
    mesh = _mesh(config, model, devices)
    layout = config_buckets(config, settings.helper_images)[bucket]
    cached = config.data.feature_cache and "vision" not in settings.train
    optimizer, step = make_step(config, stage, model, mesh)
    state = abstract_train_state(abstract_params(model, config, mesh), optimizer, settings, mesh)
    batch = abstract_batch(layout, settings.batch_size, model, mesh, cached)
    memory = {
        "weights": local_bytes(state.params),
        "optimizer": local_bytes(state.opt_state),
        "teacher": local_bytes(state.teacher),
        "batch": local_bytes(batch),
    }
    flops = train_flops(model.config, settings.objective, settings.train, layout, settings.batch_size, not cached)
    read = sum(memory.values()) - memory["batch"]
    written = memory["optimizer"] + memory["teacher"] + sum(local_bytes(state.params[part]) for part in settings.train)
    return _compile(f"{stage}, {bucket}", step, (state, batch), mesh, chip, memory, flops, float(read + written))


def compile_decoding(
    config: RunConfig, bucket: str, model: Model, chip: Chip, devices: list[jax.Device]
) -> list[Report]:
    """Compile the prefill of prompts as long as a bucket's prefix, and a step of decoding `eval.batch_size` rows.

    Parameters are in the model's dtype. Raises as `compile_train_step` does.
    """
    mesh, dtype = _mesh(config, model, devices), model.config.dtype
    layout, new_tokens = config_buckets(config, "slots")[bucket], config.eval.max_new_tokens
    shards = divisor("rows", mesh)
    rows, columns = -(-config.eval.batch_size // shards) * shards, layout.prefix + new_tokens
    settings = EngineSettings(rows, columns, new_tokens, (min(PREFILL_CHUNK, layout.prefix),), (layout.image_tokens,))
    with on_mesh(mesh):
        group = group_sizes(settings)[-1]

    def abstract(shape: tuple[int, ...] = (), dtype: str = "int32", spec: tuple = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), tree)

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        decoder_params(abstract_params(model, config, mesh)),
    )
    cache = jax.eval_shape(lambda: init_kv_cache(model, rows, columns, False))
    spec = nn.logical_to_mesh_axes((None, *AXES), RULES)
    cache = KVCache(*(abstract(part.shape, part.dtype, spec) for part in cache[:2]), abstract((rows,)))
    state = whole(jax.eval_shape(lambda: init_decode_state(model, rows, settings)))
    memory = {"weights": local_bytes(params), "cache": local_bytes(cache)}
    step_flops = rows * decoder_flops(model.config, 1, labelled=1, attended=columns)
    call = (model, params, cache, state, abstract(), abstract(), SPECIAL)
    unread = 0 if model.config.tie_word_embeddings else local_bytes(params["embed_tokens"])
    name, floor = f"a step of decoding, {rows} rows of {columns} columns", float(sum(memory.values()) - unread)
    decoding = _compile(name, decode_steps, call, mesh, chip, dict(memory), step_flops, floor, columns)

    chunk, channels = settings.chunks[0], model.config.hidden_size
    vision_inputs = abstract((group, chunk + 2 * layout.image_tokens, channels), dtype)
    numbers = [abstract(shape) for shape in ((group, chunk), (group, 3, chunk), (group,), (group,), (group, 2))]
    of_some = numbers[2] if group < rows else None
    call = (model, params, cache, abstract((rows, channels), dtype), vision_inputs, of_some, *numbers, SPECIAL)
    name, chunk_flops = f"prefill, {group} prompts of {chunk} tokens", group * decoder_flops(model.config, chunk, 0)
    return [_compile(name, prefill, call, mesh, chip, memory, chunk_flops, float(memory["weights"])), decoding]


def _mesh(config: RunConfig, model: Model, devices: list[jax.Device]) -> Mesh:
    with config_errors("mesh"):
        mesh = make_mesh(vars(config.mesh), devices)
        check_mesh(mesh, model.config)
    return mesh


def _compile(
    name: str,
    function: Any,
    call: tuple,
    mesh: Mesh,
    chip: Chip,
    memory: dict[str, int],
    flops: float,
    traffic: float,
    columns: int | None = None,
) -> Report:
    """Compile a function and return its report, with its reads if it decodes rows of `columns` columns."""
    if sum(memory.values()) > chip.memory:
        kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.items())
        raise DoesNotFit(f"without temporaries each chip of {chip.memory / GIB:.0f} GiB would hold {kinds} GiB")
    start = time.perf_counter()
    with on_mesh(mesh):
        lowered = function.lower(*call)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        raise DoesNotFit(f"it needs {used[1]} of {used[2]}" if used else str(error).splitlines()[0]) from error
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    # Aliased inputs and outputs count once: the step donates its state.
    arguments = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory["temporaries"] = analysis.temp_size_in_bytes + max(0, arguments - sum(memory.values()))
    memory["program"] = analysis.generated_code_size_in_bytes
    kernels = lowered.as_text().count("@tpu_custom_call")
    program, sent, reads = _text(compiled), None, None
    if program:
        sent = collectives(program)
        reads = memory_reads(program, -(-columns // QUERY_BLOCK)) if columns else None
    return Report(name, chip, mesh.size, memory, flops, traffic, kernels, sent, seconds, reads)


def _text(compiled: jax.stages.Compiled) -> str | None:
    """Return the text of a compiled program, None if this jaxlib cannot parse everything that libtpu wrote."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return None


def abstract_batch(layout: Layout, rows: int, model: Model, mesh: Mesh, cached: bool) -> Batch:
    """Return shapes, dtypes and shardings of a batch, with features in place of images if they are `cached`."""
    features = EncodedImage(np.zeros((0, 0, model.config.hidden_size), jax.numpy.dtype(model.config.dtype)))
    empty = collate([], layout, SPECIAL, model.geometry, features if cached else NO_IMAGE)
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))

    def abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)

    return jax.tree.map(abstract, empty)


def local_bytes(tree: PyTree) -> int:
    """Return the bytes of a tree on each device, from shapes with shardings."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 8
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
