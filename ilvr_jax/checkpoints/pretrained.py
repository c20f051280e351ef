"""Published Qwen2.5-VL checkpoints: found on the hub or in a folder, and their descriptions and tokenizers read."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.adapters import CONFIG as ADAPTER_CONFIG
from ilvr_jax.checkpoints.adapters import WEIGHTS as ADAPTER_WEIGHTS
from ilvr_jax.checkpoints.adapters import PeftAdapter, is_adapter, read_adapter
from ilvr_jax.checkpoints.converted import SOURCE, is_converted, read_nested
from ilvr_jax.checkpoints.stop_tokens import GENERATION, check_stop_tokens, read_stop_tokens
from ilvr_jax.config.experiments import resolve_path
from ilvr_jax.config.schema import CLIP_MEAN, CLIP_STD
from ilvr_jax.data.images import image_processor_settings
from ilvr_jax.data.tokenizer import LATENT_TOKENS, add_latent_tokens, read_tokenizer
from ilvr_jax.errors import InputError, quote
from ilvr_jax.files import copy, read_json, read_object, write_json
from ilvr_jax.models import BACKBONES
from ilvr_jax.models.base import Backbone
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.published import published_dtype
from ilvr_jax.models.qwen2_5_vl.weights import HEAD, has_own_head, is_nested, stored_dtype
from ilvr_jax.models.tensor_files import INDEX, WEIGHTS, BadCheckpoint, checkpoint_tensors, read_index, warn

IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
# Copied as they are into workdirs and exports. The tokenizer, with its chat_template.jinja, is saved by itself.
COPIED = ("chat_template.json", "video_preprocessor_config.json", *IMAGE_PROCESSOR)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint with its description and tokenizer in memory, and its weights still on disk."""

    folder: Path  # that of the base, for an adapter
    base_hf_config: Mapping[str, Any]  # the config.json in `folder`, corrected by `with_weight_facts`
    hf_config: Mapping[str, Any]  # the same with the adapter's changes
    tokenizer: PreTrainedTokenizerFast  # with latent tokens
    added: tuple[int, ...]  # ids of the latent tokens without an embedding in the folder
    missing: tuple[int, ...]  # ids of those that the tokenizer lacked too: the model has not been trained to look
    stop: tuple[int, ...]  # ids that end an answer
    adapter: PeftAdapter | None = None

    @property
    def nested(self) -> bool:
        """Whether its tensors have nested names; see `models.qwen2_5_vl.weights`."""
        if is_converted(self.folder):
            return read_nested(self.folder)
        return is_nested(checkpoint_tensors(self.folder))

    @property
    def dtype(self) -> str:
        """The dtype of its weights, float32 if neither its config nor a file names one."""
        return published_dtype(self.hf_config) or "float32"

    @property
    def backbone(self) -> Backbone:
        """Its kind of model."""
        return BACKBONES[self.hf_config["model_type"]]

    def model_config(self, **changes: Any) -> ModelConfig:
        """Return the model's shape, with `changes` and an embedding row for each token."""
        config = config_of(self.hf_config, **changes)
        return dataclasses.replace(config, vocab_size=max(config.vocab_size, len(self.tokenizer)))

    def base(self, config: ModelConfig, name: str) -> str:
        """Return the name of the model for which adapters trained from here are; `name` is that of this checkpoint.

        It is empty if that model is an adapter merged into its base, which no folder holds.
        """
        if self.adapter is None:
            return name
        continued = self.adapter.continues(config.lora, config.num_hidden_layers) and not self.adapter.replaced
        return self.adapter.config["base_model_name_or_path"] if continued else ""


def open_init_from(init_from: str, weights: bool = True) -> Pretrained:
    """Open the checkpoint that `model.init_from` names; without `weights` no tensors are fetched from the hub."""
    path = resolve_path(init_from)
    return open_pretrained(path if path.is_dir() else init_from, weights)


def open_pretrained(name: str | Path, weights: bool = True) -> Pretrained:
    """Read description and tokenizer of a checkpoint: a folder, or a name on the Hugging Face hub.

    An adapter of PEFT is opened on the base that its config names, ADAPTER@BASE on another.

    Without `weights` no tensors are fetched from the hub.

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
    base_hf_config = with_weight_facts(read_published(folder), folder)
    if other := base_hf_config.get("transformers_weights"):
        raise BadCheckpoint(f"{folder / 'config.json'} must not have `transformers_weights`, got {quote(other)}")
    for file in COPIED:
        if os.path.lexists(folder / file):
            read_object(folder / file, BadCheckpoint)
    check_stop_tokens(folder)
    hf_config = adapter.changed(base_hf_config) if adapter else base_hf_config
    rows = config_of(hf_config).vocab_size
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
    check_image_token(hf_config, folder, tokenizer)
    stop = read_stop_tokens(folder, tokenizer, rows)
    return Pretrained(folder, base_hf_config, hf_config, tokenizer, added, missing, stop, adapter)


def split_name(name: str | Path) -> tuple[str | Path, str]:
    """Return the two parts of ADAPTER@BASE; the second is empty for all other names."""
    if os.path.isdir(name) or "@" not in str(name):
        return name, ""
    name, _, base = str(name).partition("@")
    return name, base


def names_adapter(name: str | Path) -> bool:
    """Return whether a name is that of an adapter's folder, with or without its base."""
    folder = Path(split_name(name)[0])
    return os.path.isdir(folder) and is_adapter(folder)


