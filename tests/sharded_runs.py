"""Runs each stage and decoding on meshes of simulated devices: python -m tests.sharded_runs OUT.npz

A process of its own, since the number of devices is fixed when jax starts.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from ilvr_jax.analysis.hlo import collectives  # noqa: E402
from ilvr_jax.checkpoints.manager import Checkpoints  # noqa: E402
from ilvr_jax.inference import kv_cache  # noqa: E402
from ilvr_jax.inference.engine import Engine, generate  # noqa: E402
from ilvr_jax.inference.requests import RequestOutput  # noqa: E402
from ilvr_jax.inference.sizes import fit_settings  # noqa: E402
from ilvr_jax.method.objectives import cross_entropy  # noqa: E402
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL  # noqa: E402
from ilvr_jax.models.sharding import (  # noqa: E402
    AXES,
    divisor,
    make_mesh,
    on_mesh,
    place_rows,
    placed_like,
    shardings,
    to_mesh,
)
from ilvr_jax.training.optimizer import make_optimizer  # noqa: E402
from ilvr_jax.training.state import abstract_train_state, init_train_state  # noqa: E402
from ilvr_jax.training.step import OBJECTIVES, make_train_step  # noqa: E402
from tests.decoding import PARAMS, make_request, prompts  # noqa: E402
from tests.samples import NoData  # noqa: E402
from tests.steps import CONFIG, LATENTS, SPECIAL, lay_out, samples, stage  # noqa: E402
from tests.vectors import COPIES, Vector, of_kind  # noqa: E402

STEPS = 5
# Sizes of slice, data, fsdp and tensor; the first is one device.
MESHES = ((1, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2), (2, 2, 2, 1))
MODEL = Qwen2_5VL(CONFIG)


def open_stage(objective: str, mesh: Mesh, attention: str = "auto"):
    """Returns a fresh state, where each part of one lies, and a step in two parts if the devices leave rows for them.

    The step takes and returns a state, and returns its loss and gradient norm.
    """
    model = Qwen2_5VL(dataclasses.replace(CONFIG, attention=attention))
    settings = stage(objective=objective, batch_size=16, accumulation=2, learning_rate=3e-3)
    optimizer = make_optimizer(settings)
    params = model.init(jax.random.key(0))
    params = jax.device_put(params, shardings(params, mesh))
    like = abstract_train_state(params, optimizer, settings, mesh)
    train_step = make_train_step(model, settings, LATENTS, optimizer, divisor("rows", mesh))

    def step(state):
        with on_mesh(mesh):
            state, values = train_step(state, place_rows(lay_out(samples() * 4), mesh))
        same = jax.tree.map(
            lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), state, like
        )
        assert all(jax.tree.leaves(same)), "the step moved its state"
        return state, [float(values["loss"]), float(values["gradient_norm"])]

    with on_mesh(mesh):
        return init_train_state(params, optimizer, settings, jax.random.key(7), mesh), like, step


def losses(objective: str, mesh: Mesh, attention: str = "auto") -> list[list[float]]:
    """Returns losses and gradient norms of a few steps."""
    state, _, step = open_stage(objective, mesh, attention)
    found = []
    for _ in range(STEPS):
        state, values = step(state)
        found.append(values)
    return found


def losses_on_changing_meshes(objective: str) -> list[list[float]]:
    """Returns the same of a run that is saved after every step and goes on on another mesh."""
    found = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=1) as checkpoints:
        for number, sizes in enumerate((MESHES[0], (1, 2, 4, 1), (1, 1, 8, 1), MESHES[0], (1, 2, 2, 2)), 1):
            state, like, step = open_stage(objective, mesh_of(sizes))
            if found:
                state = checkpoints.restore(number - 1, like)
            state, values = step(state)
            found.append(values)
            checkpoints.save(number, state, NoData())
            checkpoints.wait()
    return found


def tokens(mesh: Mesh) -> np.ndarray:
    """Returns what is decoded for twelve prompts, in eight rows."""
    requests = [make_request(prompt, 24, 3) for prompt in [*prompts(), *prompts()[::-1], *prompts()[:2]]]
    with on_mesh(mesh):
        params = jax.device_put(PARAMS, shardings(PARAMS, mesh))
        settings = fit_settings(requests, 8, MODEL.geometry, share_prefixes=False)
        return padded(Engine(MODEL, params, SPECIAL, settings).answer(requests))


def published_tokens(mesh: Mesh, vectors: list[Vector]) -> np.ndarray:
    """Returns what is decoded for each file of the published code, beside the prompts of the others."""
    found = []
    for vector in vectors:
        sizes = vector.meta["max_new_tokens"], vector.meta["latent_size"]
        group = [other for other in vectors if other.config == vector.config]
        requests = [make_request(other.sample(), *sizes) for other in (vector, *group)]
        params = vector.params()
        with on_mesh(mesh):
            params = jax.tree.map(to_mesh, jax.device_get(params), shardings(params, mesh))
            found.append(generate(Qwen2_5VL(vector.config), params, requests, vector.special)[0])
    return padded(found)


def padded(outputs: list[RequestOutput]) -> np.ndarray:
    """Returns the tokens of each output, with -1 behind them."""
    found = np.full((len(outputs), max(len(output.tokens) for output in outputs)), -1)
    for row, output in zip(found, outputs, strict=True):
        row[: len(output.tokens)] = output.tokens
    return found


def collectives_of_a_loop() -> list[int]:
    """Returns number and bytes of the sums over devices in five steps of a loop, each of [4, 64] float32."""
    mesh = make_mesh({"slice": 1, "data": 1, "fsdp": 8, "tensor": 1})
    over_columns, over_rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ("fsdp",)))

    def loop(inputs, weights):
        def body(carry, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(carry @ weights), over_columns), None

        return jax.lax.scan(body, inputs, length=5)[0]

    inputs = jax.ShapeDtypeStruct((4, 64), np.float32, sharding=over_columns)
    weights = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=over_rows)
    (found,) = collectives(jax.jit(loop).lower(inputs, weights).compile().as_text())
    return [found.kind == "all-reduce", found.count, found.bytes]


def sent_by_the_loss() -> list[float]:
    """Returns what the loss and its gradient send in 16 chunks, in sizes of the output head."""
    rows, columns, chunks = 8, 64, 16
    model = Qwen2_5VL(dataclasses.replace(CONFIG, vocab_size=4096))
    head = 4 * model.config.vocab_size * CONFIG.hidden_size
    mesh = mesh_of((1, 1, 8, 1))
    decoder = placed_like(jax.eval_shape(model.init, jax.random.key(0)), mesh)["decoder"]
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    hidden = jax.ShapeDtypeStruct((rows, columns, CONFIG.hidden_size), np.float32, sharding=place)
    targets = jax.ShapeDtypeStruct((rows, columns), np.int32, sharding=place)

    def loss(decoder, hidden, targets):
        at_a_time = model.config.vocab_size * columns // chunks
        return cross_entropy(model, decoder, hidden, targets, chunk_logits=at_a_time).mean()

    with on_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(decoder, hidden, targets).compile().as_text()
    return [sum(found.bytes for found in collectives(program)) / head]


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])


def main(out: str) -> None:
    jax.config.update("jax_compilation_cache_dir", f"{out}.compiled")  # a mesh's step is met more than once
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    results = {}
    vectors = of_kind(COPIES, "generate")
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        for objective in OBJECTIVES:
            results[f"{objective} {sizes}"] = np.array(losses(objective, mesh))
        results[f"tokens {sizes}"] = tokens(mesh)
        if sizes != (1, 1, 1, 1):
            results[f"published {sizes}"] = published_tokens(mesh, vectors)
        if sizes == (1, 2, 2, 2):
            with mock.patch.object(kv_cache, "current_platform", lambda: "tpu"):
                jax.clear_caches()
                results[f"tokens {sizes} with a TPU's writes"] = tokens(mesh)
            jax.clear_caches()
            results[f"alignment {sizes} with splash"] = np.array(losses("alignment", mesh, "splash"))
    results["alignment on changing meshes"] = np.array(losses_on_changing_meshes("alignment"))
    results["sent by_the_loss"] = np.array(sent_by_the_loss())
    results["collectives (1, 1, 8, 1)"] = np.array(collectives_of_a_loop())
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
