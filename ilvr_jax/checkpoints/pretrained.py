"""Published Qwen2.5-VL checkpoints as the start of a run: from the hub, a folder, or a folder converted before."""

import contextlib
import dataclasses
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.adapters import CONFIG as ADAPTER_CONFIG
from ilvr_jax.checkpoints.adapters import WEIGHTS as ADAPTER_WEIGHTS
from ilvr_jax.checkpoints.adapters import (
    PeftAdapter,
    check_fit,
    is_adapter,
    merge_adapter,
    read_adapter,
    replace_tensors,
    trained_matrices,
)
from ilvr_jax.checkpoints.stop_tokens import GENERATION, check_stop_tokens, read_stop_tokens
from ilvr_jax.config.experiments import resolve_path
from ilvr_jax.config.schema import CLIP_MEAN, CLIP_STD
from ilvr_jax.data.images import image_processor_settings
from ilvr_jax.data.tokenizer import LATENT_TOKENS, add_latent_tokens, read_tokenizer
from ilvr_jax.errors import InputError, listed, quote
from ilvr_jax.files import (
    check_new_folder,
    check_room,
    copy,
    full_disk,
    is_full_disk,
    new_folder,
    read_json,
    read_object,
    write_json,
)
from ilvr_jax.method.slots import with_slot_parameters
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.published import published_dtype
from ilvr_jax.models.qwen2_5_vl.weights import (
    HEAD,
    has_own_head,
    is_nested,
    params_from_state_dict,
    published_shapes,
    put,
    stored_dtype,
)
from ilvr_jax.models.sharding import one_device, placed_like, shardings
from ilvr_jax.models.tensor_files import (
    INDEX,
    WEIGHTS,
    BadCheckpoint,
    checkpoint_tensors,
    ignored_files,
    read_index,
    warn,
)

# What is kept beside the weights; the tokenizer is saved by itself.
IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
# What exports hold as the checkpoint had it. Its chat_template.jinja is read and saved with the tokenizer.
KEPT = ("chat_template.json", "video_preprocessor_config.json", *IMAGE_PROCESSOR)
SOURCE = "source.json"  # in a converted folder and in a workdir: the naming scheme of the tensors that it began from
CONVERTED = "params"  # in a converted folder: the parameters, written by orbax
PIECE_BYTES = 2**26  # of the files of a converted folder: orbax holds several while it writes or reads
MEAN_ROWS = 4096  # of an embedding, summed at a time


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint whose description and tokenizer are read, and whose weights are still on disk."""

    folder: Path  # that of the base, for an adapter
    stored: Mapping[str, Any]  # its config.json, as its weights are
    published: Mapping[str, Any]  # the same with what the adapter changes
    tokenizer: PreTrainedTokenizerFast  # with latent tokens
    added: tuple[int, ...]  # ids of the latent tokens for which the folder has no embedding
    missing: tuple[int, ...]  # those of them that the tokenizer came without: it has never learnt to look
    stop: tuple[int, ...]  # ids that end an answer
    adapter: PeftAdapter | None = None

    @property
    def nested(self) -> bool:
        """Whether its tensors have nested names; see `models.checkpoint`."""
        if (self.folder / CONVERTED).is_dir():
            return read_nested(self.folder)
        return is_nested(checkpoint_tensors(self.folder))

    @property
    def dtype(self) -> str:
        """Returns the dtype of its weights, float32 if neither its config nor a file names one."""
        return published_dtype(self.published) or "float32"

    def base(self, config: ModelConfig, name: str) -> str:
        """Returns the name of what adapters that begin here are for, `name` being this checkpoint's.

        It is empty if that is a merged model, of which there is no folder.
        """
        if self.adapter is None:
            return name
        trained_on = self.adapter.continues(config.lora, config.num_hidden_layers) and not self.adapter.replaced
        return self.adapter.config["base_model_name_or_path"] if trained_on else ""


def open_init_from(init_from: str, weights: bool = True) -> Pretrained:
    """Return the checkpoint that `model.init_from` names; without `weights` the hub is asked for no tensors."""
    path = resolve_path(init_from)
    return open_pretrained(path if path.is_dir() else init_from, weights)


def open_pretrained(name: str | Path, weights: bool = True) -> Pretrained:
    """Reads description and tokenizer of a checkpoint: a folder, or a name on the Hugging Face hub.

    It may be an adapter of PEFT, on the base that its config names, or on another: ADAPTER@BASE.

    Without `weights` the hub is asked for these alone, and the tensors may not be there.

    Raises BadCheckpoint if it cannot be found or fetched, is not a Qwen2.5-VL, or its tokenizer has more tokens than
    the embedding has rows.
    """
    name, base = split_name(name)
    folder = find_folder(name, weights)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    if adapter:
        adapter, folder = find_base(adapter, base, weights)
    elif base:
        raise BadCheckpoint(f"{name} must be a folder with {ADAPTER_CONFIG} to be put on {base}, but has none")
    stored = as_weights_are(read_published(folder), folder)
    if other := stored.get("transformers_weights"):
        raise BadCheckpoint(f"{folder / 'config.json'} must not have `transformers_weights`, got {quote(other)}")
    for kept in KEPT:
        if os.path.lexists(folder / kept):
            read_object(folder / kept, BadCheckpoint)
    check_stop_tokens(folder)
    published = adapter.changed(stored) if adapter else stored
    rows = model_config_from_hf(published).vocab_size
    try:
        tokenizer = read_tokenizer(folder)
        lacking = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
        if adapter and (adapter.folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(adapter.folder)
        used = len(tokenizer.get_vocab().keys() - set(lacking))
        missing = add_latent_tokens(tokenizer)
        added = tuple(tokenizer.convert_tokens_to_ids(lacking))
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error
    if used > rows:
        raise BadCheckpoint(
            f"{folder} must have an embedding row for each token, but has {used} tokens and {rows} rows"
        )
    check_image_processor(folder)
    check_image_token(published, folder, tokenizer)
    stop = read_stop_tokens(folder, tokenizer, rows)
    return Pretrained(folder, stored, published, tokenizer, added, missing, stop, adapter)


def split_name(name: str | Path) -> tuple[str | Path, str]:
    """Returns the two parts of ADAPTER@BASE, the second empty for all other names."""
    if os.path.isdir(name) or "@" not in str(name):
        return name, ""
    name, _, base = str(name).partition("@")
    return name, base


def names_adapter(name: str | Path) -> bool:
    """Returns whether a name is that of an adapter's folder, with its base or without."""
    folder = Path(split_name(name)[0])
    return os.path.isdir(folder) and is_adapter(folder)


