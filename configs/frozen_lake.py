"""The run of configs/plain_maps.py with more time: the same model and stages, more steps, and more hard maps."""

from ml_collections import ConfigDict

from configs import plain_maps


def get_config() -> ConfigDict:
    """Return the configuration of the longer run."""
    config = plain_maps.get_config()
    config.data.frozen_lake.levels = (3, 4, 5, 6, 6)
    config.data.frozen_lake.detour_share = 0.4
    config.warm_up.steps = 3500
    config.stage1.steps = 1000
    config.stage2.steps = 600
    config.checkpoint_every = 500
    return config
