"""The backbone against transformers' Qwen2.5-VL in PyTorch, and its cache against the uncached pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.inference.kv_cache import init_kv_cache, write_columns
from ilvr_jax.method.layout import build_sample, collate, required_layout, sample_columns
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.decoder import split_layers
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import params_from_state_dict
from tests.samples import CONFIG, GEOMETRY, SPECIAL, random_sample

torch = pytest.importorskip("torch", reason="the oracle is transformers' PyTorch model (requirements-dev.txt)")

WEIGHT_TOLERANCE = 1e-5  # of attention weights in float32
# As the card of the published models has it, with their 64 pairs of channels and 32768 positions made small.
YARN = {"type": "yarn", "mrope_section": [4, 6, 6], "factor": 4, "original_max_position_embeddings": 64}
# Shape of the decoder, of the vision tower, and the images of a sample in vision tokens.
SHAPES = {
    "several images, untied": (
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"window_size": 56, "fullatt_block_indexes": [1, 3], "num_heads": 2},
        [(2, 2), (3, 5), (1, 4)],
    ),
    "very different sizes, tied": (
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"window_size": 112, "fullatt_block_indexes": [2], "num_heads": 4},
        [(1, 1), (9, 7)],
    ),
    "all heads own keys, small windows": (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"window_size": 28, "fullatt_block_indexes": [0], "num_heads": 2},
        [(4, 6)],
    ),
    "positions scaled by YaRN": (
        {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": YARN},
        {"window_size": 56, "fullatt_block_indexes": [1], "num_heads": 2},
        [(3, 2), (9, 7)],
    ),
}


def oracle(text: dict, vision: dict):
    """Return transformers' model with random weights, and the config that describes it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    head_dim = 64 // text["num_attention_heads"]
    config = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), *[head_dim // 6] * 2]},
        "image_token_id": 6,
        "video_token_id": 60,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "in_channels": 3,
            "out_hidden_size": 64,
            **vision,
        },
        **text,
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # transformers starts biases at 0 and norms at 1
            if name.endswith("bias") or weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.mul_(3.0)
    return model, model_config_from_hf(config)


