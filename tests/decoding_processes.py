"""Decodes the published code's prompts in one of two processes: python -m tests.decoding_processes OUT PROCESS PORT"""

import sys

import jax
import numpy as np


def main(out: str, process: str, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    # Imported afterwards, since they use the devices.
    from tests.sharded_runs import mesh_of, published_tokens
    from tests.vectors import COPIES, of_kind

    tokens = published_tokens(mesh_of((1, 2, 2, 2)), of_kind(COPIES, "generate")[:2])
    np.save(f"{out}.{process}.npy", tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
