"""One of two processes that share a checkpoint: python -m tests.shared_checkpoint FOLDER PORT PROCESS

Each holds half of an array. The newest checkpoint's second half is damaged, which the first process does not read.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.struct  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import PyTree  # noqa: E402

from ilvr_jax.checkpoints.manager import Checkpoints  # noqa: E402
from ilvr_jax.distributed import wait_for_all  # noqa: E402
from ilvr_jax.models.sharding import make_mesh, placed_like, to_mesh  # noqa: E402
from tests.samples import NoData  # noqa: E402


@flax.struct.dataclass
class State:
    params: PyTree
    step: None


def main(folder: Path, port: str, process: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = make_mesh({"slice": 1, "data": 1, "fsdp": 8, "tensor": 1})
    shape = State({"lm_head": jax.ShapeDtypeStruct((16, 4096), "float32")}, None)
    like = placed_like(shape, mesh)

    def state(step: int) -> State:
        noise = np.random.default_rng(0).random(shape.params["lm_head"].shape)  # which does not compress to nothing
        return jax.tree.map(lambda leaf: to_mesh((step + noise).astype(leaf.dtype), leaf.sharding), like)

    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), NoData())
            checkpoints.wait()
        wait_for_all("saved")
        if process == 0:
            for part in (folder / "2" / "params").glob("ocdbt.process_1/d/*"):
                part.write_bytes(b"")
        wait_for_all("damaged")
        log = (folder / f"log_{process}.txt").open("w").write
        step, restored = checkpoints.restore_newest(lambda step: checkpoints.restore(step, like), log, set_aside=True)
        log(f"; restored {step}: {float(restored.params['lm_head'].addressable_data(0).min()):.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
