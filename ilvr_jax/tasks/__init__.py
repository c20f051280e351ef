"""Tasks: how an answer is read out of a decoded text, and when it is right.

A task is a module with these functions:

    open_source(path: Path, root: Path | None, on_bad_record: str) -> Source
        Opens the records of a file, as the functions in FORMATS (ilvr_jax/data/formats.py) do.
    check(record: Record) -> None
        Raises BadRecord, one sentence that begins with the record's name, if answers to it cannot be scored.
    find_answer(text: str) -> str | None
        Returns the answer that a decoded text ends in, None if it cannot be parsed. Never raises.
    canonical(answer: str) -> str
        Returns one spelling for all spellings of an answer that find_answer returned: majority votes count these.
    is_right(record: Record, answer: str) -> bool
        Says whether an answer that find_answer returned is right for a record that passed check.

To add a task, write such a module beside this one and give it a name in TASKS; vsp_reasoning.py is a short example.
"""

from types import ModuleType

from ilvr_jax.tasks import comt, vsp_planning, vsp_reasoning, zebra_cot

TASKS: dict[str, ModuleType] = {
    "vsp_planning": vsp_planning,
    "vsp_reasoning": vsp_reasoning,
    "comt": comt,
    "zebra_cot": zebra_cot,
}
