"""The base run with helper images as vision tokens in the warm-up, to compare with skipping them."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the configuration of the comparison."""
    config = base.get_config()
    config.warm_up.helper_images = "encode"
    config.data.buckets.small_encoded = {**base.bucket(144), "images": 3}
    config.data.buckets.large_encoded = {**base.bucket(230, tokens=36), "images": 3}
    config.data.buckets.many_encoded = {**base.bucket(358, tokens=36), "images": 6}
    return config
