"""The base config as it ships: which programs it compiles, and that it never trains on what it is judged by."""

import contextlib
import dataclasses
import itertools
import json
from collections import defaultdict
from pathlib import Path

import jax
import pytest

from ilvr_jax.checkpoints.runs import build_run_model
from ilvr_jax.config.experiments import DETOUR_MAPS, evaluation_file, load_config, parse
from ilvr_jax.config.flags import override
from ilvr_jax.data.sources import make_tokenizer, open_source
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.inference.decode import decode_steps, prefill
from ilvr_jax.inference.sizes import GROUPS, MAX_SIZES
from ilvr_jax.method.layout import Layout
from ilvr_jax.models.sharding import one_device
from ilvr_jax.progress import Progress
from ilvr_jax.training.batches import open_iterator
from ilvr_jax.training.evaluations import evaluate_stage, stage_summary
from ilvr_jax.training.run import Run
from ilvr_jax.training.setup import make_step, open_evaluation_records
from ilvr_jax.training.state import init_train_state
from tests.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs"
BUCKETS_MET = {
    "warm_up": {"reading_small", "reading_large", "pictures_small", "pictures_large"},
    "stage1": {"reading_small", "reading_large", "looks_small", "looks_large"},
    "guided": {"reading_small", "reading_large", "looks_small", "looks_large"},
}
SMALLER = {
    "model.num_hidden_layers": 1,
    "model.intermediate_size": 16,
    "model.remat_policy": "none",
    "model.vision.depth": 1,
    "model.vision.fullatt_block_indexes": (0,),
    "eval.max_new_tokens": 8,
}
SMALLER_STAGES = {"batch_size": 2, "optimizer": "adamw"}


def open_run(path: Path, workdir: Path) -> Run:
    """Return a config's run with its data and layouts, but a smaller model and smaller batches."""
    values = load_config(path).to_dict()
    of_stages = {f"{stage}.{key}": value for stage in values["stages"] for key, value in SMALLER_STAGES.items()}
    for key, value in {**SMALLER, **of_stages}.items():
        override(values, key, str(value))
    config = parse(values)
    source = open_source(config.data, config.seed)
    tokenizer = make_tokenizer(config, source)
    model = build_run_model(config, workdir, tokenizer)
    mesh = one_device()
    steps = {name: make_step(config, name, model, mesh) for name in config.stages}
    records = open_evaluation_records(config, None)
    special, progress = special_tokens(tokenizer), Progress(None)
    return Run(config, workdir, source, records, tokenizer, special, model, mesh, steps, progress)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_run(CONFIGS / "base.py", tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", ["plain_maps", "frozen_lake", "frozen_lake_encoded", "detours"])
def test_the_buckets_of_other_configs_hold_their_data(name, tmp_path):
    run = open_run(CONFIGS / f"{name}.py", tmp_path)
    for stage in run.config.stages:
        with contextlib.closing(open_iterator(run, stage, seed=1, vision={})) as iterator:
            rows = sum(len(batch.tokens) for batch in itertools.islice(iterator, 200))
        assert rows == 200 * run.config.stages[stage].batch_size


def signature(batch):
    """Return everything that a compiled program depends on in a batch."""
    return jax.tree.structure(batch), tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize("stage", BUCKETS_MET)
def test_each_step_compiles_once_a_bucket(run, stage):
    """All batches of a bucket have one signature; two buckets, met again and again, are compiled twice in all."""
    size = run.config.latents.latent_size
    names = {}
    for name, bucket in run.config.data.buckets.items():
        layout = Layout(latent_size=size, **vars(bucket))
        names |= {layout: name, dataclasses.replace(layout, helper_tokens=0): name}
    optimizer, step = run.steps[stage]
    params, settings = run.model.init(jax.random.key(0)), run.config.stages[stage]
    state = init_train_state(params, optimizer, settings, jax.random.key(1), run.mesh)
    signatures, compiled, repeated = defaultdict(set), set(sorted(BUCKETS_MET[stage])[-2:]), 0
    with contextlib.closing(open_iterator(run, stage, seed=0, vision={})) as iterator:
        for batch in itertools.islice(iterator, 600):
            name = names[batch.layout]
            if name in compiled and (name not in signatures or repeated < 10):
                repeated += name in signatures
                state, _ = step(state, batch)
            signatures[name].add(signature(batch))
    assert signatures.keys() == BUCKETS_MET[stage]
    assert all(len(alike) == 1 for alike in signatures.values())
    assert repeated == 10 and step._cache_size() == len(compiled)


def test_evaluation_compiles_decoding_once(run):
    before = decode_steps._cache_size(), prefill._cache_size()
    evaluate_stage(run, "guided", run.model.init(jax.random.key(0)))
    assert stage_summary(run, "guided")["questions"] == 200
    assert decode_steps._cache_size() - before[0] == 1 and prefill._cache_size() - before[1] <= MAX_SIZES * len(GROUPS)


def test_the_maps_of_the_evaluation_are_left_out_of_the_training_data(run):
    data = run.config.data
    paths = [evaluation_file(run.config).absolute(), REPOSITORY / DETOUR_MAPS]
    assert [REPOSITORY / name for name in data.frozen_lake.exclude] == paths
    lines = [line for path in paths for line in path.read_text().splitlines()]
    maps = {tuple(map(tuple, json.loads(line)["map_desc"])) for line in lines}
    assert len(lines) == 400 and maps <= run.source.excluded
