"""The vectors of slots, and of other places in the same answers, with the states that the slots should show."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.data.examples import build_example
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.data.sources import open_source
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.oracle import answer_batches, has_looks, select_targets
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.evaluation.results import Key
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Request, RequestOutput
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.method.layout import Batch, Sample
from ilvr_jax.method.positions import grid_places
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.progress import Progress

FRESH_SEED = 1_000_003  # added to the run's seed, for generated records that training did not have


class Question(NamedTuple):
    """A record, with the steps of its true answer if these are known, and the states that its looks should show."""

    evaluator: Evaluator
    key: Key
    record: Record
    states: Shaped[np.ndarray, "looks places"] | None  # None where they are not known


@dataclasses.dataclass(frozen=True)
class SlotVectors:
    """The vectors of answers to the same questions.

    Attributes:
        states: the names of the states that slots should show; "" where there is none.
        valid: whether both the own answer and the true one have the slot.
        slots: the model's own slots, without what its rule for them adds to any hidden state (`placed`: the place).
        pause: the final hidden states before slots, from which slots are made, when all slots of the true answer are
            pauses: they have the embedding of `latent_pad` as input, or that of the rule `pause`.
        targets: the features of the true helper images that stage 1 gives to slots.
        text: the final hidden states of the last tokens of text before the first looks.
    """

    states: Shaped[np.ndarray, "samples looks slots"]
    valid: Bool[np.ndarray, "samples looks slots"]
    slots: Float[np.ndarray, "samples looks slots channels"]
    pause: Float[np.ndarray, "samples looks slots channels"]
    targets: Float[np.ndarray, "samples looks slots channels"]
    text: Float[np.ndarray, "samples channels"]

    def take(self, numbers: Sequence[int]) -> "SlotVectors":
        """Return those of some samples, in their order."""
        return SlotVectors(**{name: array[np.array(numbers, int)] for name, array in vars(self).items()})


def fresh_records(evaluator: Evaluator, count: int) -> Evaluator | None:
    """Return an evaluator of `count` newly generated records that are not evaluated; None for a run on files."""
    config = evaluator.trained.config
    if config is None or config.data.source != "frozen_lake":
        return None
    lake = dataclasses.replace(config.data.frozen_lake, readings=0.0)
    evaluated = {record.map_desc for _, record in evaluator.keys()}
    # Records that are evaluated are dropped, so there must be more.
    source = open_source(
        dataclasses.replace(config.data, frozen_lake=lake, records=2 * count), config.seed + FRESH_SEED
    )
    unseen = (record for record in map(source.__getitem__, range(len(source))) if record.map_desc not in evaluated)
    chosen = list(itertools.islice(unseen, count))
    # Generated images are drawn in the size they are used in.
    prompts = dataclasses.replace(evaluator.trained.prompts, image_scale=1.0)
    return dataclasses.replace(
        evaluator,
        trained=dataclasses.replace(evaluator.trained, prompts=prompts),
        records=EvaluationRecords(chosen, "generated records"),
        limit=0,
        skipped={},
    )


def questions_of(evaluator: Evaluator) -> list[Question]:
    """Return the questions of records with true answers and states; other records are skipped.

    Raises BadConfig as the task's `slot_states` does, and if a look has more places than slots.
    """
    module, size, found = evaluator.module, evaluator.decoding["latent_size"], []
    for key, record in evaluator.keys():
        states = module.slot_states(record, evaluator.data)
        if states.shape[1] > size:
            raise BadConfig(
                f"--latent-size must be at least the places of a look ({states.shape[1]}) for --probes, got {size}"
            )
        try:
            record = module.with_steps(record, evaluator.data) if hasattr(module, "with_steps") else record
            if not has_looks(record):
                raise BadRecord(f"{record.name}: must have steps with looks for --probes, got none")
        except BadRecord as error:
            evaluator.skip((key.number, ""), str(error))
            continue
        found.append(Question(evaluator, key, record, states))
    return found


def gather_vectors(
    questions: Sequence[Question], progress: Progress, outputs: Mapping[int, RequestOutput] | None = None
) -> tuple[list[int], SlotVectors]:
    """Return the numbers of the questions that have vectors, and these; the others are skipped.

    All evaluators must be of the same model, of which one engine and one static shape serve all questions. `outputs`
    are those of `own_answers`, if it was called.
    """
    if not questions:
        raise BadConfig("--probes must have records with looks whose states are known, got none")
    evaluator = questions[0].evaluator
    size, looks = evaluator.decoding["latent_size"], max(len(question.states) for question in questions)
    outputs = own_answers(questions, progress) if outputs is None else outputs
    own = {number: complete_looks(output, size) for number, output in outputs.items()}
    true = true_vectors([(number, questions[number]) for number in sorted(own)], evaluator.rows)
    numbers = sorted(true)
    channels = evaluator.trained.model.config.hidden_size
    shape = (len(numbers), looks, size)
    slots, pause, targets = (np.zeros((*shape, channels), np.float32) for _ in range(3))
    states, valid = np.zeros(shape, questions[0].states.dtype), np.zeros(shape, bool)
    for row, number in enumerate(numbers):
        measured, named = true[number], questions[number].states
        there = min(len(measured.valid), len(named))
        count = min(len(own[number]), there)  # the looks that both answers have
        slots[row, :count] = own[number][:count] - measured.added[:count]
        pause[row, :there], targets[row, :there] = measured.pause[:there], measured.targets[:there]
        valid[row, :count] = measured.valid[:count]
        states[row, :count, : named.shape[1]] = named[:count]
    text = np.stack([true[number].text for number in numbers]) if numbers else np.zeros((0, channels), np.float32)
    return numbers, SlotVectors(np.where(valid, states, ""), valid, slots, pause, targets, text)


def own_answers(questions: Sequence[Question], progress: Progress) -> dict[int, RequestOutput]:
    """Return the model's own answers, with the inputs of their slots, by number of the question.

    All evaluators must be of the same model; those that cannot be asked are skipped.
    """
    if next(_requests(questions), None) is None:
        return {}
    trained, rows = questions[0].evaluator.trained, questions[0].evaluator.rows
    requests = (request for _, request in _requests(questions))  # made twice: all of them fill memory
    settings = fit_settings(requests, rows, trained.model.geometry)
    engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
    found, asked = {}, []

    def asked_requests() -> Iterator[Request]:
        for number, request in _requests(questions):
            asked.append(number)
            yield request

    with progress.stage("slots", 0, len(questions)):
        for output in engine.serve(asked_requests()):
            number = asked[output.number]
            if output.stop_reason == "refused":
                _skip(questions[number], f"{output.name}: {output.error}")
                continue
            found[number] = output
            progress.advance_timed()
    return found


def _requests(questions: Sequence[Question]) -> Iterator[tuple[int, Request]]:
    """Yield a request for the slots of each question, with its number; those that make no prompt are skipped."""
    for number, question in enumerate(questions):
        try:
            prompt = question.evaluator.prompt(question.record, question.key.number)
        except InputError as error:
            _skip(question, str(error))
            continue
        request = question.evaluator.request(question.key, question.record, prompt)
        yield number, dataclasses.replace(request, latent_vectors=True)


def _skip(question: Question, sentence: str) -> None:
    question.evaluator.skip((question.key.number, ""), sentence)


def complete_looks(output: RequestOutput, size: int) -> Float[np.ndarray, "looks slots channels"]:
    """Return the inputs of an answer's slots by look, without a last look that was cut off."""
    vectors = output.latent_vectors
    count = len(vectors) // size
    return vectors[: count * size].reshape(count, size, vectors.shape[-1]).astype(np.float32)


