"""The questions of a task asked again with other slots: one results file for each intervention, paired by record.

One engine serves all requests, whatever their slots, and its answers do not depend on their company: an answer that is
given its own slots is the same to the last bit.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.interventions import (
    INTERVENTIONS,
    MAKERS,
    OF_EDITS,
    WITH_STATES,
    WITHOUT_SLOTS,
    Material,
    Slots,
    give,
    measure_spread,
    pair_others,
    recorded,
)
from ilvr_jax.evaluation.oracle import has_looks, oracle_slots
from ilvr_jax.evaluation.results import BadResults, Key, Results, open_results
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Request, RequestOutput
from ilvr_jax.inference.sizes import EngineSettings, fit_settings
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.progress import Progress
from ilvr_jax.tasks import follows_donor

NAMES = tuple(name for name in INTERVENTIONS if name != "own")
OF_ALL_RECORDS = ("mean", "noise", "swap", "unrelated")  # depend on which records are asked
RELEVANT, IRRELEVANT = "relevant", "irrelevant"  # edits

Line = dict[str, Any]


class Condition(NamedTuple):
    """Slots with which every question is asked once."""

    name: str  # one of INTERVENTIONS
    replaced: str = ""  # "inputs", "states" (with the inputs), or "" if nothing is given
    form: str = ""  # the edit of records that is asked about, as in a task's `edits`; "": the records themselves

    @property
    def own(self) -> "Condition":
        """The condition of the same questions with the model's own slots."""
        return Condition("own", "", self.form)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The slots that are replaced: of one look or place, both from 1; None: all."""

    look: int | None = None
    place: int | None = None

    @property
    def settings(self) -> dict[str, int]:
        return {name: number for name, number in vars(self).items() if number is not None}

    @property
    def suffix(self) -> str:
        """The part of file names."""
        return "".join(f"-{name}{number}" for name, number in self.settings.items())


@dataclasses.dataclass
class SlotAnswers:
    """The answers of all conditions.

    Attributes:
        records: the records and edits that were asked, by key.
        lines: of the results files, by condition and key.
        recordings: the inputs of own slots by key; None if nothing had to be asked.
    """

    records: dict[Key, Record]
    lines: dict[Condition, dict[Key, Line]]
    recordings: dict[Key, Slots] | None


def conditions_of(names: Sequence[str]) -> list[Condition]:
    """Return the conditions of some interventions, those with own slots first."""
    conditions = [Condition("own")]
    if set(OF_EDITS) & set(names):
        conditions += [Condition("own", "", RELEVANT), Condition("own", "", IRRELEVANT)]
    for name in NAMES:
        if name in names:
            replaced = [""] if name in WITHOUT_SLOTS else ["inputs"] + ["states"] * (name in WITH_STATES)
            conditions += [Condition(name, part, RELEVANT if name in OF_EDITS else "") for part in replaced]
    return conditions


def missing_needs(evaluator: Evaluator, chosen: Chosen) -> dict[str, str]:
    """Return the interventions that cannot be tried, each with what it lacks: in the task, its records or `chosen`."""
    lacking = dict.fromkeys(WITHOUT_SLOTS, "all looks and places") if chosen.settings else {}
    if not hasattr(evaluator.module, "edits"):
        lacking |= dict.fromkeys(OF_EDITS, "a task with `edits`")
    if not hasattr(evaluator.module, "with_steps") and not any(map(has_looks, _readable(evaluator))):
        lacking["oracle"] = "held-out records with helper images, or a task with `with_steps`"
    return lacking


def _readable(evaluator: Evaluator) -> Iterator[Record]:
    """Yield the records that can be read, up to the limit."""
    for number in range(min(len(evaluator.source), evaluator.limit or len(evaluator.source))):
        with contextlib.suppress(BadRecord):
            yield evaluator.source[number]


def condition_file(path: Path, condition: Condition, chosen: Chosen) -> Path:
    """Return the results file of a condition beside the one at `path`."""
    parts = [condition.name, *([condition.form] if condition.name == "own" and condition.form else [])]
    parts += ["states"] if condition.replaced == "states" else []
    suffix = "" if condition.name == "own" else chosen.suffix
    return path.with_name(f"{path.stem}-slots{suffix}-{'-'.join(parts)}.jsonl")


def condition_settings(evaluator: Evaluator, condition: Condition, chosen: Chosen, model: str) -> dict[str, Any]:
    """Return everything that the answers of a condition depend on, for the first line of its file."""
    settings = {**evaluator.settings(model), "slots": condition.name, "replaced": condition.replaced}
    settings |= {"edit": condition.form} if condition.form else {}
    settings |= chosen.settings if condition.name != "own" else {}
    return settings | ({"limit": evaluator.limit} if condition.name in OF_ALL_RECORDS else {})


def ask_with_slots(
    evaluator: Evaluator,
    conditions: Sequence[Condition],
    path: Path,
    model: str,
    chosen: Chosen,
    progress: Progress,
    record: bool,
) -> SlotAnswers:
    """Complete the results files of all conditions beside `path`, and return their answers.

    If one is missing, or with `record`, all questions are first asked with own slots, which are recorded; answers that
    the files hold stay. `model` is the digest of the model. Raises BadResults if a file holds other settings or an own
    answer comes out different, BadConfig if no record can be asked.
    """
    asking = _Asking(evaluator, conditions, chosen, progress)
    with contextlib.ExitStack() as stack:
        for condition in conditions:
            settings = condition_settings(evaluator, condition, chosen, model)
            file = condition_file(path, condition, chosen)
            results = stack.enter_context(open_results(file, settings, len(evaluator.source)))
            asking.results[condition] = results
            for sentence in results.damaged:
                print(sentence, file=sys.stderr)
        stack.enter_context(stop_sentence(asking.stopped))
        settings, trained = asking.collect(), evaluator.trained
        expected = asking.expected()
        answered = sum(key in asking.results[condition].lines for condition, key in expected)
        with progress.stage("slots", answered, len(expected)):
            progress.log(f"{answered} of {len(expected)} answers with {len(conditions)} kinds of slots exist")
            if record or answered < len(expected):
                engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
                asking.record_own(engine)
                if answered < len(expected):
                    asking.intervene(engine)
        lines = {condition: {} for condition in conditions}
        for condition, key in asking.expected():
            lines[condition][key] = asking.results[condition].lines[key]
    return SlotAnswers(asking.records, lines, asking.recordings or None)


class _Asking:
    """The requests of all conditions, and the lines of their answers."""

    def __init__(self, evaluator: Evaluator, conditions: Sequence[Condition], chosen: Chosen, progress: Progress):
        self.evaluator, self.conditions, self.chosen, self.progress = evaluator, conditions, chosen, progress
        self.results: dict[Condition, Results] = {}
        self.records: dict[Key, Record] = {}
        self.recordings: dict[Key, Slots] = {}
        self.others: dict[int, int] = {}  # the record whose slots a record gets in "swap"

    def stopped(self) -> str:
        """Return the sentence for Ctrl-C; no more answers are added after it."""
        count = sum(results.stop() for results in self.results.values())
        return f"stopped; the files hold {count} answers, and the same command resumes it"

    def collect(self) -> EngineSettings:
        """Collect all questions, without those that make no prompt, and return settings of an engine for them."""
        evaluator = self.evaluator

        def requests() -> Iterator[Request]:
            for key, record in self._questions():
                try:
                    request = self._request(key, record)
                except InputError as error:
                    evaluator.skip((key.number, key.form), str(error))
                    continue
                if not key.form or Key(key.number, "", 0) in self.records:
                    self.records[key] = record
                    yield request

        first = next(requests(), None)
        if first is None:
            raise BadConfig(f"{evaluator.records.name} must have records that can be asked, got none")
        most = evaluator.decoding["sampling"].max_new_tokens
        return fit_settings(
            requests(),
            evaluator.rows,
            evaluator.trained.model.geometry,
            latent_vectors=True,
            slot_states=True,
            given_slots=most + 2 * evaluator.decoding["latent_size"],
            given_states=True,
            batch_invariant=True,
        )

    def _questions(self) -> Iterator[tuple[Key, Record]]:
        """Yield each record, and after it its edits if they are asked about."""
        evaluator, forms = self.evaluator, {condition.form for condition in self.conditions}
        for key, record in evaluator.keys():
            yield key, record
            try:
                edits = evaluator.module.edits(record, evaluator.seed) if len(forms) > 1 else {}
            except BadRecord as error:
                evaluator.skip((key.number, RELEVANT), str(error))
                continue
            yield from ((Key(key.number, form, 0), edited) for form, edited in edits.items())

    def _request(self, key: Key, record: Record) -> Request:
        return self.evaluator.request(key, record, self.evaluator.prompt(record, key.number))

    def expected(self) -> list[tuple[Condition, Key]]:
        """Return every answer that the files hold in the end."""
        return [(condition, key) for condition in self.conditions for key in self.records if key.form == condition.form]

    def record_own(self, engine: Engine) -> None:
        """Ask all questions with own slots, and record these; an answer that its file holds must be the same."""
        asked: list[Key] = []
        again = sum(key in self.results[Condition("own", "", key.form)].lines for key in self.records)
        if again:
            self.progress.log(f"own slots of {again} questions are recorded again, as no file holds them")

        def requests() -> Iterator[Request]:
            for key in list(self.records):
                asked.append(key)
                request = self._request(key, self.records[key])
                yield dataclasses.replace(request, latent_vectors=True, slot_states=not key.form)

        for output in engine.serve(requests()):
            key = asked[output.number]
            if output.stop_reason == "refused":
                self.evaluator.skip((key.number, key.form), f"{output.name}: {output.error}")
                del self.records[key]
                continue
            results, original = self.results[Condition("own", "", key.form)], self.records.get(Key(key.number, "", 0))
            line = self._line(key, output, original if key.form == RELEVANT else None)
            self.recordings[key] = recorded(output)
            line["recorded_slots"] = len(self.recordings[key].inputs)  # one that is the last token has no input
            if key not in results.lines:
                results.add(line)
                self.progress.advance_timed()
            elif results.lines[key]["text"] != line["text"]:
                raise BadResults(
                    f"{results.path} must hold the answers that are given now, but that to {line['record']} differs, "
                    "as with another --batch-size or machine; delete the file or choose another --out"
                )
        # The edits of a record that was refused are not asked either.
        self.records = {key: record for key, record in self.records.items() if Key(key.number, "", 0) in self.records}
        self._pair()

    def _pair(self) -> None:
        """Pair each record that has slots with another for "swap"."""
        numbers = [key.number for key in self._with_slots()]
        maps = [self.records[Key(number, "", 0)].map_desc for number in numbers]
        kinds = [number if map_desc is None else map_desc for number, map_desc in zip(numbers, maps, strict=True)]
        others = pair_others(kinds, self.evaluator.seed)
        self.others = {n: numbers[other] for n, other in zip(numbers, others, strict=True) if other is not None}

    def _with_slots(self) -> list[Key]:
        """Return the keys of the records whose own answers have slots."""
        return [key for key in self.records if not key.form and len(self.recordings[key].inputs)]

    def intervene(self, engine: Engine) -> None:
        """Ask the questions without an answer with other slots; answers without slots to replace are kept."""
        asked: list[tuple[Condition, Key]] = []

        def requests() -> Iterator[Request]:
            for number, material in self._materials():
                made: dict[Key, Request] = {}  # the conditions of a record share its prompts
                for condition in self.conditions:
                    key, results = Key(number, condition.form, 0), self.results[condition]
                    if condition.name == "own" or key not in self.records or key in results.lines:
                        continue
                    if key not in made:
                        made[key] = self._request(key, self.records[key])
                    request = self._intervened(condition, made[key], material)
                    if request is None:
                        own = self.results[condition.own].lines[key]
                        results.add({**own, "intervened": False, "follows_donor": None})
                        self.progress.advance_timed()
                    else:
                        asked.append((condition, key))
                        yield request

        for output in engine.serve(requests()):
            condition, key = asked[output.number]
            if output.stop_reason == "refused":
                raise BadRecord(f"{output.name}: {output.error}")
            donors = {"donor": key.number, "unrelated": key.number, "swap": self.others.get(key.number)}
            donor = donors.get(condition.name)
            record = None if donor is None else self.records[Key(donor, "", 0)]
            self.results[condition].add({**self._line(key, output, record), "intervened": True})
            self.progress.advance_timed()

    def _intervened(self, condition: Condition, request: Request, material: Material | None) -> Request | None:
        """Return the request under a condition, None if there is nothing to replace."""
        if material is None:
            return None
        if condition.name == "skip":
            return dataclasses.replace(request, method="text")
        if condition.name == "markers":
            return dataclasses.replace(request, latent_size=0)
        slots = MAKERS[condition.name](material)
        size, chosen = request.latent_size, self.chosen
        given = give(slots, condition.replaced == "states", size, chosen.look, chosen.place)
        return None if given is None else dataclasses.replace(request, given_slots=given)

    def _materials(self) -> Iterator[tuple[int, Material | None]]:
        """Yield the number of each record and what its slots are made of, None if its own answer has none."""
        evaluator, trained = self.evaluator, self.evaluator.trained
        with_slots, oracle = self._with_slots(), {}
        if any(condition.name == "oracle" for condition in self.conditions):
            oracle = self._oracle_slots()
        spread = measure_spread([self.recordings[key].inputs for key in with_slots]) if with_slots else None
        pad = np.array([[trained.special.latent_pad]], np.int32)
        pause = np.asarray(trained.model.embed(decoder_params(trained.params), pad))[0, 0]
        for key in [key for key in self.records if not key.form]:
            number, own = key.number, self.recordings[key]
            if not len(own.inputs):
                yield number, None
                continue
            other = self.others.get(number)
            yield (
                number,
                Material(
                    own=own,
                    spread=spread,
                    pause=pause,
                    swap=None if other is None else self.recordings[Key(other, "", 0)],
                    oracle=oracle.get(number),
                    seed=(evaluator.seed, number),
                ),
            )

    def _oracle_slots(self) -> dict[int, Slots]:
        """Return the slots of true helper images by record; records that have none are not among them."""
        evaluator, found = self.evaluator, []
        for key in self._with_slots():
            record = self.records[key]
            with contextlib.suppress(BadRecord):
                if not has_looks(record) and hasattr(evaluator.module, "with_steps"):
                    record = evaluator.module.with_steps(record, evaluator.data)
                found.append((key.number, evaluator.asked(record)))
        return oracle_slots(
            evaluator.trained, found, evaluator.decoding["latent_size"], evaluator.prompts, evaluator.seed
        )

    def _line(self, key: Key, output: RequestOutput, donor: Record | None) -> Line:
        """Return the line of an answer; with a donor's slots, and whether it follows the donor."""
        record, module = self.records[key], self.evaluator.module
        line = self.evaluator.line(key, record, output)
        if donor is not None:
            answer = module.find_answer(output.plain_text, record)
            line["follows_donor"] = follows_donor(module, record, donor, answer)
        return line
