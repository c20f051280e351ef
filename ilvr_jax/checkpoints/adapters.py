"""LoRA adapters as PEFT saves them (adapter_config.json, adapter_model.safetensors), merged or trained further.

The tensors determine what an adapter changes, and the config how; a config field with an effect that is not
implemented is an error that names it.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ilvr_jax.config.schema import LoraConfig
from ilvr_jax.errors import listed, quote
from ilvr_jax.files import read_json
from ilvr_jax.models.lora import SUFFIX
from ilvr_jax.models.qwen2_5_vl.weights import (
    EMBEDDING,
    FLOATS,
    HEAD,
    flat_name,
    named_tensors,
    nested_name,
    put,
    unwrapped,
)
from ilvr_jax.models.sharding import to_mesh
from ilvr_jax.models.tensor_files import BadCheckpoint, TensorFiles, tensor_places

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields without effect on the output of a saved adapter: notes, initialisation, training and placement. PEFT disables
# fan_in_fan_out for every layer of this model.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_class", "parent_library", "peft_version", "task_type", "inference_mode"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying"),
}
USED = {
    *("base_model_name_or_path", "revision", "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "bias"),
}
# Initialisations, besides true, false and null, that leave the base unchanged.
INITIALISATIONS = ("gaussian", "eva", "orthogonal")
MATRIX = re.compile(r"^(?P<module>.+)\.lora_(?P<matrix>A|B|magnitude_vector)(\.(?!weight)\w+)?(\.weight)?$")
SAVED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")  # around tensors that are saved whole


class LowRank(NamedTuple):
    """The low-rank change of one layer: the names of its matrices in the file, and the factor of their product."""

    module: str  # the layer's name in the file
    rank: int
    scale: float
    matrices: Mapping[str, str]  # "A" [rank, in], "B" [out, rank]; with DoRA "magnitude_vector" [out], too


class PeftAdapter(NamedTuple):
    """A saved adapter, its tensors still on disk; changed layers have the flat names of published checkpoints."""

    folder: Path
    config: Mapping[str, Any]  # its adapter_config.json, checked
    tensors: TensorFiles
    layers: Mapping[str, LowRank]  # by the name of the layer's weight
    replaced: Mapping[str, str]  # tensors that replace those of the base, with their names in the file
    unties: bool  # whether embedding and head are separate tensors even if the base ties them

    def changed(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base's config.json with the adapter's changes to it: the rows and tying of embeddings."""
        changes = {"tie_word_embeddings": False} if self.unties else {}
        if EMBEDDING in self.replaced:
            changes["vocab_size"] = self.tensors.places[self.replaced[EMBEDDING]].shape[0]
        changed = json.loads(json.dumps(published))
        for section in (changed, changed.get("text_config", {})):
            section |= {key: value for key, value in changes.items() if key in section or key == "tie_word_embeddings"}
        return changed

    def has_table(self, name: str) -> bool:
        """Return whether the embedding, or the head, is the adapter's own."""
        return {"embed_tokens": EMBEDDING, "lm_head": HEAD}[name] in self.replaced

    def continues(self, lora: LoraConfig, layers: int) -> bool:
        """Return whether a run with these settings trains this adapter further, in place of fresh ones on top of it."""
        names = {f"model.layers.{layer}.{place(name)}.weight" for layer in range(layers) for name in lora.targets}
        plain = all(
            layer.rank == lora.rank and "magnitude_vector" not in layer.matrices for layer in self.layers.values()
        )
        return bool(lora.rank) and plain and self.layers.keys() == names