def find_base(adapter: PeftAdapter, given: str, weights: bool = True) -> tuple[PeftAdapter, Path]:
    """Returns an adapter with the name of its base as `given`, else as its config has it, and the folder of that base.

    Raises BadCheckpoint if there is none.
    """
    name = given or adapter.config.get("base_model_name_or_path")
    where = "the base" if given else f"`base_model_name_or_path` in {adapter.folder / ADAPTER_CONFIG}"
    wanted = f"{where} must be a folder or a hub name of the whole model (or give one: ADAPTER@BASE), got {quote(name)}"
    if not isinstance(name, str) or not name:
        raise BadCheckpoint(wanted)
    # Relative to the working directory, as PEFT reads it, or to the adapter.
    folders = [path for path in (os.path.expanduser(name), adapter.folder / name) if os.path.isdir(path)]
    if folders:
        folder = Path(folders[0])
        name = str(folder.absolute())
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise BadCheckpoint(f"{wanted}, which is not there")
    elif not given and (revision := adapter.config.get("revision")) not in (None, "main"):
        raise BadCheckpoint(
            f"`revision` in {adapter.folder / ADAPTER_CONFIG} must be null or 'main', got {quote(revision)}; "
            "fetch that revision and give its folder: ADAPTER@BASE"
        )
    else:
        try:
            folder = find_folder(name, weights)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{where}: {error}, as ADAPTER@BASE") from error
    if is_adapter(folder):
        raise BadCheckpoint(f"{wanted}, an adapter itself: merge that first (convert to-hf)")
    return adapter._replace(config={**adapter.config, "base_model_name_or_path": name}), folder


