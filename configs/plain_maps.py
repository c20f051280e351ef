"""FrozenLake maps with the distances written in the answer, and looks at the map between moves, as the paper trains.

The text has all that is needed, and so the slots matter little: the base run is one in which they do. Keys that are
not set here have the defaults of ilvr_jax/config/schema.py, which defines and explains every key.
"""

from ml_collections import ConfigDict

from ilvr_jax.config.experiments import VSP_MAPS, default_config, stage_config


def bucket(prefix: int, segments: int = 0, tail: int = 0, tokens: int = 16) -> ConfigDict:
    """Return the sizes of a batch of maps: up to 4 x 4 cells take 16 vision tokens, up to 6 x 6 take 36."""
    return ConfigDict(
        {
            "prefix": prefix,
            "segments": segments,
            "text": 8 if segments else 0,  # two moves with their cells, and the markers around them
            "tail": tail,
            "images": 1,
            "image_tokens": tokens,
            "helper_tokens": tokens if segments else 0,
        }
    )


def get_config() -> ConfigDict:
    """Return the configuration of the run."""
    config = default_config()
    config.stages = ("warm_up", "stage1", "stage2")
    # Without helper images sequences are shorter, and slots are quickly learned afterwards.
    config.warm_up = stage_config("text", helper_images="omit", train=("vision", "decoder"), steps=950)
    config.stage1 = stage_config("alignment", steps=300, learning_rate=7e-4)
    config.stage2 = stage_config("autonomy", helper_images="slots", steps=100, learning_rate=3e-4)
    config.model.update(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
        mrope_section=(4, 6, 6),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    config.model.vision = ConfigDict(
        {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "window_size": 56,
            "fullatt_block_indexes": (1,),
            "image_mean": (0.75, 0.83, 0.9),
            "image_std": (4.0, 4.0, 4.0),  # the maps' deviation times the root of a patch's 588 inputs
            "patch_init_std": 1.0,
        }
    )
    config.data.image_scale = 28 / 64  # of image files: a cell of 64 pixels becomes one vision token
    config.data.frozen_lake.exclude = (VSP_MAPS,)
    config.data.buckets = ConfigDict(
        {
            "small_short": bucket(66),
            "small_long": bucket(100),
            "large_short": bucket(108, tokens=36),
            "large_middle": bucket(126, tokens=36),
            "large_long": bucket(148, tokens=36),
            "small_looks": bucket(66, segments=2, tail=10),
            "large_looks": bucket(108, segments=2, tail=10, tokens=36),
            "many_looks": bucket(108, segments=5, tail=16, tokens=36),
        }
    )
    config.latents.latent_size = 4
    return config