def place(target: str) -> str:
    """Return the path of an adapted linear layer within a layer of the decoder."""
    return f"self_attn.{target}" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else f"mlp.{target}"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json", "params")
    has_adapter = any((folder / name).exists() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))
    return has_adapter and not any((folder / name).exists() for name in whole)


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter's config and the names and shapes of its tensors.

    Raises BadCheckpoint, naming the file, for a damaged file, a field with an effect that is not implemented, and
    tensors that are missing, do not have the config's ranks, or are unknown.
    """
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise BadCheckpoint(
            f"{path} must exist, but {folder} has only pickled weights (adapter_model.bin), which can run any code "
            "when they are opened; save them with PEFT again"
        )
    tensors = TensorFiles(tensor_places(path))
    layers: dict[str, dict[str, str]] = {}
    stored: dict[str, str] = {}  # the names of layers in the file
    replaced: dict[str, str] = {}
    for name in tensors:
        if (dtype := tensors.places[name].dtype) not in FLOATS:
            raise BadCheckpoint(f"{path} must hold tensors of {', '.join(FLOATS)}, but {quote(name)} is of {dtype}")
        if match := MATRIX.match(unwrapped(name)):
            layer = f"{_flat(match['module'])}.weight"
            stored[layer] = match["module"]
            other = layers.setdefault(layer, {}).setdefault(match["matrix"], name)
        else:
            other = replaced.setdefault(_flat(SAVED.sub("", unwrapped(name))), name)
        if other != name:
            raise BadCheckpoint(f"{path} must hold a tensor once, but has {quote(other)} and {quote(name)}")
    saved = config["modules_to_save"]
    if unknown := [tensor for name, tensor in replaced.items() if not _is_saved(name, saved)]:
        raise BadCheckpoint(
            f"{path} must hold only LoRA matrices and `modules_to_save`, but also has {listed(unknown)}"
        )
    if missing := [name for name in saved if not any(_is_saved(other, [name], embeddings=False) for other in replaced)]:
        raise BadCheckpoint(f"{path} must hold the `modules_to_save` of {CONFIG}, but lacks {listed(missing)}")
    if not layers and not replaced:
        raise BadCheckpoint(f"{path} must hold LoRA matrices, but has no tensors")
    low_rank = {name: _low_rank(config, stored[name], matrices, tensors, path) for name, matrices in layers.items()}
    unties = HEAD in layers or any(_is_saved(name, saved, embeddings=False) for name in (HEAD, EMBEDDING))
    return PeftAdapter(folder, config, tensors, low_rank, replaced, unties)


def check_fit(adapter: PeftAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BadCheckpoint if an adapter does not fit a model whose tensors have these flat names and shapes.

    It must have every layer that its `target_modules` names, as PEFT saves them.
    """
    path = adapter.folder / WEIGHTS
    if foreign := [name for name in (*adapter.layers, *adapter.replaced) if name not in shapes]:
        raise BadCheckpoint(f"{path} must be for layers of its base, but has {listed(foreign)}, which the base lacks")
    if EMBEDDING in adapter.layers:
        raise BadCheckpoint(f"{path} must be for linear layers, but has one for the embedding, model.embed_tokens")
    for name, layer in adapter.layers.items():
        outputs, inputs = shapes[name][0], math.prod(shapes[name][1:])
        expected = {"A": (layer.rank, inputs), "B": (outputs, layer.rank), "magnitude_vector": (outputs,)}
        for matrix, tensor in layer.matrices.items():
            shape = adapter.tensors.places[tensor].shape
            if math.prod(shape) != math.prod(expected[matrix]) or shape[:1] != expected[matrix][:1]:
                _misshapen(path, tensor, shape, expected[matrix])
    for name, tensor in adapter.replaced.items():
        shape = adapter.tensors.places[tensor].shape
        if shape != shapes[name]:
            _misshapen(path, tensor, shape, shapes[name])
    linear = [name for name, shape in shapes.items() if len(shape) == 2 and name not in (HEAD, EMBEDDING)]
    expected = [name for name in linear if _is_target(adapter, name.removesuffix(".weight"))]
    if missing := [name for name in expected if name not in adapter.layers and name not in adapter.replaced]:
        raise BadCheckpoint(f"{path} must hold matrices for all `target_modules`, but lacks those of {listed(missing)}")


def merge_adapter(params: PyTree, adapter: PeftAdapter) -> PyTree:
    """Return params with an adapter merged into the weights in float32; dtypes stay.

    Donates the buffers of what changes. Sources: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353.
    """
    return _changed(params, adapter, adapter.layers)


def replace_tensors(params: PyTree, adapter: PeftAdapter) -> PyTree:
    """Return params with the tensors that an adapter replaces (`modules_to_save`)."""
    return _changed(params, adapter, adapter.replaced)