class TrueVectors(NamedTuple):
    """The vectors of a true answer, or of a batch of them with an axis of rows.

    `added` is what the rule that fills slots adds to hidden states: what it makes of zeros.
    """

    added: Float[Array, "*rows looks slots channels"]
    pause: Float[Array, "*rows looks slots channels"]
    targets: Float[Array, "*rows looks slots channels"]
    valid: Bool[Array, "*rows looks slots"]
    text: Float[Array, "*rows channels"]


def true_vectors(questions: Iterable[tuple[int, Question]], rows: int) -> dict[int, TrueVectors]:
    """Return the vectors of true answers by number; those of which no sample can be made have none."""
    questions = list(questions)
    if not questions:
        return {}
    evaluator = questions[0][1].evaluator
    trained, decoding = evaluator.trained, evaluator.decoding
    latents = trained.config.latents if trained.config else LatentsConfig()
    changes = {name: decoding[name] for name in ("latent_size", "image_visibility") if name in decoding}
    latents, key, found = dataclasses.replace(latents, **changes), jax.random.key(evaluator.seed), {}

    def samples() -> Iterator[tuple[int, Sample]]:
        for number, question in questions:
            changes = {name: decoding[name] for name in ("latent_size", "slot_positions") if name in decoding}
            settings = dataclasses.replace(question.evaluator.prompts, helper_images="latent", **changes)
            record = question.evaluator.asked(question.record)
            try:
                example = build_example(record, trained.tokenizer, trained.special, settings, number)
            except BadRecord as error:
                _skip(question, str(error))
                continue
            yield number, example

    for numbered, batch in answer_batches(trained, samples, rows):
        measured = jax.tree.map(np.asarray, measure_answers(trained.model, trained.params, batch, latents, key))
        for row, (number, sample) in enumerate(numbered):
            count = len(sample.slot_starts)
            by_look = (array[row, :count] for array in measured[:-1])
            found[number] = TrueVectors(*by_look, measured.text[row])
    return found


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def measure_answers(
    model: Model, params: PyTree, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> TrueVectors:
    """Return the vectors of a batch of true answers, each with a look or more, in one pass with pauses for slots."""
    decoder = decoder_params(params)
    features, selection = select_targets(model, params, batch, settings, key)
    inputs, columns = model.embed(decoder, batch.tokens, batch.image_index, features), batch.layout.slot_columns
    zeros = jnp.zeros_like(inputs[:, columns])
    added = fill_slots(model, decoder, zeros, zeros, grid_places(batch.positions[..., columns]))
    if model.config.slot_input == "pause":  # slots are pauses anyway
        inputs = inputs.at[:, columns].set(added)
    hidden, _ = model.decode(decoder, inputs, batch.positions, batch.attention_mask(settings))
    hidden = hidden.astype(jnp.float32)
    text = hidden[:, batch.layout.prefix - 2]  # the token before the first `latent_start`
    return TrueVectors(added, hidden[:, columns - 1], selection.targets, selection.valid, text)
