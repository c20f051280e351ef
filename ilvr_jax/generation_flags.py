"""Flags that say how answers are decoded, for the commands that do."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from ilvr_jax.config.schema import DTYPES
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.errors import InputError
from ilvr_jax.inference.decode import DecodeSettings
from ilvr_jax.inference.requests import METHODS
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.method.layout import Sample

LONGEST_PROMPT = 8192  # tokens
LARGEST_IMAGE = 4096  # vision tokens


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    methods = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    parser.add_argument("--stage", help="of a run: the stage whose checkpoint is used (default: the last that has one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: the checkpoint's own)")
    parser.add_argument("--method", choices=METHODS, default="latent", help=f"how it may look; {methods}")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer, slots included (default: the run's, or 1024)")
    parser.add_argument("--latent-size", type=int, help="slots a look (default: the run's, or 8)")
    parser.add_argument("--early-end", action="store_true", help="let the model end a latent segment early")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy (no file sets it)")
    parser.add_argument("--top-k", type=int, default=0, help="0, the default: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest-prompt", type=int, default=LONGEST_PROMPT, help=f"in tokens (default: {LONGEST_PROMPT})"
    )
    parser.add_argument(
        "--largest-image", type=int, default=LARGEST_IMAGE, help=f"in vision tokens (default: {LARGEST_IMAGE})"
    )


def how_to_decode(options: argparse.Namespace, prompts: ExampleSettings, max_new_tokens: int) -> dict[str, Any]:
    """Returns the fields of a Request that the flags give, all but `seed`; the others are what the model came with.

    Raises InputError, naming the flag, for a bad value of any of the flags.
    """
    with blame_flags():
        for name in ("longest_prompt", "largest_image"):
            check_whole(name, getattr(options, name), 1)
        check_whole("seed", options.seed, 0, 2**32 - 1)
        settings = DecodeSettings(
            max_new_tokens=max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
            latent_size=prompts.latent_size if options.latent_size is None else options.latent_size,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            early_end=options.early_end,
        )
    return {"method": options.method, **dataclasses.asdict(settings)}


@contextlib.contextmanager
def blame_flags() -> Iterator[None]:
    """Within it errors of checks, which begin with the name of a value, are about the flag of that name: InputError."""
    try:
        yield
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {problem}") from error


def check_sizes(options: argparse.Namespace, prompt: Sample) -> None:
    """Raises InputError if a prompt or one of its images is larger than the flags allow."""
    largest = max((image.vision_tokens for image in prompt.images), default=0)
    if largest > options.largest_image:
        raise InputError(
            f"an image must take at most {options.largest_image} vision tokens (--largest-image), got {largest}"
        )
    if len(prompt.tokens) > options.longest_prompt:
        most, length = options.longest_prompt, len(prompt.tokens)
        raise InputError(f"the prompt must have at most {most} tokens (--longest-prompt), got {length}")