def trained_matrices(adapters: PyTree, adapter: PeftAdapter, lora: LoraConfig) -> PyTree:
    """Return an adapter's matrices with the structure of the fresh `adapters`, which they must fit (see `continues`).

    If its factor differs from that of `lora`, the second matrix is scaled to make up for it.
    """

    def matrices(keys: tuple[Any, ...], fresh: Array) -> Array:
        matrix = keys[-1].key.upper()
        stacked = []
        for layer in range(fresh.shape[0]):
            change = adapter.layers[f"model.layers.{layer}.{place(keys[-2].key.removesuffix(SUFFIX))}.weight"]
            factor = change.scale / lora.scale if matrix == "B" else 1.0
            stacked.append(_read(adapter, change.matrices[matrix]).T * np.float32(factor))
        return jax.device_put(np.stack(stacked), fresh.sharding)

    return jax.tree_util.tree_map_with_path(matrices, adapters)


def _changed(params: PyTree, adapter: PeftAdapter, changes: Mapping[str, Any]) -> PyTree:
    params = jax.tree.map(lambda leaf: leaf, params)  # a copy of the dictionaries, which are changed below
    for name, path, layer in list(named_tensors(params)):
        if name not in changes:
            continue
        *parents, last = path
        parent = functools.reduce(lambda tree, key: tree[key], parents, params)
        if isinstance(changes[name], LowRank):
            read = {matrix: _read(adapter, tensor) for matrix, tensor in changes[name].matrices.items()}
            down, up = read["A"].reshape(len(read["A"]), -1), read["B"].reshape(len(read["B"]), -1)
            magnitude = read["magnitude_vector"].reshape(-1) if "magnitude_vector" in read else None
            transposed = last == "kernel"
            parent[last] = _add(parent[last], layer, down, up, changes[name].scale, magnitude, transposed)
        else:
            tensor = _read(adapter, changes[name])
            tensor = tensor.reshape(len(tensor), -1).T if last == "kernel" else tensor
            leaf = parent[last]
            parent[last] = (
                to_mesh(tensor, leaf.sharding).astype(leaf.dtype) if layer is None else put(leaf, tensor, layer)
            )
    return params


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _add(
    weights: Float[Array, "..."],
    layer: int | None,
    down: Float[Array, "rank inputs"],
    up: Float[Array, "outputs rank"],
    scale: float,
    magnitude: Float[Array, " outputs"] | None,
    transposed: bool,
) -> Float[Array, "..."]:
    """Return weights after a low-rank change of `layer`, or of the whole if it is None."""
    changed = weights if layer is None else jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False)
    changed = changed.astype(jnp.float32).T if transposed else changed.astype(jnp.float32)
    changed += scale * jnp.matmul(up, down, precision="highest")
    if magnitude is not None:
        changed *= (magnitude / jnp.linalg.norm(changed, axis=1))[:, None]
    changed = changed.T if transposed else changed
    return changed.astype(weights.dtype) if layer is None else put(weights, changed, layer)


