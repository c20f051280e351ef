"""Tiny random checkpoints as transformers saves them."""

import copy
import json

import torch
import transformers
from safetensors.numpy import load_file

from ilvr_jax.data.tokenizer import LATENT_TOKENS, train_tokenizer
from ilvr_jax.models.tensor_files import weight_files

VOCABULARY = 320
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


def read_all(folder):
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def save_published(folder, nested=False, shard="5GB", tied=False, dtype="bfloat16", texts=(), vocabulary=VOCABULARY):
    """Saves a tiny random Qwen2.5-VL as transformers does, with a tokenizer that has no latent tokens.

    Every word of `texts` is a token of it.
    """
    config = transformers.Qwen2_5_VLConfig(  # it changes the dictionaries that it gets
        **{**copy.deepcopy(TEXT), "vocab_size": vocabulary},
        vision_config=VISION,
        tie_word_embeddings=tied,
        torch_dtype=dtype,
    )
    torch.manual_seed(1)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=not nested)
    tokenizer = json.loads(train_tokenizer(["up down left right", *texts]).backend_tokenizer.to_str())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in LATENT_TOKENS]
    for token in LATENT_TOKENS:
        del tokenizer["model"]["vocab"][token]
    # Ids without gaps, so that latent tokens come after all others.
    order = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"] = {token: number for number, token in enumerate(order)}
    for token in tokenizer["added_tokens"]:
        token["id"] = tokenizer["model"]["vocab"][token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model
