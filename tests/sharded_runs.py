"""Runs each stage and decoding on meshes of simulated devices: python -m tests.sharded_runs OUT.npz

A process of its own, since the number of devices is fixed when jax starts.
"""

import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from ilvr_jax.inference.decode import DecodeSettings, generate  # noqa: E402
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL  # noqa: E402
from ilvr_jax.models.sharding import AXES, make_mesh, on_mesh, place_rows, placed_like, row_shards  # noqa: E402
from ilvr_jax.reports.hlo import collectives  # noqa: E402
from ilvr_jax.training.optimizer import make_optimizer  # noqa: E402
from ilvr_jax.training.state import create_state  # noqa: E402
from ilvr_jax.training.step import OBJECTIVES, make_train_step  # noqa: E402
from tests.test_decode import PARAMS, prompts  # noqa: E402
from tests.test_decode import lay_out as lay_out_prompts  # noqa: E402
from tests.test_step import CONFIG, LATENTS, SPECIAL, lay_out, samples, stage  # noqa: E402

STEPS = 5
# Sizes of slice, data, fsdp and tensor; the first is one device.
MESHES = ((1, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2), (2, 2, 2, 1))
MODEL = Qwen2_5VL(CONFIG)


def losses(objective: str, mesh: jax.sharding.Mesh) -> list[list[float]]:
    """Returns losses and gradient norms of a few steps, in two parts where the devices leave rows for them."""
    settings = stage(objective=objective, batch_size=16, accumulation=2, learning_rate=3e-3)
    optimizer = make_optimizer(settings)
    with on_mesh(mesh):

        def start(key):
            return create_state(MODEL.init(key), optimizer, ("decoder",), objective == "alignment", jax.random.key(7))

        places = jax.tree.map(lambda leaf: leaf.sharding, placed_like(jax.eval_shape(start, jax.random.key(0)), mesh))
        state = jax.jit(start, out_shardings=places)(jax.random.key(0))
        step = make_train_step(MODEL, settings, ConfigDict(vars(LATENTS)), optimizer, row_shards(mesh))
        found = []
        for _ in range(STEPS):
            state, values = step(state, place_rows(lay_out(samples() * 4), mesh))
            found.append([float(values["loss"]), float(values["gradient_norm"])])
        same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
        assert all(jax.tree.leaves(same)), "the step moved its state"
    return found


def tokens(mesh: jax.sharding.Mesh) -> np.ndarray:
    """Returns what is decoded for eight prompts."""
    rows = [*prompts(), *prompts()[:3]]
    with on_mesh(mesh):
        like = placed_like(jax.eval_shape(lambda: PARAMS), mesh)
        params = jax.device_put(PARAMS, jax.tree.map(lambda leaf: leaf.sharding, like))
        batch, seeds = place_rows((lay_out_prompts(rows), np.arange(8, dtype=np.uint32)), mesh)
        return np.asarray(generate(MODEL, params, batch, seeds, DecodeSettings(24, 3), SPECIAL).tokens)


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


def main(out: str) -> None:
    results = {}
    for sizes in MESHES:
        count = int(np.prod(sizes))
        mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:count])
        for objective in OBJECTIVES:
            results[f"{objective} {sizes}"] = np.array(losses(objective, mesh))
        results[f"tokens {sizes}"] = tokens(mesh)
    results["collectives (1, 1, 8, 1)"] = np.array(collectives_of_a_loop())
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
