"""The evaluation of a stage at its end: evaluations/<stage>.json, the answers and the settings beside it."""

from typing import Any

from jaxtyping import PyTree

from ilvr_jax.config.experiments import evaluation_file
from ilvr_jax.data.pipeline import fingerprint
from ilvr_jax.distributed import is_main
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.maps import evaluate, read_evaluation
from ilvr_jax.files import read_object, write_json
from ilvr_jax.training.run import Run


def evaluate_stage(run: Run, name: str, params: PyTree) -> None:
    """Write evaluations/<stage>.json and the answers beside it, unless they exist and follow from the same settings."""
    if is_evaluated(run, name):
        return
    path = run.workdir / "evaluations" / f"{name}.json"
    run.progress.log(f"{name}: evaluating on {len(run.evaluation_source)} maps of {evaluation_file(run.config)}")
    evaluation = evaluate(
        run.config, run.evaluation_source, run.model, params, run.tokenizer, run.special, run.progress.console, run.mesh
    )
    if is_main():
        evaluation.write(path)
        write_json(path.with_suffix(".settings.json"), evaluation_settings(run, name))
    summary = evaluation.summary()
    run.progress.log(
        f"{name}: success {summary['success_rate']:.3f}, decoded {summary['latent_segments']} latent segments with "
        f"{summary['latent_slots']} slots, in {summary['seconds']:.0f} s"
    )


def is_evaluated(run: Run, name: str) -> bool:
    """Return whether a stage's evaluation is complete and follows from these settings; True without evaluation data."""
    if run.evaluation_source is None:
        return True
    path = run.workdir / "evaluations" / f"{name}.json"
    try:
        settings = read_object(path.with_suffix(".settings.json"))
    except InputError:
        return False
    return settings == evaluation_settings(run, name) and read_evaluation(path, run.evaluation_source) is not None


def evaluation_settings(run: Run, name: str) -> dict[str, Any]:
    """Return what a stage's evaluation depends on: `eval`, the fingerprint of its records and the stage's steps."""
    source = {"records": fingerprint(run.evaluation_source), "step": run.config.stages[name].steps}
    return vars(run.config.eval) | source
