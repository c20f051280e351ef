"""python -m ilvr_jax.generate: a question, with images or without, answered in text and latent slots."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ilvr_jax.checkpoints.trained import TrainedModel, load_model
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.examples import build_prompt
from ilvr_jax.data.records import Record
from ilvr_jax.errors import quote
from ilvr_jax.files import check_output, named_errors, written
from ilvr_jax.generation_flags import add_decoding_flags, check_sizes, how_to_decode
from ilvr_jax.inference.engine import Engine, fit_settings
from ilvr_jax.inference.requests import Answer, Request
from ilvr_jax.inference.transcript import show_look
from ilvr_jax.tasks.final_answer import find_final_answer


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 done, 1 not written, 2 bad input, 130 stopped."""
    options = read_flags(arguments)
    trained = load_model(options.checkpoint, options.stage, options.dtype)
    if not trained.looks and options.method != "text":
        print(f"{options.checkpoint} has no latent tokens; it is decoded as plain text", file=sys.stderr)
        options.method = "text"
    engine, request = prepare(options, trained)
    printer = None if options.json else Printer(trained, request.latent_size)
    # Opened before the answer is decoded: a file that cannot be written is an error at once.
    with written(options.latents) if options.latents else contextlib.nullcontext() as latents:
        (answer,) = engine.serve([request], printer and (lambda _, tokens: printer.show(tokens)))
        if options.json:
            print(json.dumps(as_json(answer), ensure_ascii=False))
        else:
            show_end(answer)
        if latents:
            with named_errors(options.latents), latents.open("wb") as file:
                np.save(file, np.asarray(answer.latent_vectors, np.float32))
    return 0


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's flags; raises BadConfig for some that cannot be used together."""
    parser = ArgumentParser(prog="python -m ilvr_jax.generate", description=__doc__)
    parser.add_argument("checkpoint", help="a run's workdir, a Qwen2.5-VL (folder or hub name), or ADAPTER[@BASE]")
    parser.add_argument(
        "question", nargs="?", help="with <image> where an image belongs, or without (default: the run's)"
    )
    parser.add_argument(
        "--image", type=path_flag, action="append", default=[], help="an image file; may be given again"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing before")
    parser.add_argument("--log-probabilities", action="store_true", help="of the tokens, in the JSON object")
    parser.add_argument(
        "--latents", type=path_flag, help="a .npy file for what the slots held: float32 [slots, channels]"
    )
    add_decoding_flags(parser)
    options = parser.parse_intermixed_args(arguments)  # so that the question may come last
    if options.method == "pixels":
        raise BadConfig('--method must not be "pixels" here: evaluate shows pictures, for tasks that have some')
    if options.log_probabilities and not options.json:
        raise BadConfig("--log-probabilities must be given together with --json, which prints them")
    if options.latents:
        check_output(options.latents)
    return options


def prepare(options: argparse.Namespace, trained: TrainedModel) -> tuple[Engine, Request]:
    """Returns an engine that holds the question, and its request; raises BadConfig or BadRecord if it is no good."""
    prompts = trained.prompts
    how = how_to_decode(options, prompts, trained.max_new_tokens)
    question = options.question if options.question is not None else prompts.question
    if question is None:
        raise BadConfig(f"a question must be given, since {options.checkpoint} has none of its own")
    if not question.strip():
        raise BadConfig(f"the question must have letters, got {quote(question)}")
    check_images(options, trained)
    record = Record(question, tuple(options.image), (), name="the question")
    prompt = build_prompt(record, trained.tokenizer, trained.special, dataclasses.replace(prompts, question=None))
    check_sizes(options, prompt)
    request = Request(
        prompt,
        **how,
        seed=options.seed,
        log_probabilities=options.log_probabilities,
        latent_vectors=options.latents is not None,
    )
    settings = fit_settings([request], 1, trained.model.geometry)
    engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
    if refusal := engine.refusal(request):
        raise BadConfig(refusal)
    return engine, request


def check_images(options: argparse.Namespace, trained: TrainedModel) -> None:
    """Raises BadConfig for more images than a run was trained with, or none where its own question is about some."""
    if trained.config is None:
        return
    most, given = max(bucket.images for bucket in trained.config.data.buckets.values()), len(options.image)
    if given > most:
        raise BadConfig(
            f"--image must be given at most {most} times, as many as {options.checkpoint} was trained with, got {given}"
        )
    if most and not given and options.question is None:
        raise BadConfig("--image must be given with the run's own question, which is about an image")


class Printer:
    """Prints tokens as they come: text, and looks while they happen."""

    def __init__(self, trained: TrainedModel, latent_size: int):
        self._tokenizer, self._special = trained.tokenizer, trained.special
        self._text: list[int] = []  # since the last look
        self._shown = ""
        self._slots = 0

    def show(self, tokens: Sequence[int]) -> None:
        """Prints what new tokens add."""
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
                if not text.endswith("\ufffd"):  # a letter of which more bytes are to come
                    self._print(text[len(self._shown) :])
                    self._shown = text

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


def show_end(answer: Answer) -> None:
    """Prints the final answer, if one can be read out of the text, and what it took."""
    print()
    if answer.stop_reason == "length":
        print(f"(stopped after {len(answer.tokens)} tokens, as --max-new-tokens says)")
    seconds = answer.timings.total
    looks = f"{len(answer.looks)} look{'' if len(answer.looks) == 1 else 's'}"
    print(f"{len(answer.tokens)} tokens, {looks} with {answer.slots} slots, {seconds:.1f} s")
    print(f"answer: {find_final_answer(answer.text) or 'none found'}")


def as_json(answer: Answer) -> dict[str, Any]:
    """Returns an answer as a JSON object."""
    fields = dataclasses.asdict(answer)
    for name in ("number", "name", "latent_vectors", "error", "shared_tokens"):
        del fields[name]
    if fields["log_probabilities"] is None:
        del fields["log_probabilities"]
    return {"answer": find_final_answer(answer.text), **fields}


if __name__ == "__main__":
    sys.exit(main())
