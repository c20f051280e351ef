"""The conformance vectors: model, parameters and samples as in the published code."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np

from ilvr_jax.method.layout import Sample, build_sample
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage
from ilvr_jax.models.qwen2_5_vl.weights import params_from_state_dict

SHARED = Path(__file__).parents[2] / "shared"  # optional data, beside the repository
COPIES = Path(__file__).parent / "data" / "conformance"
DEFAULT = SHARED / "conformance" if (SHARED / "conformance").is_dir() else COPIES


def weights_module(folder: Path):
    """Import the vectors' own weights.py (the copy in tests/data where `folder` has none)."""
    path = folder / "weights.py" if (folder / "weights.py").exists() else COPIES / "weights.py"
    spec = importlib.util.spec_from_file_location("conformance_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Vector:
    """One conformance file."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.weights = weights_module(path.parent)
        with np.load(path) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def special(self) -> SpecialTokens:
        ids = self.weights.TOKENS
        names = ("im_start", "im_end", "assistant", "vision_start", "vision_end", "image_pad")
        latent = ("latent_start", "latent_pad", "latent_end")
        return SpecialTokens(pad=ids["endoftext"], **{name: ids[name] for name in (*names, *latent)})

    @property
    def config(self) -> ModelConfig:
        return model_config_from_hf({**self.weights.CONFIG, **self.meta["config_overrides"]})

    def state_dict(self, seed: int) -> dict[str, np.ndarray]:
        """Return every tensor of the random model drawn with `seed`, by checkpoint name."""
        return {name: self.weights.weight(name, shape, seed) for name, shape in tensor_shapes(self.config).items()}

    def params(self, seed_name: str = "weight_seed"):
        state = self.state_dict(self.meta[seed_name])
        for row, scale in self.arrays.get("lm_head_row_scale", ()):
            head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
            state[head][int(row)] *= np.float32(scale)
        return params_from_state_dict(state, self.config)

    def images(self, suffix: str = "") -> list[PatchedImage]:
        grids = self.arrays.get("image_grid_thw" + suffix, ())
        if not len(grids):
            return []
        pixels = np.split(self["pixel_values" + suffix], np.cumsum(grids.prod(axis=1))[:-1])
        return [PatchedImage(p, int(h), int(w)) for p, (_, h, w) in zip(pixels, grids, strict=True)]

    def sample(self, record: int = 0) -> Sample:
        tokens = self["input_ids"][0]
        size = self.meta["latent_size"]
        return build_sample(tokens, self.images(), self.images("_latent"), self.special, size, record)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published checkpoint of this configuration, in PyTorch's layout."""
    hidden, vision = config.hidden_size, config.vision
    keys = config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        for name, size in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            shapes |= {f"{block}self_attn.{name}.weight": (size, hidden), f"{block}self_attn.{name}.bias": (size,)}
        shapes[block + "self_attn.o_proj.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{block}mlp.{name}.weight"] = (config.intermediate_size, hidden)
        shapes[block + "mlp.down_proj.weight"] = (hidden, config.intermediate_size)
        shapes |= {f"{block}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = (width, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes["visual.patch_embed.proj.weight"] = patch
    for layer in range(vision.depth):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        for name, shape in linears.items():
            shapes[f"visual.blocks.{layer}.{name}.weight"] = shape
            shapes[f"visual.blocks.{layer}.{name}.bias"] = shape[:1]
        shapes |= {f"visual.blocks.{layer}.{name}.weight": (width,) for name in ("norm1", "norm2")}
    merged = 4 * width
    for name, shape in {"mlp.0": (merged, merged), "mlp.2": (vision.out_hidden_size, merged)}.items():
        shapes |= {f"visual.merger.{name}.weight": shape, f"visual.merger.{name}.bias": shape[:1]}
    return shapes | {"visual.merger.ln_q.weight": (width,)}


@functools.cache
def read(path: Path) -> Vector:
    return Vector(path)


def of_kind(folder: Path, kind: str) -> list[Vector]:
    """Return the vectors of a kind in a folder, in the order of their names."""
    return [vector for path in sorted(folder.glob("*.npz")) if (vector := read(path)).meta["kind"] == kind]
