"""The records that a run is evaluated on."""

from typing import NamedTuple

from ilvr_jax.config.experiments import VSP_MAPS, evaluation_file
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import AUTO, RunConfig
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord
from ilvr_jax.data.sources import open_parts
from ilvr_jax.tasks import TASKS


class EvaluationRecords(NamedTuple):
    """Records to evaluate on, and their name for messages and results: a path, or how they were chosen."""

    source: Source
    name: str


def open_records(config: RunConfig, held_out: Source | None = None) -> EvaluationRecords | None:
    """Return the records that a config evaluates on: those of `eval.data`, or those held out; None without any.

    `held_out` are the records that `open_parts` returned, if it was called. Raises as the task's `open_source` does.
    """
    path, fraction = evaluation_file(config), config.eval.fraction
    if path is not None:
        open_source = TASKS[config.eval.task].open_source
        source = open_source(path, None, config.data.on_bad_record, config.data.follow_links)
        # As in the config: the same from every folder.
        return EvaluationRecords(source, VSP_MAPS if config.eval.data == AUTO else config.eval.data)
    if not fraction:
        return None
    held_out = held_out or open_parts(config)[1]
    return EvaluationRecords(held_out, f"the held-out part ({fraction:g}) of {config.data.path}")


def check_records(config: RunConfig, records: EvaluationRecords) -> None:
    """Raise BadConfig, naming a record, if the task of a config cannot score answers to the records it evaluates on.

    With `data.on_bad_record="skip"` it is enough that it can score one.
    """
    eval_, count = config.eval, min(len(records.source), config.eval.limit or len(records.source))
    for number in range(count):
        try:
            TASKS[eval_.task].check(records.source[number])
        except BadRecord as error:
            problem = error
        else:
            if config.data.on_bad_record == "skip":
                return
            continue
        if config.data.on_bad_record == "error" or number + 1 == count:
            raise BadConfig(
                f"`eval.task` must be a task for the records of {records.name}, got {eval_.task} ({problem}); choose "
                "another, or set eval.data to '' and eval.fraction to 0"
            )
