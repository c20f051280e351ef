"""The runs of a study: their configs, their commands, and whether their files leave something to do."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_jax.analysis.slot_use import report_files
from ilvr_jax.config.experiments import by_key, load_config, parse, resolve_path
from ilvr_jax.config.flags import override
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.config.workdir import read_config
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import results_file, summary_file
from ilvr_jax.evaluation.slot_evaluation import Chosen
from ilvr_jax.files import read_object
from ilvr_jax.studies import Study, Variant

MOST_SEEDS = 1000
OWN_DATA = ""  # the records that the config is evaluated on; other names are those of a study's `more_data`


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """A variant of a study with a seed.

    Attributes:
        name: the variant's.
        variant: its entry in the study.
        seed: of the config.
        file: the config file, with its own variant.
        changes: flags of the config by key, without the seed.
        config: the resulting config.
        workdir: of the run.
        data: the files of further records that it is evaluated on, by name.
    """

    name: str
    variant: Variant
    seed: int
    file: str
    changes: Mapping[str, str]
    config: RunConfig
    workdir: Path
    data: Mapping[str, Path]

    @property
    def key(self) -> str:
        """The name of the run, which is also that of its workdir."""
        return self.workdir.name

    def answers(self, data: str = OWN_DATA) -> Path:
        """Return the results file of the evaluation that counts, on some data."""
        path = self.answers_of(self.variant.method)
        return path.with_stem(f"{path.stem}-{data}") if data else path

    def slots_summary(self, data: str = OWN_DATA) -> Path:
        """Return the summary of the evaluation with other slots, on some data."""
        return report_files(self.answers(data), Chosen())["summary"]

    @property
    def latent_summary(self) -> Path:
        """The summary of the evaluation that training ends with."""
        return summary_file(self.answers_of("latent"))

    def answers_of(self, method: str) -> Path:
        """Return the results file of an evaluation after the last stage."""
        stage, settings = list(self.config.stages.items())[-1]
        return results_file(self.workdir, self.config, stage, settings.steps, self.config.eval.task, method)


def open_run(study: Study, name: str, seed: int, file: str, workdir: Path, quick: bool) -> StudyRun:
    """Return the run of a variant with a seed, in a folder of the study's workdir.

    `file` is the study's config file. Raises BadConfig if that has no such variant or a change is invalid.
    """
    variant = study.variants[name]
    file = f"{file}:{variant.variant}" if variant.variant else file
    values = load_config(file).to_dict()
    for key, text in variant.changes.items():
        override(values, key, text)
    changes = {**variant.changes, **(for_stages(study.quick, values["stages"]) if quick else {})}
    for key, text in {**changes, "seed": str(seed)}.items():
        override(values, key, text)
    data = {more: resolve_path(path) for more, path in study.more_data.items()}
    return StudyRun(name, variant, seed, file, changes, parse(values), workdir / f"{name}-seed{seed}", data)


def count_seeds(workdir: Path) -> int:
    """Return the number of seeds, counted from 0, that the runs in a study's workdir have."""
    seeds = [path.parent.name.rpartition("-seed")[2] for path in workdir.glob("*-seed*/config.json")]
    return min(MOST_SEEDS, max((int(seed) + 1 for seed in seeds if seed.isdecimal()), default=0))


def for_stages(changes: Mapping[str, str], stages: Sequence[str]) -> dict[str, str]:
    """Return changes in which a key with `*` is one key for each stage."""
    return {
        key.replace("*", stage): text for key, text in changes.items() for stage in (stages if "*" in key else ("",))
    }


def remaining_commands(run: StudyRun) -> list[list[str]]:
    """Return the commands that complete a run, by its files; none for a finished run."""
    python, method = [sys.executable, "-m"], f"--method={run.variant.method}"
    flags = [f"--config.{key}={text}" for key, text in {**run.changes, "seed": run.seed}.items()]
    train = [*python, "ilvr_jax.train", f"--config={run.file}", f"--workdir={run.workdir}", *flags]
    rows = f"--batch-size={run.config.eval.batch_size}"
    trained = is_trained(run)
    commands = [] if trained else [train]
    for data in (OWN_DATA, *run.data):
        evaluate = [*python, "ilvr_jax.evaluate", str(run.workdir), method, rows]
        if data:
            limit = f"--limit={run.config.eval.limit}"
            evaluate += [f"--data={run.data[data]}", f"--out={run.answers(data)}", limit]
        by_training = data == OWN_DATA and run.variant.method == "latent"
        if not by_training and not (trained and is_evaluated(run, summary_file(run.answers(data)), data)):
            commands.append(evaluate)
        slots = run.variant.slots
        if slots and not (trained and is_evaluated(run, run.slots_summary(data), data, slots)):
            commands.append([*evaluate, f"--slots={','.join(slots)}"])
    return commands


def is_trained(run: StudyRun) -> bool:
    """Return whether all stages of a run are trained and evaluated with the config of the study."""
    try:
        stored, summary = by_key(read_config(run.workdir)), read_object(run.workdir / "summary.json")
        latent = read_object(run.latent_summary)
    except InputError:
        return False
    counted = {f"{name}.steps" for name, stage in run.config.stages.items() if stage.epochs}  # from the records
    config = {key: value for key, value in by_key(run.config).items() if key not in counted}
    stages = summary.get("stages", {})
    return (
        config.items() <= stored.items()
        and list(stages) == list(run.config.stages)
        and all("seconds" in stage for stage in stages.values())
        and stages[latent["stage"]].get("evaluation") == latent
        and run.answers_of("latent").exists()
    )


def is_evaluated(run: StudyRun, path: Path, data: str, slots: Sequence[str] = ()) -> bool:
    """Return whether the summary of an evaluation is of the trained model and the data, with rows for these slots."""
    try:
        summary, latent = read_object(path), read_object(run.latent_summary)
    except InputError:
        return False
    if data:
        latent = {**latent, "data": str(run.data[data]), "records": summary.get("records")}
    same = all(summary.get(name) == latent[name] for name in ("model", "data", "records", "limit", "max_new_tokens"))
    return same and run.answers(data).exists() and set(slots) <= {row["name"] for row in summary.get("rows", ())}


def read_seconds(run: StudyRun) -> float:
    """Return the seconds that a finished run took: those of its training and of all its evaluations."""
    stages = read_object(run.workdir / "summary.json")["stages"].values()
    seconds = sum(stage["seconds"] + stage["evaluation"]["seconds"] for stage in stages)
    others = [summary_file(run.answers(data)) for data in run.data]
    others += [summary_file(run.answers())] * (run.variant.method != "latent")
    others += [run.slots_summary(data) for data in (OWN_DATA, *run.data) if run.variant.slots]
    return seconds + sum(read_object(path)["seconds"] for path in others)


def read_training(run: StudyRun) -> dict[str, Any]:
    """Return the steps and the minutes of a finished run's training."""
    stages = read_object(run.workdir / "summary.json")["stages"].values()
    minutes = sum(stage["seconds"] for stage in stages) / 60
    return {"steps": sum(stage["steps"] for stage in stages), "minutes": minutes}