def newer_names(state: dict) -> dict:
    """Return the tensors under `model.language_model...` and `model.visual...`."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            name = "model." + name
        elif name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
            name = "model.language_model." + name.removeprefix("model.")
        renamed[name] = tensor
    return renamed


def older_names(state: dict) -> dict:
    """Return the tensors under `model...` and `visual...`."""
    shorter = {"model.language_model.": "model.", "model.visual.": "visual."}
    return {_replaced(name, shorter): tensor for name, tensor in state.items()}


def _replaced(name: str, changes: dict) -> str:
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("shape", SHAPES)
def test_features_and_logits_equal_pytorch(shape):
    text, vision, grids = SHAPES[shape]
    reference, config = oracle(text, vision)
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    rng = np.random.default_rng(1)
    images = [
        PatchedImage(rng.standard_normal((4 * rows * columns, 1176)).astype(np.float32), 2 * rows, 2 * columns)
        for rows, columns in grids
    ]
    tokens = [1, 20, 21]
    for rows, columns in grids:
        tokens += [4, *[6] * (rows * columns), 5, 22]
    tokens = np.array([*tokens, 23, 24, 1, 3, *rng.integers(10, 60, 9)])
    special = SpecialTokens(**{**SPECIAL.__dict__})
    sample = build_sample(tokens, images, [], special, 1)
    layout = required_layout(sample, config.vision.geometry)
    batch = collate([sample], layout, special, config.vision.geometry)
    model = Qwen2_5VL(config)

    pixels = torch.tensor(np.concatenate([image.pixels for image in images]))
    grid = torch.tensor([[1, image.height, image.width] for image in images])
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        expected_features = reference.model.visual(pixels, grid).pooler_output.numpy()
        expected_logits = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == 6).int(),
        ).logits.numpy()

    for names in (older_names, newer_names):
        params = params_from_state_dict(names(state), config)
        features = model.encode_images(params["vision"], batch.images)
        np.testing.assert_allclose(np.asarray(features)[batch.images.unit_valid], expected_features, atol=2e-4)
        inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
        hidden, _ = model.decode(params["decoder"], inputs, batch.positions, causal_mask(batch.valid))
        logits = model.logits(params["decoder"], hidden)
        np.testing.assert_allclose(logits, expected_logits, atol=2e-4)


def test_attention_weights_equal_pytorch():
    """The weights of a padded sample with two images, in its last layers, against those of eager attention."""
    text, vision, grids = SHAPES["several images, untied"]
    reference, config = oracle(text, vision)
    reference.set_attn_implementation("eager")
    rng = np.random.default_rng(3)
    images = [
        PatchedImage(rng.standard_normal((4 * rows * columns, 1176)).astype(np.float32), 2 * rows, 2 * columns)
        for rows, columns in grids[:2]
    ]
    tokens = [1, 20]
    for rows, columns in grids[:2]:
        tokens += [4, *[6] * (rows * columns), 5]
    tokens = np.array([*tokens, 23, 1, 3, *rng.integers(10, 60, 5), 7, 8, 8, 8, 9, 30, 7, 8, 8, 8, 9, 31])
    sample = build_sample(tokens, images, [], SPECIAL, 3)
    layout = dataclasses.replace(required_layout(sample, config.vision.geometry), prefix=48, text=5, tail=2)
    batch = collate([sample], layout, SPECIAL, config.vision.geometry)
    columns = sample_columns(sample, layout)
    ids, model = torch.tensor(tokens)[None], Qwen2_5VL(config)
    with torch.no_grad():
        expected = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.tensor(np.concatenate([image.pixels for image in images])),
            image_grid_thw=torch.tensor([[1, image.height, image.width] for image in images]),
            mm_token_type_ids=(ids == 6).int(),
            output_attentions=True,
        ).attentions
    params = params_from_state_dict({name: tensor.numpy() for name, tensor in reference.state_dict().items()}, config)
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
    slots = np.flatnonzero(tokens == 8)
    for mask in (batch.valid, causal_mask(batch.valid)):
        weights = np.asarray(
            model.attention_weights(params["decoder"], inputs, batch.positions, mask, columns[slots], layers=2)
        )[0]
        assert weights.shape == (2, 4, 6, layout.columns) and weights.dtype == np.float32
        for ours, theirs in zip(weights, expected[-2:], strict=True):
            np.testing.assert_allclose(ours[..., columns], theirs[0].numpy()[:, slots], atol=WEIGHT_TOLERANCE)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert not np.delete(weights, columns, axis=-1).any()  # padding
    every = model.attention_weights(params["decoder"], inputs, batch.positions, mask, columns[slots], layers=99)
    assert every.shape[1] == config.num_hidden_layers


def test_a_hidden_image_has_no_weight_at_all():
    model, sample = Qwen2_5VL(CONFIG), random_sample(np.random.default_rng(4), texts=(3, 2, 4))
    layout = required_layout(sample, GEOMETRY)
    batch, columns = collate([sample], layout, SPECIAL, GEOMETRY), sample_columns(sample, layout)
    params = model.init(jax.random.key(2))
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
    image, after = (columns[places] for places in (sample.tokens == SPECIAL.image_pad, sample.visibility == 2))
    slots = columns[sample.tokens == SPECIAL.latent_pad]
    for visibility, seen in (("until_look", False), ("all", True)):
        mask = batch.attention_mask(LatentsConfig(image_visibility=visibility))
        queries = np.concatenate([after, slots])
        weights = model.attention_weights(params["decoder"], inputs, batch.positions, mask, queries, 1)
        of_text, of_slots = np.split(np.asarray(weights)[0, 0][..., image], [len(after)], axis=1)
        assert len(after) and of_text.any() == seen and of_slots.all()  # slots see everything


def test_scaled_positions_far_into_a_text_equal_pytorch_in_every_way_of_decoding():
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": YARN}
    reference, config = oracle(text, {"num_heads": 2})
    params = params_from_state_dict({name: tensor.numpy() for name, tensor in reference.state_dict().items()}, config)
    decoder, model = params["decoder"], Qwen2_5VL(config)
    tokens = np.random.default_rng(0).integers(10, 60, (1, 12))
    positions = np.array([[[0], [3], [1]]]) + np.concatenate([np.arange(6), 100_000 + np.arange(6)])
    with torch.no_grad():
        places = torch.tensor(positions).swapaxes(0, 1)
        expected = reference(input_ids=torch.tensor(tokens), position_ids=places).logits.numpy()

    inputs, mask, split = model.embed(decoder, tokens), causal_mask(np.ones((1, 12), bool)), 8
    whole, _ = model.decode(decoder, inputs, positions, mask)
    packed, _ = model.decode(decoder, inputs, positions, np.ones((1, 12), bool))
    first, past = model.decode(decoder, inputs[:, :split], positions[..., :split], mask[:, :split, :split])
    then, _ = model.decode(decoder, inputs[:, split:], positions[..., split:], mask[:, split:], [past])
    rest = inputs[:, split:], positions[..., split:], mask[:, split:, split:]
    ways = [whole, packed, np.concatenate([first, then], 1)]
    for outputs_first in (None, False, True):
        layers = decoder if outputs_first is None else split_layers(decoder, outputs_first)
        _, new = model.decode(layers, inputs[:, :split], positions[..., :split], mask[:, :split, :split])
        cache = init_kv_cache(model, 1, 10, outputs_first is not None)
        cache = write_columns(cache, new, np.array([0]), np.array([split]))._replace(lengths=np.array([split]))
        cached, _ = model.decode(layers, *rest, cache)
        ways.append(np.concatenate([first, cached], 1))
    for hidden in ways:
        np.testing.assert_allclose(model.logits(decoder, hidden), expected, atol=3e-4)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    reference, config = oracle(*SHAPES["several images, untied"][:2])
    state = {name: tensor.numpy() for name, tensor in older_names(reference.state_dict()).items()}
    state.pop("model.norm.weight")
    state["visual.blocks.0.norm1.weight"] = np.zeros(7, np.float32)
    state["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError) as error:
        params_from_state_dict(state, config)
    assert "lacks model.norm.weight;" in str(error.value)
    assert "has another shape in visual.blocks.0.norm1.weight ([7] in place of [32]);" in str(error.value)
    assert "has besides model.layers.9.mlp.up_proj.weight" in str(error.value)


def test_bytes_of_a_still_image_equal_two_normalised_frames():
    rng = np.random.default_rng(0)
    model = Qwen2_5VL(CONFIG)
    vision = model.init(jax.random.key(0))["vision"]
    sample = random_sample(rng, images=((3, 2),))
    layout = required_layout(sample, GEOMETRY)
    still = collate([sample], layout, SPECIAL, GEOMETRY).images
    config = CONFIG.vision
    mean, deviation = np.array(config.image_mean)[:, None], np.array(config.image_std)[:, None]
    frames = (np.asarray(still.pixels).reshape(*still.pixels.shape[:-1], 3, 196) / 255 - mean) / deviation
    both = np.repeat(frames[..., None, :], 2, axis=-2).reshape(*still.pixels.shape[:-1], 1176).astype(np.float32)
    valid = np.asarray(still.unit_valid)
    once, twice = (model.encode_images(vision, images) for images in (still, still.replace(pixels=both)))
    np.testing.assert_allclose(np.asarray(once)[valid], np.asarray(twice)[valid], atol=1e-4)


def test_cached_decoding_equals_the_uncached_pass():
    model = Qwen2_5VL(CONFIG)
    params = model.init(jax.random.key(1))
    sample = random_sample(np.random.default_rng(2), texts=(12,), images=((2, 3), (1, 2)))
    batch = collate([sample], required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY)
    decoder, mask = params["decoder"], causal_mask(batch.valid)
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(decoder, batch.tokens, batch.image_index, features)
    whole, _ = model.decode(decoder, inputs, batch.positions, mask)
    split = batch.tokens.shape[1] - 7
    hidden, cache = model.decode(decoder, inputs[:, :split], batch.positions[..., :split], mask[:, :split, :split])
    parts = [hidden]
    for column in range(split, batch.tokens.shape[1]):
        now = slice(column, column + 1)
        hidden, new = model.decode(
            decoder, inputs[:, now], batch.positions[..., now], mask[:, now, : column + 1], [cache]
        )
        cache = jax.tree.map(lambda old, one: jnp.concatenate([old, one], axis=2), cache, new)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)


def test_image_tokens_must_match_the_images():
    with pytest.raises(ValueError, match=r"as many as the images' vision tokens \[4\], got 3"):
        rng = np.random.default_rng(0)
        tokens = random_sample(rng, texts=(2,), images=((2, 2),)).tokens
        tokens = np.delete(tokens, np.flatnonzero(tokens == SPECIAL.image_pad)[0])
        build_sample(tokens, random_sample(rng, texts=(2,), images=((2, 2),)).images, [], SPECIAL, 1)
