"""The small run, from scratch on a laptop's CPU: FrozenLake maps that the text sees only through slots.

The answer begins with three looks, and then moves. In the first look the distances to the goal spread from the goal
towards the last cell, in the second back towards the first, and the third shows the best move from every cell, which
the moves of the answer follow. Each slot stands for a cell. From the first look on, text does not see the image
(`image_visibility`).
Evaluate it with `python -m ilvr_jax.evaluate RUN --slots=all`; docs/evidence.md has the results. Keys that are not set
here have the values of configs/plain_maps.py, or the defaults of ilvr_jax/config/schema.py, which explains every key.
"""

import copy

from ml_collections import ConfigDict

from configs import plain_maps
from ilvr_jax.config.experiments import DETOUR_MAPS, VSP_MAPS, stage_config

SIDE = 6  # of the largest map, and of every sketch


def bucket(prefix: int, segments: int = 0, tail: int = 0, tokens: int = SIDE**2, images: int = 1) -> ConfigDict:
    """Return the sizes of a batch of maps: up to 4 x 4 cells take 16 vision tokens, up to 6 x 6 take 36."""
    return ConfigDict(
        {
            "prefix": prefix,
            "segments": segments,
            "text": 2 if segments else 0,  # the markers between two looks
            "tail": tail,
            "images": images,
            "image_tokens": tokens,
            "helper_tokens": SIDE**2 if segments else 0,
        }
    )


# Controls that take as long to train as the run itself. Those whose slots carry nothing see the image all along.
WITHOUT_LOOKS = {
    "stages": ("warm_up",),
    "warm_up.helper_images": "omit",
    "data.buckets.text_small": bucket(82, tokens=16),
    "data.buckets.text_large": bucket(118),
}
WITHOUT_TARGETS = {
    "stages": ("warm_up", "stage1"),
    "latents.sim_weight": 0.0,
    "latents.contrast_weight": 0.0,
    "latents.image_visibility": "all",
}
VARIANTS = {
    "text": {**WITHOUT_LOOKS, "warm_up.steps": 2600},
    "text_tokens": {  # the sketches in words, about as many as there are slots
        **WITHOUT_LOOKS,
        "warm_up.steps": 1700,
        "data.frozen_lake.read_out": "sketches",
        "data.buckets.text_small": bucket(154, tokens=16),
        "data.buckets.text_large": bucket(244),
    },
    "markers": {**WITHOUT_TARGETS, "latents.latent_size": 0, "stage1.steps": 2600},
    "pause": {**WITHOUT_TARGETS, "model.slot_input": "pause", "stage1.steps": 1300},
    "unrelated_targets": {"data.frozen_lake.sketches": "unrelated", "latents.image_visibility": "all"},
    "single": {
        "data.frozen_lake.sketches": "last",
        "data.buckets.looks_small": bucket(34, segments=1, tail=48, tokens=16),
        "data.buckets.looks_large": bucket(56, segments=1, tail=62),
        "data.buckets.pictures_small": bucket(116, images=2),
        "data.buckets.pictures_large": bucket(158, images=2),
        "warm_up.steps": 390,
        "stage1.steps": 1100,
        "guided.steps": 930,
    },
    "stage1": {"stages": ("warm_up", "stage1"), "stage1.steps": 1240},
    "stage2": {"stages": ("warm_up", "stage1", "stage2")},
    "pixels": {"stages": ("warm_up",), "warm_up.steps": 1000},
}


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the run, or of a variant; raise ValueError, listing them, for an unknown one."""
    if variant and variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = plain_maps.get_config()
    config.stages = ("warm_up", "stage1", "guided")
    # True sketches as pictures: the vision tower and the text learn to read them.
    config.warm_up = stage_config("text", helper_images="encode", train=("vision", "decoder"), steps=200)
    config.stage1 = stage_config("alignment", steps=600, learning_rate=1.5e-3)
    # Slots on top of the model's own slots, which have errors, still with targets.
    config.guided = stage_config("guided", steps=480, learning_rate=1e-3)
    config.stage2 = stage_config("autonomy", helper_images="slots", steps=260, learning_rate=3e-4)  # of a variant
    # Too shallow to follow a path within one step: that takes the steps of the looks.
    config.model.num_hidden_layers = 2
    config.model.vision.update(depth=1, fullatt_block_indexes=())  # each cell sees a window of 2 x 2 cells
    config.model.slot_input = "placed"
    # Low frequencies of rotary positions could not tell the columns of so small a map apart.
    config.model.rope_theta = 30.0
    config.model.mrope_section = (2, 5, 9)
    config.data.frozen_lake.update(levels=(3, 4, 5, 6, 6), looks="distances", sweeps=2, read_out="none", readings=0.3)
    config.data.frozen_lake.name_goal = True  # so that the end of a path is read like a move
    config.data.frozen_lake.exclude = (VSP_MAPS, DETOUR_MAPS)
    config.data.frozen_lake.detour_share = 0.6  # on a straight path, a move can be guessed from the one before
    config.data.buckets = ConfigDict(
        {
            "reading_small": bucket(52, tokens=16),
            "reading_large": bucket(96),
            "looks_small": bucket(34, segments=3, tail=48, tokens=16),
            "looks_large": bucket(56, segments=3, tail=62),
            "pictures_small": bucket(196, images=4),
            "pictures_large": bucket(238, images=4),
        }
    )
    config.latents.update(
        latent_size=SIDE**2,
        selection="dense",
        contrast_weight=3.0,
        own_share=0.75,  # the others hold true targets, so that the text reads both kinds
        image_visibility="until_look",
        slot_positions="turning_grid",
    )
    config.eval.max_new_tokens = 192
    if variant:
        config.update_from_flattened_dict(copy.deepcopy(VARIANTS[variant]))
    return config
