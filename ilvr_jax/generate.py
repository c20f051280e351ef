"""python -m ilvr_jax.generate: answer a question, with or without images, in text and latent slots."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.examples import build_prompt
from ilvr_jax.data.records import Record
from ilvr_jax.errors import quote
from ilvr_jax.files import check_output, named_errors, written
from ilvr_jax.generation_flags import add_decoding_flags, check_sizes, decoding_fields, load_on_mesh, set_defaults
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Request, RequestOutput
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.inference.transcript import show_look
from ilvr_jax.tasks.final_answer import find_final_answer

MOST_ROWS = 16  # answers decoded in parallel


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 not written, 2 bad input, 130 stopped."""
    options = read_flags(arguments)
    with load_on_mesh(options) as trained:
        set_defaults(options, trained)
        answer(options, trained)
    return 0


def answer(options: argparse.Namespace, trained: TrainedModel) -> None:
    """Answer the question and print the outputs."""
    engine, request = prepare(options, trained)
    # What may belong to a stop string, or to several answers, is printed when it is complete.
    printer = None if options.json or options.stop or options.n > 1 else Printer(trained)
    # Opened before decoding, so that a file that cannot be written is an error at once.
    with written(options.latents) if options.latents else contextlib.nullcontext() as latents:
        outputs = engine.serve([request], printer and (lambda _, tokens: printer.add(tokens)))
        for output in outputs if printer else sorted(outputs, key=lambda output: output.sample):
            if options.json:
                print(json.dumps(as_dict(output, options.n), ensure_ascii=False))
            else:
                print("" if printer else output.text)
                print_end(output)
            if latents:
                with named_errors(options.latents), latents.open("wb") as file:
                    np.save(file, np.asarray(output.latent_vectors, np.float32))


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's flags; raise BadConfig for flags that cannot be combined."""
    parser = ArgumentParser(prog="python -m ilvr_jax.generate", description=__doc__)
    parser.add_argument("checkpoint", help="a run's workdir, a Qwen2.5-VL (folder or hub name), or ADAPTER[@BASE]")
    parser.add_argument(
        "question", nargs="?", help="may have <image> where each image belongs (default: the run's question)"
    )
    parser.add_argument(
        "--image", type=path_flag, action="append", default=[], help="an image file; repeat the flag for more images"
    )
    parser.add_argument("--n", type=int, default=1, help="answers, for a temperature above 0 (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per answer, each on a line, and nothing else"
    )
    parser.add_argument(
        "--log-probabilities", action="store_true", help="add the tokens' log-probabilities to the JSON object"
    )
    parser.add_argument(
        "--latents", type=path_flag, help="a .npy file for the vectors of the slots: float32 [slots, channels]"
    )
    add_decoding_flags(parser)
    options = parser.parse_intermixed_args(arguments)  # so that the question may come last
    if options.method == "pixels":
        raise BadConfig('--method must not be "pixels", which only evaluate has, for tasks that draw pictures')
    if options.log_probabilities and not options.json:
        raise BadConfig("--log-probabilities must be combined with --json, whose object holds them")
    if options.n > 1 and options.latents:
        raise BadConfig(f"--n must be 1 with --latents, a file for one answer, got {options.n}")
    if options.latents:
        check_output(options.latents)
    return options


def prepare(options: argparse.Namespace, trained: TrainedModel) -> tuple[Engine, Request]:
    """Return an engine that fits the question, and its request; raise BadConfig or BadRecord if it is invalid."""
    prompts = trained.prompts
    decoding = decoding_fields(options)
    question = options.question if options.question is not None else prompts.question
    if question is None:
        raise BadConfig(f"the question must be given, since {options.checkpoint} has none of its own")
    if not question.strip():
        raise BadConfig(f"the question must have text, got {quote(question)}")
    check_images(options, trained)
    record = Record(question, tuple(options.image), (), name="the question")
    prompt = build_prompt(record, trained.tokenizer, trained.special, dataclasses.replace(prompts, question=None))
    check_sizes(options, prompt)
    request = Request(
        prompt,
        **decoding,
        seed=options.seed,
        log_probabilities=options.log_probabilities,
        latent_vectors=options.latents is not None,
    )
    settings = fit_settings([request], min(options.n, MOST_ROWS), trained.model.geometry)
    engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
    if error := engine.validate(request):
        raise BadConfig(error)
    return engine, request


def check_images(options: argparse.Namespace, trained: TrainedModel) -> None:
    """Raise BadConfig for more images than a run was trained with, or none with the run's own question about one."""
    if trained.config is None:
        return
    most, given = max(bucket.images for bucket in trained.config.data.buckets.values()), len(options.image)
    if given > most:
        raise BadConfig(
            f"the number of images (--image) must be at most {most}, as in the training of {options.checkpoint}, "
            f"got {given}"
        )
    if most and not given and options.question is None:
        raise BadConfig("--image must be given with the run's own question, which is about one")


class Printer:
    """Prints an answer while it is decoded: text, and a mark for each look."""

    def __init__(self, trained: TrainedModel):
        self._tokenizer, self._special = trained.tokenizer, trained.special
        self._text: list[int] = []  # since the last look
        self._shown = ""
        self._slots = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Print what the next tokens add to the answer."""
        for token in tokens:
            if token == self._special.latent_start:
                self._print("‹looking")
                self._text, self._shown, self._slots = [], "", 0
            elif token == self._special.latent_pad:
                self._slots += 1
            elif token == self._special.latent_end:
                self._print(show_look(self._slots).removeprefix("‹looking"))
            elif token not in self._special.ends:
                self._text.append(token)
                text = self._tokenizer.decode(self._text, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # more bytes of this letter follow
                    self._print(text[len(self._shown) :])
                    self._shown = text

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


def print_end(output: RequestOutput) -> None:
    """Print the final answer, if the text has one, and the numbers of tokens, looks and seconds."""
    if output.stop_reason == "length":
        print(f"(stopped after {len(output.tokens)} tokens, the limit of --max-new-tokens)")
    seconds = output.timings.total
    looks = f"{len(output.looks)} look{'' if len(output.looks) == 1 else 's'}"
    print(f"{len(output.tokens)} tokens, {looks} with {output.slots} slots, {seconds:.1f} s")
    print(f"answer: {find_final_answer(output.text) or 'none found'}")


def as_dict(output: RequestOutput, samples: int) -> dict[str, Any]:
    """Return an answer, one of `samples`, as the JSON object that --json prints."""
    fields = dataclasses.asdict(output)
    slots = ("latent_vectors", "slot_keys", "slot_values", "slot_positions")
    for name in ("number", "name", "plain_text", "error", "shared_tokens", *slots):
        del fields[name]
    if samples == 1:
        del fields["sample"]
    if fields["log_probabilities"] is None:
        del fields["log_probabilities"]
    return {"answer": find_final_answer(output.text), **fields}


if __name__ == "__main__":
    sys.exit(main())
