"""Tasks: reading the answer in a decoded text, and scoring it.

A task is a module with these functions:

    open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source
        Open the records of a file for evaluation, as the functions in FORMATS (ilvr_jax/data/formats.py) do.
    check(record: Record) -> None
        Raise BadRecord, in one sentence that begins with the record's name, if answers to it cannot be scored.
    find_answer(text: str, record: Record | None = None) -> str | None
        Return the final answer of a decoded text, None if there is none. Never raises. With the record that was asked,
        the answer is read as one of its question's options.
    canonical(answer: str) -> str
        Return one spelling for all spellings of an answer from find_answer. Results files hold this spelling, and
        majority votes count it.
    is_right(record: Record, answer: str) -> bool
        Return whether an answer from find_answer is right for a record that passed check.

These functions are optional; without one, evaluation skips what it is for:

    controls(record: Record) -> dict[str, Record]
        Return changed copies of the record by the name of the change, such as "without holes". Each is asked once and
        is not scored; its answer is in the results file with that name as "form". Raise BadRecord as check does.
        Default: no controls.
    figures(records: Mapping[int, Record], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]
        Return the task's own figures for the summary, JSON values by name. `records` are those that have answers, by
        number; `lines` are all lines of the results file (FIELDS in ilvr_jax/evaluation/results.py), with those of
        controls. Default: the figures that all tasks share.
    edits(record: Record, seed: int) -> dict[str, Record]
        Return changed copies of the record whose slots can replace its own: "relevant", to which the record's right
        answer is wrong, and "irrelevant", to which it is right. A kind that the record has no edit of is absent. The
        same record and seed give the same edits. Their steps are empty, since those of the record no longer hold.
        Raise BadRecord if the record's image cannot be read. Default: no edits; slots of edits are not tried.
    groups(record: Record) -> Sequence[str]
        Return the names of the groups that the record belongs to, such as "detour needed". Reports on slots have the
        accuracy of each. Default: no groups.
    level(record: Record) -> str
        Return the name of the record's level of difficulty, such as "level 3". Pages of answers can be filtered by it.
        Default: no levels.
    with_steps(record: Record, data: DataConfig) -> Record
        Return the record with the steps, texts and looks with helper images, that a training record of it has in a run
        with this `data`; images and question stay. Raise BadRecord if it has none. Default: records have the steps of
        their file, and without looks among these the slots of helper images ("oracle") are not tried.
    slot_states(record: Record, data: DataConfig) -> Shaped[np.ndarray, "looks places"]
        Return the names of the states that the record's looks show in a run with this `data`, at each place of the
        helper image in the order in which dense targets fill slots; "" where there is none to read. Probes are trained
        to read these from slots. Raise BadConfig if looks have no such states in a run with this `data`.
        Default: evaluation refuses --probes.
    draw_look(record: Record, texts: Sequence[str], data: DataConfig) -> UInt8[np.ndarray, "height width 3"]
        Return the picture for a look. `texts` are the answer's texts before each look so far: the last one precedes
        this look, and len(texts) - 1 looks precede that. The method "pixels" shows it to the model in place of slots.
        `data` is that of the run. Raise BadRecord if the record's image cannot be read.
        Default: evaluation refuses the method "pixels".

What such slots lead to is judged by `follows_donor` below, for every task.

answers.py has the five required functions for options and free text of every kind; comt.py is a task that uses them.

To add a task, write such a module beside this one and name it in TASKS; vsp_reasoning.py is a short example.
"""

from types import ModuleType

from ilvr_jax.data.records import Record
from ilvr_jax.tasks import comt, vsp_planning, vsp_reasoning, zebra_cot

TASKS: dict[str, ModuleType] = {
    "vsp_planning": vsp_planning,
    "vsp_reasoning": vsp_reasoning,
    "comt": comt,
    "zebra_cot": zebra_cot,
}


def follows_donor(task: ModuleType, record: Record, donor: Record, answer: str | None) -> bool:
    """Return whether an answer to `record`, given with the slots of `donor`, is right for the donor and not the record.

    `answer` is None if none was found. An answer that is right for both is no sign of the donor. For some pairs none
    but such answers are right for the donor, as when the donor is the record with one more obstacle; with the roles of
    the two exchanged, the record's right answer is wrong for the edit, so that it can be judged.
    """
    return answer is not None and task.is_right(donor, answer) and not task.is_right(record, answer)