def check_image_token(published: Mapping[str, Any], folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises BadCheckpoint if a checkpoint's images go where its tokenizer has another token than ours do."""
    token = published.get("image_token_id", len(tokenizer))
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if name not in (None, "<|image_pad|>"):
        raise BadCheckpoint(
            f"{folder / 'config.json'}: `image_token_id` must be the number of <|image_pad|>, got {token}, that of "
            f"{quote(name)}"
        )


def check_image_processor(folder: Path) -> None:
    """Raises BadCheckpoint if a checkpoint's images are to be treated in another way than ours are."""
    if not any((folder / name).is_file() for name in IMAGE_PROCESSOR):
        return
    try:
        processor = image_processor_settings(folder)
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error
    for name, value in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        if not np.allclose(processor[name], value):
            raise BadCheckpoint(f"{folder}: `{name}` of its images must be {value}, got {processor[name]}")


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint, fetched from the hub if `name` is not a folder; raises BadCheckpoint."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "~", "/")):
        raise BadCheckpoint(f"{name} must be the folder of a checkpoint, or a name on the hub, and is neither")
    try:
        folder = _fetch(name, ["*.json", "*.txt", "*.jinja"])
        if weights:
            _fetch(name, [WEIGHTS])
            if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
                _fetch(name, sorted(set(read_index(folder).values())))
        if is_adapter(folder):
            _fetch(name, [ADAPTER_WEIGHTS])
        return folder
    except BadCheckpoint:
        raise
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadCheckpoint(
            f"{name} is no folder here and could not be fetched from the hub ({first_line}); without a network, give "
            f"the folder that holds its config.json and {WEIGHTS}"
        ) from error


def _fetch(name: str | Path, patterns: Sequence[str]) -> Path:
    """Returns the folder in the hub's cache into which a repository's files of these names are fetched."""
    others = ["*/*.json", "*/*.txt"]  # such as those of training's own checkpoints
    return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=others))


