"""Tokens per second of the engine and of transformers' PyTorch `generate`, on the same random weights and prompts.

python -m benchmarks.decode [--batches 1 16] [--prompt=64] [--new-tokens=64] [--repeats=5]

Text only, greedy, float32 on the CPU. The two alternate in one process, each with its default number of threads. Needs
PyTorch (requirements-dev.txt).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Parser, machine, positive, refuse

SPECIAL_IDS = 10  # the first ids of the vocabulary, which neither generates


def describe(arguments: argparse.Namespace) -> dict:
    """Return the config.json of the model; its vision tower is small and unused."""
    head_dim = arguments.hidden // arguments.heads
    return {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.key_value_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [head_dim // 8, *[3 * head_dim // 16] * 2]},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": arguments.hidden,
            "fullatt_block_indexes": [0],
        },
    }


def make_torch(description: dict):
    """Return transformers' model with random weights, in which special tokens are never the most likely."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(description)).eval().float()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        model.lm_head.weight[:SPECIAL_IDS] = 0.0  # the largest other logit is above 0
    return model


def make_ours(torch_model, description: dict, prompts: np.ndarray, new_tokens: int) -> Callable[[], tuple]:
    """Return what serves all prompts at once, after compiling, and gives tokens, seconds and those to first tokens."""
    from ilvr_jax.config.schema import SamplingParams
    from ilvr_jax.inference.engine import Engine
    from ilvr_jax.inference.requests import Request
    from ilvr_jax.inference.sizes import fit_settings
    from ilvr_jax.method.layout import build_sample
    from ilvr_jax.method.tokens import SpecialTokens
    from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
    from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
    from ilvr_jax.models.qwen2_5_vl.weights import params_from_state_dict

    special = SpecialTokens(*range(SPECIAL_IDS))
    config = model_config_from_hf(description)
    params = params_from_state_dict({name: part.numpy() for name, part in torch_model.state_dict().items()}, config)
    sampling = SamplingParams(max_new_tokens=new_tokens)
    requests = [Request(build_sample(row, (), (), special, 1), sampling, 1, method="text") for row in prompts]
    settings = fit_settings(requests, len(requests), config.vision.geometry, share_prefixes=False)
    engine = Engine(Qwen2_5VL(config), params, special, settings)
    engine.warm_up()

    def run() -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        answers = engine.answer(requests)
        seconds = time.perf_counter() - start
        tokens = np.array([answer.tokens for answer in answers])
        return tokens, seconds, max(answer.timings.first_token for answer in answers)

    return run


def make_theirs(model, prompts: np.ndarray, new_tokens: int) -> Callable[[], tuple]:
    """Return a function that answers all prompts with `generate`; it returns tokens, seconds and those of one token."""
    import torch

    inputs = torch.tensor(prompts, dtype=torch.long)

    def generate(count: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False
            )
        return tokens[:, inputs.shape[1] :].numpy(), time.perf_counter() - start

    def run() -> tuple[np.ndarray, float, float]:
        first = generate(1)[1]
        return *generate(new_tokens), first

    return run


def rates(batch: int, new_tokens: int, seconds: float, first: float) -> tuple[float, float]:
    """Return tokens per second of whole answers, and of the tokens after the first ones."""
    return batch * new_tokens / seconds, batch * (new_tokens - 1) / (seconds - first)


def read_flags() -> argparse.Namespace:
    """Read the flags; a bad value ends the program with a message."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--intermediate", type=positive, default=2816)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--key-value-heads", type=positive, default=2)
    parser.add_argument("--vocabulary", type=positive, default=32768)
    arguments = parser.parse_args()
    if arguments.hidden % (16 * arguments.heads):
        refuse(f"--hidden must be a multiple of 16 times --heads ({arguments.heads}), got {arguments.hidden}")
    if arguments.heads % arguments.key_value_heads:
        refuse(f"--key-value-heads must divide --heads ({arguments.heads}), got {arguments.key_value_heads}")
    if arguments.prompt < 3 or arguments.new_tokens < 2:
        refuse("--prompt must be at least 3, and --new-tokens at least 2")
    if arguments.vocabulary < 2 * SPECIAL_IDS:
        refuse(f"--vocabulary must be at least {2 * SPECIAL_IDS}, got {arguments.vocabulary}")
    return arguments


def main() -> None:
    """Measure both in turns for each batch size, and print a table."""
    arguments = read_flags()
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        import torch
    except ImportError:
        refuse("PyTorch is not installed: pip install -r requirements-dev.txt")
    description = describe(arguments)
    model = make_torch(description)
    weights = sum(parameter.numel() for parameter in model.parameters())
    random = np.random.default_rng(0)
    console = Console(width=120)
    columns = ("ours, tokens/s", "theirs, tokens/s", "ours / theirs", "least, most", "over our batch 1")
    lengths = f"prompts of {arguments.prompt} tokens, {arguments.new_tokens} new ones"
    table = Table("batch", "what", *columns, title=f"median of {arguments.repeats} turns; {lengths}")
    alone: dict[str, float] = {}
    agreements = []
    for batch in arguments.batches:
        prompts = random.integers(SPECIAL_IDS, arguments.vocabulary, (batch, arguments.prompt))
        prompts[:, -2:] = 1, 3  # the header of the assistant's turn
        sides = (
            make_ours(model, description, prompts, arguments.new_tokens),
            make_theirs(model, prompts, arguments.new_tokens),
        )
        for side in sides:  # nothing is loaded or compiled for the first time while it is timed
            side()
        turns = []
        for turn in range(arguments.repeats):
            results = [side() for side in sides]
            turns.append([rates(batch, arguments.new_tokens, *times) for _, *times in results])
            console.print(f"batch {batch}, turn {turn + 1} of {arguments.repeats}", style="dim")
        ours, theirs = (tokens for tokens, *_ in results)
        same = int((ours == theirs).sum())
        agreements.append(f"{same} of {ours.size} new tokens at batch {batch}")
        for place, what in enumerate(("whole, with prompts", "after first tokens")):
            pairs = [(turn[0][place], turn[1][place]) for turn in turns]
            middle = [statistics.median(rate) for rate in zip(*pairs, strict=True)]
            ratios = [ours / theirs for ours, theirs in pairs]
            if batch == 1:
                alone[what] = middle[0]
            table.add_row(
                str(batch),
                what,
                *(f"{rate:.1f}" for rate in middle),
                f"{middle[0] / middle[1]:.2f}",
                f"{min(ratios):.2f}, {max(ratios):.2f}",
                f"{middle[0] / alone[what]:.1f}" if what in alone else "",
            )
    console.print(table)
    console.print(f"Both write the same: {', '.join(agreements)}.", highlight=False)
    console.print(
        f"{weights / 1e6:.0f} million weights in float32, CPU, {torch.get_num_threads()} PyTorch threads; "
        f"{machine(['jax', 'jaxlib', 'torch', 'transformers'])}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
