"""The run of configs/base.py on maps with long detours: the setting of the study `slots`, with the same variants.

Seven in ten of the maps need four moves or more beyond those of the map without holes, and so do all maps of its
evaluation. As in the base run, two sweeps of distances find a path on every map.
"""

from ml_collections import ConfigDict

from configs import base
from ilvr_jax.config.experiments import DETOUR_MAPS

LONGER_ANSWER = 16  # tokens: paths of up to 16 moves, where the base run has 12


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the run, or of a variant; raise ValueError, listing them, for an unknown one."""
    config = base.get_config(variant)
    config.data.frozen_lake.update(
        levels=(5, 6, 6), hole_probability=0.3, detour_share=0.7, detour_moves=4, max_moves=16
    )
    for name, bucket in list(config.data.buckets.items()):
        if name.endswith("small"):  # for maps of up to 4 x 4 cells
            del config.data.buckets[name]
        elif name != "reading_large":
            bucket["tail" if bucket.segments else "prefix"] += LONGER_ANSWER
    config.eval.data = DETOUR_MAPS
    return config
