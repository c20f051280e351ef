"""Decoding flags that `generate` and `evaluate` share."""

import argparse
import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax

from ilvr_jax.checkpoints.trained import TrainedModel, load_model
from ilvr_jax.config.fields import rule_of
from ilvr_jax.config.schema import DTYPES, IMAGE_VISIBILITY, SLOT_POSITIONS, SamplingParams
from ilvr_jax.errors import InputError, quote
from ilvr_jax.inference.requests import METHODS
from ilvr_jax.inference.sampling import check_sampling, check_whole
from ilvr_jax.method.layout import Sample
from ilvr_jax.models.sharding import AXES, check_mesh, make_mesh, on_mesh

LONGEST_PROMPT = 8192  # tokens
LARGEST_IMAGE = 4096  # vision tokens


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of decoding to a parser."""
    methods = "; ".join(f"{name}: {description}" for name, description in METHODS.items())
    parser.add_argument("--stage", help="of a run, whose checkpoint is used (default: the last that has one)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: the checkpoint's own)")
    parser.add_argument(
        "--mesh", type=mesh_flag, help="sizes of config.mesh, such as fsdp=2,tensor=4, to use several devices"
    )
    parser.add_argument("--method", choices=METHODS, default="latent", help=f"of looking (default: latent); {methods}")
    parser.add_argument("--latent-size", type=int, help="slots per look (default: the run's, or 8)")
    parser.add_argument(
        "--image-visibility",
        choices=IMAGE_VISIBILITY,
        help="of images to text after a look (default: the run's, or all)",
    )
    parser.add_argument(
        "--slot-positions", choices=SLOT_POSITIONS, help="rotary positions of slots (default: the run's, or text)"
    )
    for field in dataclasses.fields(SamplingParams):
        flag, meaning = f"--{field.name.replace('_', '-')}", rule_of(field).meaning
        if field.name == "n":  # evaluate has --samples-per-question
            continue
        if field.type is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, help=f"{meaning} (default: the run's, or no)"
            )
        elif field.name == "stop":
            parser.add_argument(flag, action="append", help=f"{meaning}; repeat the flag for more (default: the run's)")
        else:
            parser.add_argument(flag, type=field.type, help=f"{meaning} (default: the run's, or {field.default})")
    parser.add_argument("--seed", type=int, help="of sampling (default: the run's, or 0)")
    parser.add_argument(
        "--longest-prompt",
        type=int,
        default=LONGEST_PROMPT,
        help=f"most tokens (default: {LONGEST_PROMPT})",
    )
    parser.add_argument(
        "--largest-image",
        type=int,
        default=LARGEST_IMAGE,
        help=f"most vision tokens (default: {LARGEST_IMAGE})",
    )


def mesh_flag(text: str) -> dict[str, int]:
    """Return the sizes of a mesh from a flag; raise ArgumentTypeError if it cannot be read."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not re.fullmatch("-?[0-9]{1,9}", size) or text.count(f"{axis}=") > 1:
            known = f"axis=size, each axis at most once of {', '.join(AXES)}"
            raise argparse.ArgumentTypeError(f"must be {known}, with commas between them, got {quote(text)}")
        sizes[axis] = int(size)
    return sizes


@contextlib.contextmanager
def load_on_mesh(options: argparse.Namespace) -> Iterator[TrainedModel]:
    """Load the checkpoint of the flags, and yield it on the mesh of --mesh, if given.

    Raises InputError as `load_model` does, and if the mesh does not fit the devices or the model.
    """
    if options.mesh is None and jax.process_count() > 1:
        raise InputError("--mesh must be given for several processes, such as --mesh=fsdp=-1, got none")
    if options.mesh is None:
        yield load_model(options.checkpoint, options.stage, options.dtype)
        return
    used, devices = math.prod(options.mesh.values()), jax.devices()
    with mesh_errors():
        mesh = make_mesh(options.mesh, devices[:used] if 0 < used < len(devices) else devices)
    with on_mesh(mesh):
        trained = load_model(options.checkpoint, options.stage, options.dtype, mesh)
        with mesh_errors():
            check_mesh(mesh, trained.model.config)
        yield trained


@contextlib.contextmanager
def mesh_errors() -> Iterator[None]:
    """Raise the ValueErrors of meshes as InputErrors that name the flag."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"--mesh must fit: {error}") from error


def set_defaults(options: argparse.Namespace, trained: TrainedModel) -> None:
    """Set the flags that were not given to the run's values, and the method of a model without latent tokens to "text".

    The method is then printed on stderr.
    """
    run, sampling = trained.config, trained.config.eval if trained.config else SamplingParams()
    defaults = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(SamplingParams)}
    defaults |= {"seed": run.seed if run else 0, **trained.look_fields}
    for name, value in defaults.items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)
    if not trained.looks and options.method != "text":
        options.method = "text"
        print(f"{options.checkpoint} has no latent tokens; it is decoded as plain text", file=sys.stderr)


def decoding_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a Request that flags set, except `seed`.

    Raises InputError, naming the flag, for a bad value.
    """
    names = {field.name for field in dataclasses.fields(SamplingParams)} & vars(options).keys()
    values = {name: getattr(options, name) for name in names} | {"stop": tuple(options.stop)}
    with flag_errors():
        for name, least in (("longest_prompt", 1), ("largest_image", 1), ("latent_size", 0)):
            check_whole(name, getattr(options, name), least)
        check_whole("seed", options.seed, 0, 2**32 - 1)
        sampling = SamplingParams(**values)
        check_sampling(sampling)
    return {
        name: getattr(options, name) for name in ("method", "latent_size", "image_visibility", "slot_positions")
    } | {"sampling": sampling}


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Raise the ValueErrors of checks, which begin with the name of a value, as InputErrors that name its flag."""
    try:
        yield
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {problem}") from error


def check_sizes(options: argparse.Namespace, prompt: Sample) -> None:
    """Raise InputError if a prompt or one of its images is larger than the flags allow."""
    largest = max((image.vision_tokens for image in prompt.images), default=0)
    if largest > options.largest_image:
        raise InputError(
            f"an image must take at most {options.largest_image} vision tokens (--largest-image), got {largest}"
        )
    most, length = options.longest_prompt, len(prompt.tokens)
    if length > most:
        raise InputError(f"the prompt must have at most {most} tokens (--longest-prompt), got {length}")
