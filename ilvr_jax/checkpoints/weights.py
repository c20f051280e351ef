"""The weights of published checkpoints: loaded onto a mesh with adapters and latent tokens, or converted."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ilvr_jax.checkpoints.adapters import WEIGHTS as ADAPTER_WEIGHTS
from ilvr_jax.checkpoints.adapters import PeftAdapter, check_fit, merge_adapter, replace_tensors, trained_matrices
from ilvr_jax.checkpoints.converted import is_converted, read_params, write_params
from ilvr_jax.checkpoints.pretrained import Pretrained, config_of, keep_description
from ilvr_jax.errors import listed
from ilvr_jax.files import check_new_folder, new_folder, write_json
from ilvr_jax.method.slots import with_slot_parameters
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.weights import HEAD, params_from_state_dict, published_shapes, put
from ilvr_jax.models.sharding import one_device, shardings
from ilvr_jax.models.tensor_files import BadCheckpoint, checkpoint_tensors, ignored_files, warn

MEAN_ROWS = 4096  # of an embedding, summed at a time


def load_params(
    pretrained: Pretrained,
    config: ModelConfig,
    dtype: str | Mapping[str, str],
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> PyTree:
    """Load the parameters tensor by tensor, with rows for the latent tokens and fresh adapters if `config` has them.

    `dtype` is that of all parts, or of each ("vision", "decoder"); adapters are float32. The mesh is by default one
    device. A saved adapter is merged, unless the run continues to train it (see `PeftAdapter.continues`).

    Raises BadCheckpoint as `params_from_state_dict` does, and if an adapter does not fit its base.
    """
    mesh, adapter, continues = mesh or one_device(), pretrained.adapter, False
    model = pretrained.backbone.model(config)
    whole = config_of(pretrained.hf_config)
    stored = config_of(pretrained.base_hf_config)
    base = {"tie_word_embeddings": stored.tie_word_embeddings, "lora": type(config.lora)()}
    stored = dataclasses.replace(config, vocab_size=stored.vocab_size, **base)
    if adapter:
        whole = dataclasses.replace(stored, tie_word_embeddings=whole.tie_word_embeddings, vocab_size=whole.vocab_size)
        adapter = fit_adapter(adapter, pretrained.backbone.model(whole), stored.vocab_size)
        continues = adapter.continues(config.lora, config.num_hidden_layers)
        if config.lora.rank and not continues:
            warn(
                f"merged the adapter of {adapter.folder} and trains fresh ones on top of it, since `model.lora` has "
                "other ranks or targets"
            )
    if is_converted(pretrained.folder):
        params = read_params(pretrained.folder, pretrained.backbone.model(stored), pretrained.dtype, dtype, mesh)
    else:
        tensors = checkpoint_tensors(pretrained.folder)
        if ignored := ignored_files(pretrained.folder, {place.path for place in tensors.places.values()}):
            warn(f"ignored weights in {pretrained.folder} that transformers does not load either: {listed(ignored)}")
        params = params_from_state_dict(tensors, stored, dtype, mesh)
    if adapter:
        if stored.tie_word_embeddings and not whole.tie_word_embeddings:
            params["decoder"]["lm_head"] = jnp.copy(params["decoder"]["embed_tokens"])
        params = replace_tensors(params, adapter)
        params = params if continues else merge_adapter(params, adapter)
    for name in {"embed_tokens", "lm_head"} & params["decoder"].keys():
        from_adapter = adapter is not None and adapter.has_table(name)
        if rows := pretrained.missing if from_adapter else pretrained.added:
            table = params["decoder"].pop(name)
            params["decoder"][name] = with_latent_rows(table, rows, config.vocab_size, pretrained.dtype)
    if config.lora.rank:
        params["adapters"] = jax.jit(lambda key: model.init(key)["adapters"])(key)
        if continues:
            params["adapters"] = trained_matrices(params["adapters"], adapter, config.lora)
    params = with_slot_parameters(model, params, key)
    return jax.device_put(params, shardings(params, mesh))  # those that are not there already


def fit_adapter(adapter: PeftAdapter, model: Model, base_rows: int) -> PeftAdapter:
    """Check that an adapter fits the model, and return it, without a head if that is tied to the embedding."""
    config = model.config
    if config.tie_word_embeddings:
        adapter = adapter._replace(replaced={name: tensor for name, tensor in adapter.replaced.items() if name != HEAD})
    elif config.vocab_size != base_rows and HEAD not in adapter.replaced:
        raise BadCheckpoint(
            f"{adapter.folder / ADAPTER_WEIGHTS} must hold the head, lm_head, with its {config.vocab_size} rows of the "
            f"embedding, since its base has {base_rows}"
        )
    check_fit(adapter, published_shapes(jax.eval_shape(model.init, jax.random.key(0)), config))
    return adapter


def with_latent_rows(
    table: Float[Array, "rows channels"], added: Sequence[int], vocabulary: int, dtype: str
) -> Float[Array, "vocabulary channels"]:
    """Return an embedding with `vocabulary` rows, where those of the `added` tokens are the mean of all rows before.

    The mean is rounded to `dtype`, the checkpoint's own, so that the rows do not depend on the dtype that it is loaded
    in. Donates the buffer of `table`.
    """
    first = min(added)
    # In blocks, since a CPU converts all of a bfloat16 array to float32 to sum it.
    blocks = (table[start : min(start + MEAN_ROWS, first)] for start in range(0, first, MEAN_ROWS))
    mean = (sum(block.sum(0, dtype=jnp.float32) for block in blocks) / first).astype(dtype)
    if vocabulary > len(table):
        table = jnp.pad(table, ((0, vocabulary - len(table)), (0, 0)))
    for row in added:
        table = put(table, mean, row)
    return table


def save_converted(pretrained: Pretrained, folder: Path) -> None:
    """Write a checkpoint as a converted folder: description, tokenizer and parameters, in the dtype of its config.

    Raises BadCheckpoint, and InputError and OSError as `new_folder` does.
    """
    config = pretrained.model_config()
    check_new_folder(folder)
    params = load_params(pretrained, config, pretrained.dtype, jax.random.key(0))
    with new_folder(folder):
        keep_description(pretrained, folder)
        pretrained.tokenizer.save_pretrained(folder)
        described = copy.deepcopy(dict(pretrained.hf_config))
        for section in (described, described.get("text_config") or {}):
            if "vocab_size" in section:
                section["vocab_size"] = config.vocab_size
        write_json(folder / "config.json", described)
        write_params(params, folder)