def find_base(adapter: PeftAdapter, given: str, weights: bool = True) -> tuple[PeftAdapter, Path]:
    """Find the base of an adapter, `given` or named by its config; return the adapter with that name, and the folder.

    Raises BadCheckpoint if there is none.
    """
    name = given or adapter.config.get("base_model_name_or_path")
    field = "the base" if given else f"`base_model_name_or_path` in {adapter.folder / ADAPTER_CONFIG}"
    problem = (
        f"{field} must be a folder or a hub name of a complete model (to use another base, write ADAPTER@BASE), "
        f"got {quote(name)}"
    )
    if not isinstance(name, str) or not name:
        raise BadCheckpoint(problem)
    # Relative to the working directory, as PEFT reads it, or to the adapter.
    folders = [path for path in (os.path.expanduser(name), adapter.folder / name) if os.path.isdir(path)]
    if folders:
        folder = Path(folders[0])
        name = str(folder.absolute())
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise BadCheckpoint(f"{problem}, which does not exist")
    elif not given and (revision := adapter.config.get("revision")) not in (None, "main"):
        raise BadCheckpoint(
            f"`revision` in {adapter.folder / ADAPTER_CONFIG} must be null or 'main', got {quote(revision)}; "
            "fetch that revision and give its folder: ADAPTER@BASE"
        )
    else:
        try:
            folder = find_folder(name, weights)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{field}: {error}, as ADAPTER@BASE") from error
    if is_adapter(folder):
        raise BadCheckpoint(f"{problem}, an adapter itself: merge that first (convert to-hf)")
    return adapter._replace(config={**adapter.config, "base_model_name_or_path": name}), folder


def check_image_token(hf_config: Mapping[str, Any], folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise BadCheckpoint unless `image_token_id` is the tokenizer's <|image_pad|>."""
    token = hf_config.get("image_token_id", len(tokenizer))
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if name not in (None, "<|image_pad|>"):
        raise BadCheckpoint(
            f"{folder / 'config.json'}: `image_token_id` must be the id of <|image_pad|>, got {token}, that of "
            f"{quote(name)}"
        )


def check_image_processor(folder: Path) -> None:
    """Raise BadCheckpoint unless a checkpoint's image processor normalises images as ours does."""
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
    """Return the folder of a checkpoint, fetched from the hub if `name` is not a folder; raises BadCheckpoint."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "~", "/")):
        raise BadCheckpoint(f"{name} must be the folder of a checkpoint or a name on the hub, but is neither")
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
            f"{name} is not a folder and could not be fetched from the hub ({first_line}); without a network, give "
            f"the folder that holds its config.json and {WEIGHTS}"
        ) from error


def _fetch(name: str | Path, patterns: Sequence[str]) -> Path:
    """Fetch the files of these names from a repository, and return their folder in the hub's cache."""
    others = ["*/*.json", "*/*.txt"]  # in subfolders, such as those of a training run's checkpoints
    return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=others))


def read_published(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json; raises BadCheckpoint if there is none or its model cannot be built."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise BadCheckpoint(f"{folder} has no config.json; a folder of a published checkpoint must have one")
    published = read_json(path, BadCheckpoint)
    kind = published.get("model_type") if isinstance(published, dict) else None
    if not isinstance(kind, str) or kind not in BACKBONES:
        known = " or ".join(map(quote, BACKBONES))
        raise BadCheckpoint(f"{path} must have the `model_type` {known}, got {quote(kind)}")
    try:
        config_of(published)
    except InputError as error:
        # The fields of our own config have the names of the published ones.
        sentence = str(error).replace("`model.vision.", "`vision_config.").replace("`model.", "`")
        raise BadCheckpoint(f"{path}: {sentence}") from error
    return published


def config_of(hf_config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """Return the shape of a published model, of any backbone, with `changes`."""
    return BACKBONES[hf_config["model_type"]].config_from_published(hf_config, **changes)


def with_weight_facts(published: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config.json corrected by the weights: with their dtype if it has none, and untied if they have a head.

    Like transformers, a head that differs from the embedding is used whatever `tie_word_embeddings` is; a line on
    stderr names it.
    """
    tied, dtype = config_of(published).tie_word_embeddings, published_dtype(published)
    if not tied and dtype:
        return published
    try:
        tensors = checkpoint_tensors(folder)
    except BadCheckpoint:  # raised again where the tensors are needed
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
    """Copy the description of the model and its images into `folder`, for reading the weights of a run later.

    `facts` are written beside the naming scheme.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (GENERATION, *COPIED):
        if (pretrained.folder / name).is_file():
            copy(pretrained.folder / name, folder / name)
    write_json(folder / "config.json", pretrained.hf_config)
    write_json(folder / SOURCE, {"nested": pretrained.nested, **facts})
