"""The defaults, and the small run: FrozenLake maps from scratch on a laptop's CPU, all three stages."""

from ml_collections import ConfigDict

from ilvr_jax.models.lora import TARGETS
from ilvr_jax.training.configuration import VSP_MAPS


def stage(**changes) -> ConfigDict:
    """Returns the settings of one stage; `changes` go on top."""
    settings = ConfigDict(
        {
            "objective": "text",  # "text", "alignment" (stage 1) or "autonomy" (stage 2)
            "helper_images": "latent",  # slots with images for the teacher; "slots" alone, "encode" or "omit"
            "train": ("decoder",),  # parts of the model that learn
            "steps": 100,
            "epochs": 0,  # if more than 0: as many passes over the records, in place of steps
            "batch_size": 32,
            "accumulation": 1,
            "optimizer": "muon",  # or "adamw"
            "learning_rate": 1.5e-3,
            "schedule": "linear",  # the decay: "constant", "linear" or "cosine"
            "warmup_steps": 30,
            "weight_decay": 0.01,
            "beta2": 0.99,
            "clip": 1.0,
        }
    ).lock()  # a misspelt key on top of it is an error
    settings.update(changes)
    return settings


def bucket(prefix: int, segments: int = 0, tail: int = 0, windows: int = 4) -> ConfigDict:
    """Returns the columns of a batch of maps: up to 4 x 4 cells take 4 attention windows, up to 6 x 6 take 9."""
    return ConfigDict(
        {
            "prefix": prefix,
            "segments": segments,
            "text": 8 if segments else 0,  # two moves told with their cells, and the markers around them
            "tail": tail,
            "images": 1,
            "image_windows": windows,
            "helper_windows": windows if segments else 0,
        }
    )


def get_config() -> ConfigDict:
    """Returns the configuration of the base run."""
    buckets = ConfigDict(
        {
            "small_short": bucket(66),
            "small_long": bucket(100),
            "large_short": bucket(108, windows=9),
            "large_middle": bucket(126, windows=9),
            "large_long": bucket(148, windows=9),
            "small_looks": bucket(66, segments=2, tail=10),
            "large_looks": bucket(108, segments=2, tail=10, windows=9),
            "many_looks": bucket(108, segments=5, tail=16, windows=9),
        }
    )
    config = ConfigDict(
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
                "remat_policy": "dots_saveable",  # or "none", "full", and others of jax.checkpoint_policies
                "attention": "auto",  # the platform's kernel; or "xla", "splash" (TPU), "cudnn" (NVIDIA)
                "dtype": "float32",  # of activations, or "bfloat16"
                # A published checkpoint to start from, a hub name or a folder, or ADAPTER[@BASE] of PEFT: the
                # shape is then its own, and its keys must not be here. Empty: fresh parameters of the shape given here.
                "init_from": "",
                "slot_input": "hidden",  # what fills slots: "hidden" (the paper's), "projected" or "pause"
                "frozen_dtype": "float32",  # of the parts that no stage trains, or "bfloat16"
                "lora": {"rank": 0, "alpha": 64.0, "dropout": 0.0, "targets": TARGETS},  # rank 0: no adapters
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
            # How many devices each axis of the mesh has; -1, once: what the others leave. Rows of a batch are shared
            # out over slice, data and fsdp, parameters over fsdp and tensor.
            "mesh": {"slice": 1, "data": -1, "fsdp": 1, "tensor": 1},
            "tokenizer": "",  # a folder; empty: made from the generator's text
            "data": {
                "source": "frozen_lake",  # or a format of docs/formats.md, at `path` with images under `root`
                "path": "",
                "root": "",  # empty: the folder of `path`
                "follow_links": True,  # out of the data folder, where images and parquet files in it are links
                "records": 10_000_000,  # of the generated source
                "on_bad_record": "error",  # or "skip"
                "accept_change": False,  # true: a stage whose records have changed is resumed with a new epoch
                "image_scale": 28 / 64,  # of image files: a cell of 64 pixels becomes one vision token
                # Bounds on the pixels of an image, as in a checkpoint's preprocessor_config.json; 0: none.
                "min_pixels": 0,
                "max_pixels": 0,
                # A folder for the features of images, which are then computed once for the stages that leave the vision
                # tower as it is; empty: in every step.
                "feature_cache": "",
                "system": "",  # a system turn before the user's; empty: none
                "workers": 0,  # processes that make samples; 0: a thread
                # A sample goes to the first bucket that holds it; each is compiled once a stage.
                "buckets": buckets,
                "frozen_lake": {
                    "levels": (3, 4, 5, 6),
                    "hole_probability": 0.18,
                    "detour_share": 0.3,
                    "max_moves": 12,
                    "moves_per_look": 2,
                    "cell_pixels": 28,
                    "question": "Find the shortest safe path.",
                    "read_out": "distances",  # or "map", "none"
                    "cell_names": "row_column",
                    "exclude": (VSP_MAPS,),
                },
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
                "selection": "coverage",  # of targets: "coverage" (the paper's), "dense", "top_k" or "random"
            },
            # Helper images left out: the sequences are shorter, and the slots are quickly learnt afterwards.
            "warm_up": stage(objective="text", helper_images="omit", train=("vision", "decoder"), steps=950),
            "stage1": stage(objective="alignment", steps=300, learning_rate=7e-4),
            "stage2": stage(objective="autonomy", helper_images="slots", steps=100, learning_rate=3e-4),
            "eval": {
                # Records with map_desc, played after each stage; "auto": those maps if data.source is frozen_lake, no
                # evaluation for other data; empty: none.
                "data": "auto",
                "question": "Find the shortest safe path.",  # in place of every record's own; empty: its own
                "max_new_tokens": 128,  # latent slots and markers among them
                "batch_size": 50,
                "temperature": 0.0,  # 0 is greedy
                "top_k": 0,  # 0: all
                "top_p": 1.0,
                "early_end": False,  # lets the model end a latent segment early
            },
            "log_every": 10,
            "checkpoint_every": 200,
            "checkpoint_keep": 2,
            # So many updates in a row that are skipped, since loss or gradient are not finite, end the run.
            "max_skipped": 5,
        }
    )
    return config.lock()  # a misspelt key on top of it is an error
