"""The run of configs/plain_maps.py with helper images as vision tokens in its warm-up, in place of none."""

from ml_collections import ConfigDict

from configs import plain_maps


def get_config() -> ConfigDict:
    """Return the configuration of the comparison."""
    config = plain_maps.get_config()
    config.warm_up.helper_images = "encode"
    config.data.buckets.small_encoded = {**plain_maps.bucket(144), "images": 3}
    config.data.buckets.large_encoded = {**plain_maps.bucket(230, tokens=36), "images": 3}
    config.data.buckets.many_encoded = {**plain_maps.bucket(358, tokens=36), "images": 6}
    return config