def read_published(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's config.json; raises BadCheckpoint if there is none or its model cannot be built here."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise BadCheckpoint(f"{folder} has no config.json; a folder of a published checkpoint must have one")
    published = read_json(path, BadCheckpoint)
    kind = published.get("model_type") if isinstance(published, dict) else None
    if kind != "qwen2_5_vl":
        raise BadCheckpoint(f"{path} must have the `model_type` 'qwen2_5_vl', got {quote(kind)}")
    try:
        model_config_from_hf(published)
    except InputError as error:
        # The fields of our own config have the names of the published ones.
        sentence = str(error).replace("`model.vision.", "`vision_config.").replace("`model.", "`")
        raise BadCheckpoint(f"{path}: {sentence}") from error
    return published


def as_weights_are(published: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a config.json with what the weights decide: a dtype if it has none, and that a head of its own is kept.

    The latter is what transformers does, whatever `tie_word_embeddings` is; a line on stderr names it.
    """
    tied, dtype = model_config_from_hf(published).tie_word_embeddings, published_dtype(published)
    if not tied and dtype:
        return published
    try:
        tensors = checkpoint_tensors(folder)
    except BadCheckpoint:  # they are not there, and raise the same where they are needed
        return published
    if not dtype:
        published = published | {"dtype": stored_dtype(tensors)}
    if tied and has_own_head(tensors):
        warn(
            f"{folder / 'config.json'} has `tie_word_embeddings` true, but {HEAD} differs from the embedding: both are "
            "used, as transformers does"
        )
        published = published | {"tie_word_embeddings": False}
        if published.get("text_config"):
            published["text_config"] = published["text_config"] | {"tie_word_embeddings": False}
    return published


def keep_description(pretrained: Pretrained, folder: Path, **facts: str) -> None:
    """Copies into `folder` what describes the model and its images, for reading the weights of a run later.

    `facts` are kept in it, too, beside the naming scheme.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (GENERATION, *KEPT):
        if (pretrained.folder / name).is_file():
            copy(pretrained.folder / name, folder / name)
    write_json(folder / "config.json", pretrained.published)
    write_json(folder / SOURCE, {"nested": pretrained.nested, **facts})


def read_nested(folder: Path) -> bool:
    """Returns whether tensors had nested names in the checkpoint that `keep_description` wrote into a folder.

    Raises BadCheckpoint, naming the file, if it is damaged.
    """
    nested = read_object(folder / SOURCE, BadCheckpoint).get("nested")
    if type(nested) is not bool:
        raise BadCheckpoint(f"{folder / SOURCE} must have `nested`, true or false, got {quote(nested)}")
    return nested


def load_params(
    pretrained: Pretrained,
    config: ModelConfig,
    dtype: str | Mapping[str, str],
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> PyTree:
    """Returns the parameters, tensor by tensor, with rows for the latent tokens and fresh adapters if there are any.

    `dtype` is that of all parts, or of each ("vision", "decoder"); adapters are float32. They lie on the mesh, by
    default one device. A saved adapter is merged, or the one that is trained on (see `PeftAdapter.continues`).

    Raises BadCheckpoint as `params_from_state_dict` does, and if an adapter does not fit its base.
    """
    mesh, adapter, trained_on = mesh or one_device(), pretrained.adapter, False
    whole = model_config_from_hf(pretrained.published)
    stored = model_config_from_hf(pretrained.stored)
    base = {"tie_word_embeddings": stored.tie_word_embeddings, "lora": type(config.lora)()}
    stored = dataclasses.replace(config, vocab_size=stored.vocab_size, **base)
    if adapter:
        whole = dataclasses.replace(stored, tie_word_embeddings=whole.tie_word_embeddings, vocab_size=whole.vocab_size)
        adapter = fitted(adapter, whole, stored)
        trained_on = adapter.continues(config.lora, config.num_hidden_layers)
        if config.lora.rank and not trained_on:
            warn(
                f"merged the adapter of {adapter.folder}, and fresh ones are trained on top of it: `model.lora` has "
                "other ranks or targets"
            )
    if (pretrained.folder / CONVERTED).is_dir():
        params = _restore_converted(pretrained.folder, stored, pretrained.dtype, dtype, mesh)
    else:
        tensors = checkpoint_tensors(pretrained.folder)
        if ignored := ignored_files(pretrained.folder, {place.path for place in tensors.places.values()}):
            warn(f"ignored weights in {pretrained.folder} that transformers does not load either: {listed(ignored)}")
        params = params_from_state_dict(tensors, stored, dtype, mesh)
    if adapter:
        if stored.tie_word_embeddings and not whole.tie_word_embeddings:
            params["decoder"]["lm_head"] = jnp.copy(params["decoder"]["embed_tokens"])
        params = replace_tensors(params, adapter)
        params = params if trained_on else merge_adapter(params, adapter)
    for name in {"embed_tokens", "lm_head"} & params["decoder"].keys():
        own = adapter is not None and adapter.has_table(name)
        if rows := pretrained.missing if own else pretrained.added:
            table = params["decoder"].pop(name)
            params["decoder"][name] = with_latent_rows(table, rows, config.vocab_size)
    if config.lora.rank:
        params["adapters"] = jax.jit(lambda key: Qwen2_5VL(config).init(key)["adapters"])(key)
        if trained_on:
            params["adapters"] = trained_matrices(params["adapters"], adapter, config.lora)
    params = with_slot_parameters(Qwen2_5VL(config), params, key)
    return jax.device_put(params, shardings(params, mesh))  # where they are not there already


def fitted(adapter: PeftAdapter, whole: ModelConfig, base: ModelConfig) -> PeftAdapter:
    """Returns an adapter after a check that it fits the model; tied to the embedding, a head is not kept twice."""
    if whole.tie_word_embeddings:
        adapter = adapter._replace(replaced={name: own for name, own in adapter.replaced.items() if name != HEAD})
    elif whole.vocab_size != base.vocab_size and HEAD not in adapter.replaced:
        raise BadCheckpoint(
            f"{adapter.folder / ADAPTER_WEIGHTS} must hold the head, lm_head, with its {whole.vocab_size} rows of the "
            f"embedding, since its base has {base.vocab_size}"
        )
    check_fit(adapter, published_shapes(jax.eval_shape(Qwen2_5VL(whole).init, jax.random.key(0)), whole))
    return adapter


def with_latent_rows(
    table: Float[Array, "rows channels"], added: Sequence[int], vocabulary: int
) -> Float[Array, "vocabulary channels"]:
    """Returns an embedding with `vocabulary` rows, those of the `added` tokens being the mean of all used before.

    It gives away the buffer of `table`.
    """
    first = min(added)
    # In blocks, since a CPU sums bfloat16 by turning all of it into float32 first.
    blocks = (table[start : min(start + MEAN_ROWS, first)] for start in range(0, first, MEAN_ROWS))
    mean = sum(block.sum(0, dtype=jnp.float32) for block in blocks) / first
    if vocabulary > len(table):
        table = jnp.pad(table, ((0, vocabulary - len(table)), (0, 0)))
    for row in added:
        table = put(table, mean, row)
    return table


def save_converted(pretrained: Pretrained, folder: Path) -> None:
    """Writes a checkpoint as a folder that `open_pretrained` reads faster: description, tokenizer, orbax parameters.

    Weights keep the dtype that the config names. Raises BadCheckpoint, and InputError and OSError as `new_folder` does.
    """
    config = model_config_from_hf(pretrained.published)
    vocabulary = max(config.vocab_size, len(pretrained.tokenizer))
    config = dataclasses.replace(config, vocab_size=vocabulary)
    check_new_folder(folder)
    params = load_params(pretrained, config, pretrained.dtype, jax.random.key(0))
    with new_folder(folder):
        keep_description(pretrained, folder)
        pretrained.tokenizer.save_pretrained(folder)
        write_published({**pretrained.published}, vocabulary, folder)
        # Found out before, since orbax's threads would write and print tracebacks long after they have failed.
        check_room(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)), PIECE_BYTES)
        with _failed_tasks_are_silent():
            written = _write_params(params, folder / CONVERTED)
        if not written:
            raise full_disk(folder)


def _write_params(params: PyTree, path: Path) -> bool:
    """Writes parameters with orbax; returns whether there was room for them."""
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES), params)
    try:
        with _checkpointer(params) as writer:
            arguments = ocp.args.PyTreeSave(params, pieces, ocdbt_target_data_file_size=PIECE_BYTES)
            writer.save(path.absolute(), arguments)
    except Exception as error:  # the file system's error, wrapped by tensorstore
        if not is_full_disk(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    return True


@contextlib.contextmanager
def _failed_tasks_are_silent() -> Iterator[None]:
    """Keeps the tasks that a failed write of orbax leaves behind from printing a traceback each; it raises as well."""
    tasks, hooks = logging.getLogger("asyncio"), (sys.excepthook, sys.unraisablehook)
    tasks.disabled, sys.excepthook, sys.unraisablehook = True, lambda *_: None, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        tasks.disabled, (sys.excepthook, sys.unraisablehook) = False, hooks


def write_published(published: dict[str, Any], vocabulary: int, folder: Path) -> None:
    """Writes config.json with the number of embedding rows, wherever the published one has it."""
    for section in (published, published.get("text_config") or {}):
        if "vocab_size" in section:
            section["vocab_size"] = vocabulary
    write_json(folder / "config.json", published)


def _restore_converted(
    folder: Path, config: ModelConfig, stored: str, dtype: str | Mapping[str, str], mesh: Mesh
) -> PyTree:
    """Returns the parameters of a converted folder that keeps them as `stored`."""

    def wanted(keys) -> str:
        return dtype if isinstance(dtype, str) else dtype[keys[0].key]

    def like(keys, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        narrower = min(stored, wanted(keys), key=lambda name: jnp.dtype(name).itemsize)
        return jax.ShapeDtypeStruct(leaf.shape, narrower, sharding=leaf.sharding)

    def widen(keys, leaf: jax.Array) -> jax.Array:  # orbax would hold what it widens three times
        if leaf.dtype == wanted(keys):
            return leaf
        wide = jax.block_until_ready(leaf.astype(wanted(keys)))
        leaf.delete()
        return wide

    shapes = placed_like(jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0)), mesh)
    shapes = jax.tree_util.tree_map_with_path(like, shapes)
    with _checkpointer(shapes) as reader:
        arguments = ocp.args.PyTreeRestore(shapes, ocp.checkpoint_utils.construct_restore_args(shapes))
        params = reader.restore((folder / CONVERTED).absolute(), arguments)
    return jax.tree_util.tree_map_with_path(widen, params)


def _checkpointer(params: PyTree) -> ocp.Checkpointer:
    """Returns what reads and writes parameters without all of them in host memory at once."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    room = 1 + largest // 10**9  # orbax counts in GB and takes no parameter that fills them
    handler = ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=room, restore_concurrent_gb=room)
    return ocp.Checkpointer(handler)
