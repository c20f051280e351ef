"""The runs of a study: their configs, their commands, and whether their files leave something to do."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_jax.analysis.slot_use import report_files
from ilvr_jax.config.experiments import by_key, load_config, parse
from ilvr_jax.config.flags import override
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.config.workdir import read_config
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import results_file, summary_file
from ilvr_jax.evaluation.slot_evaluation import Chosen
from ilvr_jax.files import read_object
from ilvr_jax.studies import Study, Variant

MOST_SEEDS = 1000


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
    """

    name: str
    variant: Variant
    seed: int
    file: str
    changes: Mapping[str, str]
    config: RunConfig
    workdir: Path

    @property
    def key(self) -> str:
        """The name of the run, which is also that of its workdir."""
        return self.workdir.name

    @property
    def answers(self) -> Path:
        """The results file of the evaluation that counts."""
        return self.answers_of(self.variant.method)

    @property
    def slots_summary(self) -> Path:
        """The summary of the evaluation with other slots."""
        return report_files(self.answers, Chosen())["summary"]

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
    return StudyRun(name, variant, seed, file, changes, parse(values), workdir / f"{name}-seed{seed}")


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
    evaluate = [*python, "ilvr_jax.evaluate", str(run.workdir), method, rows]
    with_slots = [*evaluate, f"--slots={','.join(run.variant.slots)}"]
    trained = is_trained(run)
    commands = [] if trained else [train]
    if run.variant.method != "latent" and not (trained and is_evaluated(run, summary_file(run.answers))):
        commands.append(evaluate)
    if run.variant.slots and not (trained and is_evaluated(run, run.slots_summary, run.variant.slots)):
        commands.append(with_slots)
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


def is_evaluated(run: StudyRun, path: Path, slots: Sequence[str] = ()) -> bool:
    """Return whether the summary of an evaluation is one of the trained model, and has rows for these slots."""
    try:
        summary, latent = read_object(path), read_object(run.latent_summary)
    except InputError:
        return False
    same = all(summary.get(name) == latent[name] for name in ("model", "data", "records", "limit", "max_new_tokens"))
    return same and run.answers.exists() and set(slots) <= {row["name"] for row in summary.get("rows", ())}


def read_seconds(run: StudyRun) -> float:
    """Return the seconds that a finished run took: those of its training and of all its evaluations."""
    stages = read_object(run.workdir / "summary.json")["stages"].values()
    seconds = sum(stage["seconds"] + stage["evaluation"]["seconds"] for stage in stages)
    others = [summary_file(run.answers)] * (run.variant.method != "latent")
    others += [run.slots_summary] * bool(run.variant.slots)
    return seconds + sum(read_object(path)["seconds"] for path in others)


def read_training(run: StudyRun) -> dict[str, Any]:
    """Return the steps and the minutes of a finished run's training."""
    stages = read_object(run.workdir / "summary.json")["stages"].values()
    minutes = sum(stage["seconds"] for stage in stages) / 60
    return {"steps": sum(stage["steps"] for stage in stages), "minutes": minutes}