def _read(adapter: PeftAdapter, tensor: str) -> Float[np.ndarray, "..."]:
    return np.asarray(adapter.tensors[tensor], np.float32)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the content of an adapter_config.json, checked."""
    config = read_json(path, BadCheckpoint)

    def must_be(name: str, expected: str) -> BadCheckpoint:
        got = quote(config[name]) if name in config else "nothing"
        return BadCheckpoint(f"`{name}` in {path} must be {expected}, got {got}")

    if not isinstance(config, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object, got {quote(config)}")
    if config.get("peft_type") != "LORA":
        raise must_be("peft_type", "'LORA', the only kind of adapter that is implemented")
    for name, value in config.items():
        if name not in USED | WITHOUT_EFFECT and value not in (None, False, [], {}):
            raise must_be(name, "null or false, since its effect is not implemented")
    if config.get("bias", "none") != "none":
        raise must_be("bias", "'none'")
    initialisation = config.get("init_lora_weights", True)
    if not (initialisation is None or type(initialisation) is bool or initialisation in INITIALISATIONS):
        raise must_be("init_lora_weights", "one that leaves the base unchanged; convert it to plain LoRA with PEFT")
    for name in ("use_rslora", "use_dora"):
        if config.get(name) not in (None, True, False):
            raise must_be(name, "true or false")
    if not _is_number(config.get("r")) or type(config["r"]) is not int:
        raise must_be("r", "a whole number from 1")
    if not _is_number(config.get("lora_alpha")):
        raise must_be("lora_alpha", "a number above 0")
    saved = config.get("modules_to_save")
    if not (saved is None or _are_names(saved)):
        raise must_be("modules_to_save", "null or a list of names")
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if not (value is None or _is_pattern(value) or _are_names(value)):
            raise must_be(name, "null, a list of names or a regular expression")
    layers = config.get("layers_to_transform")
    if not all(type(layer) is int for layer in (layers if isinstance(layers, list) else [layers or 0])):
        raise must_be("layers_to_transform", "null, a layer's number or a list of them")
    patterns = {}
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns[name] = {} if config.get(name) is None else config[name]
        if not isinstance(patterns[name], dict) or not all(
            _is_pattern(pattern) and _is_number(value) and (type(value) is int or not whole)
            for pattern, value in patterns[name].items()
        ):
            raise must_be(name, "an object of numbers above 0 by patterns")
    return {**config, **patterns, "modules_to_save": saved or []}


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _low_rank(
    config: Mapping[str, Any], module: str, matrices: Mapping[str, str], tensors: TensorFiles, path: Path
) -> LowRank:
    expected = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
    if missing := sorted(expected - matrices.keys()):
        raise BadCheckpoint(f"{path} must hold all matrices of {quote(module)}, but lacks its lora_{missing[0]}")
    if matrices.keys() - expected:
        raise BadCheckpoint(f"{path} must not hold magnitudes without `use_dora`, but has one for {quote(module)}")
    rank = config["rank_pattern"].get(_pattern(config["rank_pattern"], module), config["r"])
    alpha = config["alpha_pattern"].get(_pattern(config["alpha_pattern"], module), config["lora_alpha"])
    for matrix, axis in (("A", 0), ("B", 1)):
        shape = tensors.places[matrices[matrix]].shape
        if len(shape) < 2 or shape[axis] != rank:
            raise BadCheckpoint(
                f"{quote(matrices[matrix])} in {path} must have the rank {rank} of {CONFIG}, got shape {list(shape)}"
            )
    return LowRank(module, rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank, matrices)


def _pattern(patterns: Iterable[str], module: str) -> str | None:
    """Return the first pattern that the end of a module's name matches, as PEFT does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _flat(name: str) -> str:
    """Return a name as in published checkpoints, for adapters of the whole model or of the part without a head."""
    name = re.sub(r"^language_model\.(model\.)?", "model.", name)
    return flat_name(re.sub(r"^(layers|embed_tokens|norm)\.", r"model.\1.", name))


def _is_saved(name: str, saved: Iterable[str], embeddings: bool = True) -> bool:
    """Return whether a tensor is of `modules_to_save`, ends of names; PEFT may save embeddings besides."""
    if embeddings and name in (HEAD, EMBEDDING):
        return True
    modules = name.split(".")
    paths = [".".join(modules[:end]) for end in range(1, len(modules))]
    return any(path.endswith((module, _flat(module))) for path in paths for module in saved)


def _is_target(adapter: PeftAdapter, module: str) -> bool:
    """Return whether `target_modules` certainly names a module: in the naming scheme of the file, or in both."""
    config = adapter.config
    targets, numbers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is None or config.get("exclude_modules") or config.get("layers_pattern"):
        return False
    if numbers is not None:
        number = re.search(r"\.(\d+)\.", module)
        if number is None or int(number[1]) not in (numbers if isinstance(numbers, list) else [numbers]):
            return False
    if targets == "all-linear":
        return True
    layers = {name.removesuffix(".weight"): layer.module for name, layer in adapter.layers.items()}
    nested = all(module == nested_name(name) for name, module in layers.items())
    spellings = {nested_name(module)} if nested else {module, nested_name(module)}
    if isinstance(targets, str):
        return all(re.fullmatch(targets, name) for name in spellings)
    return any(all(f".{name}".endswith(f".{target}") for name in spellings) for target in targets)


def _misshapen(path: Path, tensor: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    raise BadCheckpoint(
        f"{quote(tensor)} in {path} must have shape {list(expected)}, as in its base, got {list(shape)}"
    )
