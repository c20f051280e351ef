"""Tasks: how an answer is read out of a decoded text, and when it is right.

A task is a module with these functions:

    open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source
        Opens the records of a file for evaluation, as the functions in FORMATS (ilvr_jax/data/formats.py) do.
    check(record: Record) -> None
        Raises BadRecord, one sentence that begins with the record's name, if answers to it cannot be scored.
    find_answer(text: str, record: Record | None = None) -> str | None
        Returns the answer that a decoded text ends in, None if it cannot be parsed. Never raises. With the record that
        was asked, an answer is read among the options of its question.
    canonical(answer: str) -> str
        Returns one spelling for the spellings of an answer that find_answer returned: majority votes count these.
    is_right(record: Record, answer: str) -> bool
        Returns whether an answer that find_answer returned is right for a record that passed check.

It may have these, too, which evaluation uses where they are:

    controls(record: Record) -> dict[str, Record]
        Returns records that are asked beside this one and not scored, by a name for what was changed in them. Their
        answers are in the results with that name as "form". Raises BadRecord as check does.
    figures(records: Mapping[int, Record], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]
        Returns figures of the task's own for the summary, from the records answered, by number, and all lines of the
        results (FIELDS in tasks/results.py), those of controls included.
    draw_look(record: Record, text: str) -> UInt8[np.ndarray, "height width 3"]
        Returns the picture that a look shows after `text` of the answer: for the method "pixels", which is refused
        for a task without it.

answers.py has these functions for options and free text of every kind; comt.py is a task that uses them.

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
