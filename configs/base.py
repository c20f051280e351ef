"""The defaults, and the small run: FrozenLake maps from scratch on a laptop's CPU, all three stages."""

from ml_collections import ConfigDict


def stage(**changes) -> ConfigDict:
    """Returns the settings of one stage; `changes` go on top."""
    return ConfigDict(
        {
            "objective": "text",  # "text", "alignment" (stage 1) or "autonomy" (stage 2)
            "helper_images": "latent",  # "latent" slots, "omit", or "encode" as vision tokens
            "train": ("decoder",),  # parts of the model that learn
            "steps": 100,
            "batch_size": 64,
            "accumulation": 1,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 10,
            "weight_decay": 0.01,
            "beta2": 0.99,
            "clip": 1.0,
            **changes,
        }
    )


def get_config() -> ConfigDict:
    """Returns the configuration of the base run."""
    return ConfigDict(
        {
            "seed": 0,
            "stages": ("warm_up", "stage1", "stage2"),
            "model": {
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_theta": 10000.0,
                "mrope_section": (4, 6, 6),
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                "remat_policy": "none",  # "none", "full", or a name in jax.checkpoint_policies
                "dtype": "float32",
                "vision": {
                    "depth": 2,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_heads": 4,
                    "window_size": 56,
                    "fullatt_block_indexes": (1,),
                    "image_mean": (0.75, 0.83, 0.9),
                    # The maps' deviation times the root of a patch's 588 inputs; see VisionConfig.patch_init_std.
                    "image_std": (4.0, 4.0, 4.0),
                    "patch_init_std": 1.0,
                },
            },
            "tokenizer": "",  # a folder; empty: made from the generator's text
            "data": {
                "source": "frozen_lake",  # or "ilvr", JSON lines at `path` with images under `root`
                "path": "",
                "root": "",  # empty: the folder of `path`
                "on_bad_record": "error",  # or "skip"
                "image_scale": 28 / 64,  # a cell of 64 pixels becomes one vision token
                "question": "",  # empty: the record's own
                "system": "",  # a system turn before the user's; empty: none
                "workers": 0,
                "buckets": {},
                "frozen_lake": {},
            },
            "latents": {
                "latent_size": 4,
                "coverage": 0.9,
                "candidates": 256,
                "temperature": 1.0,
                "grouping": "published",
                "tau": 0.999,
                "ce_weight": 1.0,
                "sim_weight": 1.0,
                "target_noise": 0.01,
            },
            "warm_up": stage(objective="text", helper_images="omit", train=("vision", "decoder"), steps=700),
            "stage1": stage(objective="alignment", steps=150, learning_rate=5e-4),
            "stage2": stage(objective="autonomy", steps=150, learning_rate=5e-4),
            "eval": {
                "data": "",
                "max_new_tokens": 128,
                "batch_size": 50,
                "temperature": 0.0,
            },
            "log_every": 10,
            "checkpoint_every": 200,
            "checkpoint_keep": 2,
        }
    )
