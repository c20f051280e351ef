"""FrozenLake maps of which the text knows only what slots hand on: sketches of distances, swept over the map.

The answer begins with three looks, and then moves. In the first look the distances to the goal spread from the goal
towards the last cell, in the second back towards the first, and the third shows the best move from every cell, which
the moves of the answer follow. Each slot stands for a cell. From the first look on, text does not see the image
(`image_visibility`).
Evaluate it with `python -m ilvr_jax.evaluate RUN --slots=all`; docs/evidence.md has the results.
"""

from ml_collections import ConfigDict

from configs import base
from ilvr_jax.config.experiments import stage_config

SIDE = 6  # of the largest map, and of every sketch

# Controls that take as long to train as the run itself. Those whose slots carry nothing see the image all along.
WITHOUT_LOOKS = {"stages": ("warm_up",), "warm_up.helper_images": "omit"}
WITHOUT_TARGETS = {"latents.sim_weight": 0.0, "latents.contrast_weight": 0.0, "latents.image_visibility": "all"}
VARIANTS = {
    "text": {**WITHOUT_LOOKS, "warm_up.steps": 2600},
    # The sketches in words, about as many as there are slots.
    "text_tokens": {**WITHOUT_LOOKS, "warm_up.steps": 1400, "data.frozen_lake.read_out": "sketches"},
    "markers": {
        **WITHOUT_TARGETS,
        "stages": ("warm_up", "stage1"),
        "stage1.steps": 2000,
        "latents.latent_size": 0,
    },
    "pause": {
        **WITHOUT_TARGETS,
        "stages": ("warm_up", "stage1"),
        "stage1.steps": 1100,
        "model.slot_input": "pause",
    },
    "unrelated_targets": {"data.frozen_lake.sketches": "unrelated", "latents.image_visibility": "all"},
    "single": {
        "data.frozen_lake.sketches": "last",
        "warm_up.steps": 400,
        "stage1.steps": 1100,
        "guided.steps": 700,
    },
    "stage1": {"stages": ("warm_up", "stage1"), "stage1.steps": 1100},
    "stage2": {"stages": ("warm_up", "stage1", "stage2"), "stage2.steps": 200},
    "pixels": {"stages": ("warm_up",), "warm_up.steps": 1100},
}


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


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the run, or of a variant; raise ValueError, listing them, for an unknown one."""
    if variant and variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = base.get_config()
    config.stages = ("warm_up", "stage1", "guided")
    # True sketches as pictures: the vision tower and the text learn to read them.
    config.warm_up = stage_config("text", helper_images="encode", train=("vision", "decoder"), steps=200)
    config.stage1 = stage_config("alignment", steps=600, learning_rate=1.5e-3)
    # Slots on top of the model's own slots, which have errors, still with targets.
    config.guided = stage_config("guided", steps=400, learning_rate=1e-3)
    config.stage2 = stage_config("autonomy", helper_images="slots", steps=60, learning_rate=3e-4)
    config.model.slot_input = "placed"
    # Low frequencies of rotary positions could not tell the columns of so small a map apart.
    config.model.rope_theta = 30.0
    config.model.mrope_section = (2, 5, 9)
    config.data.frozen_lake.update(levels=(3, 4, 5, 6, 6), looks="distances", sweeps=2, read_out="none", readings=0.3)
    config.data.buckets = ConfigDict(
        {
            "reading_small": bucket(52, tokens=16),
            "reading_large": bucket(96),
            "looks_small": bucket(34, segments=3, tail=44, tokens=16),
            "looks_large": bucket(56, segments=3, tail=58),
            "text_small": bucket(78, tokens=16),
            "text_large": bucket(114),
            "words_small": bucket(150, tokens=16),
            "words_large": bucket(240),
            "pictures_small": bucket(192, images=4),
            "pictures_large": bucket(234, images=4),
        }
    )
    config.latents.update(
        latent_size=SIDE**2,
        selection="dense",
        contrast_weight=3.0,
        image_visibility="until_look",
        slot_positions="turning_grid",
    )
    config.eval.max_new_tokens = 192
    if variant:
        config.update_from_flattened_dict(VARIANTS[variant])
    return config
