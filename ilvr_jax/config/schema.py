"""All keys of a config: their defaults, ranges and meanings.

Names of rules, objectives, formats and kernels, which forks may add, are checked where their tables are.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from ilvr_jax.config.fields import setting
from ilvr_jax.errors import quote

AUTO = "auto"  # of eval.data
DTYPES = ("float32", "bfloat16", "float16")
# The activations that the decoder's layers store for the gradient: all ("none"), nothing ("full"), or as in
# jax.checkpoint_policies.
REMAT_POLICIES = (
    "none",
    "full",
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
KERNELS = ("auto", "xla", "splash", "cudnn")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROPE_TYPES = ("default", "linear", "yarn")
# Mean and deviation of the pixels that Qwen2.5-VL's image processor assumes (CLIP's), in units of 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_VISIBILITY = ("all", "until_look")
SLOT_POSITIONS = ("text", "grid", "turning_grid")
MOST_NEW_TOKENS = 2**17  # of an answer; published models have positions up to 128,000
MOST_SAMPLES = 2**16  # of a prompt
LONGEST = 2**20  # tokens or columns of a batch's layout
Conflicts = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The shape and the layers of low-rank adapters (arXiv 2106.09685)."""

    rank: int = setting("0: no adapters", 0, least=0)
    alpha: float = setting("adapters are scaled by alpha / rank", 64.0, above=0)
    dropout: float = setting("share of an adapter's inputs that are dropped in training", 0.0, least=0, below=1)
    targets: tuple[str, ...] = setting("the adapted layers", LORA_TARGETS, choices=LORA_TARGETS, nonempty=True)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The scaling of the decoder's rotary positions beyond the length of pretraining.

    Names are those of a published `rope_scaling`; the ones after `factor` are YaRN's (arXiv 2309.00071).
    """

    rope_type: str = setting("frequencies: unchanged, all lower, or low ones lower", "default", choices=ROPE_TYPES)
    factor: float = setting("how many times longer texts may be", 1.0, above=0)
    original_max_position_embeddings: int = setting("the length of pretraining", 32768, above=0)
    beta_fast: float = setting("channels with more rotations in that length keep their frequency", 32.0, above=0)
    beta_slow: float = setting("channels with fewer rotations get it divided by factor", 1.0, above=0)
    truncate: bool = setting("the bounds between the two are rounded to channels", True)
    attention_factor: float | None = setting("factor of queries and keys; absent: 0.1 ln(factor) + 1", None, above=0)


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """The vision tower of a model with fresh parameters; names are those of a published `vision_config`."""

    depth: int = setting("number of layers", least=1)
    hidden_size: int = setting("channels", least=1)
    intermediate_size: int = setting("channels inside the MLP", least=1)
    num_heads: int = setting("attention heads", least=1)
    window_size: int = setting("pixels along a side of an attention window", least=1)
    fullatt_block_indexes: tuple[int, ...] = setting("layers that attend to the whole image", least=0)
    patch_size: int = setting("pixels along a side of a patch", 14, least=1)
    temporal_patch_size: int = setting("frames of a patch", 2, least=1)
    in_channels: int = setting("colours", 3, least=1)
    image_mean: tuple[float, ...] = setting("subtracted from pixels of 0 to 1, by colour", CLIP_MEAN)
    image_std: tuple[float, ...] = setting("pixels are divided by it, by colour", CLIP_STD, above=0)
    # Unit scale, with inputs scaled down by the root of their number (through image_std), suits Adam's steps.
    patch_init_std: float | None = setting(
        "deviation of fresh patch embedding weights; absent: 1/sqrt(inputs)", None, above=0
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The source and storage of a model's parameters, and, without `init_from`, its shape."""

    init_from: str = setting(
        "a published checkpoint (a hub name or a folder) or ADAPTER[@BASE] of PEFT; empty: fresh parameters", ""
    )
    backbone: str = setting(
        "the kind of a fresh model, of models/__init__.py; a checkpoint has its own", "qwen2_5_vl", added=True
    )
    dtype: str = setting("of activations", "float32", choices=DTYPES)
    frozen_dtype: str = setting("storage of the parts that no stage trains", "float32", choices=DTYPES)
    remat_policy: str = setting("what layers store for the gradient", "dots_saveable", choices=REMAT_POLICIES)
    attention: str = setting("the attention kernel; auto: the platform's", "auto", choices=KERNELS)
    slot_input: str = setting("the rule that fills slots, of method/slots.py", "hidden", added=True)
    lora: LoraConfig = setting("adapters", LoraConfig(), partial=True)
    hidden_size: int | None = setting("channels", None, least=1)
    intermediate_size: int | None = setting("channels inside the MLP", None, least=1)
    num_hidden_layers: int | None = setting("number of layers", None, least=1)
    num_attention_heads: int | None = setting("attention heads", None, least=1)
    num_key_value_heads: int | None = setting("heads of keys and values", None, least=1)
    rope_theta: float | None = setting("base of the rotary frequencies", None, above=1)
    mrope_section: tuple[int, ...] | None = setting("pairs of channels for time, height and width", None, least=0)
    rms_norm_eps: float | None = setting("of norms; absent: 1e-6", None, above=0)
    tie_word_embeddings: bool | None = setting("the head is the embedding; absent: false", None)
    rope_scaling: RopeScaling | None = setting("longer texts; absent: as pretrained", None, partial=True)
    vision: VisionSettings | None = setting("the vision tower", None, partial=True)

    def shape(self) -> dict[str, object]:
        """Return the given keys of the model's shape."""
        names = [field.name for field in dataclasses.fields(self)]
        own = names[names.index("hidden_size") :]
        return {name: getattr(self, name) for name in own if getattr(self, name) is not None}

    def conflicts(self) -> Conflicts:
        if self.init_from:
            yield from ((name, "absent with model.init_from, whose checkpoint has its own") for name in self.shape())
            return
        required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*required, "num_key_value_heads", "rope_theta", "mrope_section", "vision"):
            if getattr(self, name) is None:
                yield name, "given without model.init_from"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis of the mesh; one axis may be -1, for all that is left.

    The rows of a batch are sharded over slice, data and fsdp, parameters over fsdp and tensor.
    """

    slice: int = setting("slices of a pod, joined by the slower network", 1, least=-1)
    data: int = setting("copies of the parameters per slice", -1, least=-1)
    fsdp: int = setting("shards of the parameters", 1, least=-1)
    tensor: int = setting("shards of heads and MLP channels", 1, least=-1)

    def conflicts(self) -> Conflicts:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == 0:
                yield field.name, "at least 1, or -1 for the rest"
        free = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) == -1]
        yield from ((name, f"at least 1, since {free[0]} is -1") for name in free[1:])


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """The sizes of a static batch shape; a sample goes to the cheapest bucket that holds it."""

    prefix: int = setting("columns of the prompt and the first text", least=0, most=LONGEST)
    segments: int = setting("looks", 0, least=0, most=LONGEST)
    text: int = setting("columns of the text after each look", 0, least=0, most=LONGEST)
    tail: int = setting("further columns for the last text", 0, least=0, most=LONGEST)
    images: int = setting("user images per sample", 1, least=0, most=LONGEST)
    image_tokens: int = setting("vision tokens per user image, in whole windows", 1, least=0, most=LONGEST)
    helper_tokens: int = setting("vision tokens per helper image", 1, least=0, most=LONGEST)


@dataclasses.dataclass(frozen=True)
class FrozenLakeConfig:
    """The generated maps and the texts about them."""

    levels: tuple[int, ...] = setting(
        "sides of a map, equally likely; a repeated level is drawn more often",
        (3, 4, 5, 6),
        least=3,
        most=10,
        nonempty=True,
    )
    # Before unsolvable maps are dropped. The real maps look like 0.2; maps with a detour have more holes, and with them
    # 0.18 gives the real average of 0.14 to 0.18 of all cells.
    hole_probability: float = setting("of each cell except start and goal", 0.18, least=0, most=0.9)
    detour_share: float = setting("share of maps that need a detour around holes", 0.3, least=0, most=1)
    detour_moves: int = setting(
        "the least moves of a detour, added to those on the map without holes", 1, least=1, added=True
    )
    max_moves: int = setting("maps that need more moves are dropped", 12, least=1)
    looks: str = setting(
        "what looks show: the map between moves; or, before all moves, distances to the goal in sweeps over the map, "
        "and then the best move from every cell",
        "moves",
        choices=("moves", "distances"),
        added=True,
    )
    moves_per_look: int = setting("moves between two looks at moves", 2, least=1)
    sweeps: int = setting("looks at distances", 2, least=1, added=True)
    sketches: str = setting(
        "looks at distances: all, the last alone, or those of an unrelated map",
        "all",
        choices=("all", "last", "unrelated"),
        added=True,
    )
    readings: float = setting(
        "share of records without looks, which ask for the map in words", 0.0, least=0, most=1, added=True
    )
    cell_pixels: int = setting("pixels along a side of a cell; 28 are one vision token", 28, least=1)
    question: str = setting("the question of every record", "Find the shortest safe path.")
    read_out: str = setting(
        "the beginning of answers, cell by cell: moves to the goal, the cell's content, what looks at distances show, "
        "or nothing",
        "distances",
        choices=("distances", "map", "sketches", "none"),
    )
    cell_names: str = setting(
        "row_column: each move is written with its starting cell", "row_column", choices=("row_column", "none")
    )
    name_goal: bool = setting("the moves are followed by the word goal, written like a move", False, added=True)
    exclude: tuple[str, ...] = setting(
        "JSON-lines files with a map_desc per line: maps that are never drawn, nor rotated or mirrored",
        (),
    )

    def conflicts(self) -> Conflicts:
        if self.looks == "distances" and self.cell_pixels % 2:
            yield "cell_pixels", "even with looks at distances, whose cells are four squares"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The records of a run and the making of batches."""

    source: str = setting("frozen_lake, or a format of docs/formats.md", "frozen_lake")
    path: str = setting("the data file, of a format", "", resumable=True)  # the records' fingerprint is compared
    root: str = setting("the folder of images; empty: that of path", "", resumable=True)
    follow_links: bool = setting(
        "images and parquet files may be links to outside of the data folder", True, resumable=True, added=True
    )
    records: int = setting("number of generated records", 10_000_000, least=1)
    on_bad_record: str = setting("end the run, or skip the record", "error", choices=("error", "skip"))
    accept_change: bool = setting(
        "resume a stage with a new epoch if its records have changed", False, resumable=True, added=True
    )
    image_scale: float = setting("factor of the sides of image files", 1.0, above=0)
    min_pixels: int = setting("smaller images are enlarged; 0: no bound", 0, least=0)
    max_pixels: int = setting("larger images are shrunk; 0: no bound", 0, least=0)
    feature_cache: str = setting(
        "folder for features of images, computed once if no stage trains the tower; empty: computed in every step",
        "",
        resumable=True,
    )
    system: str = setting("a system turn before the user's; empty: none", "")
    workers: int = setting("processes that make samples; 0: a thread instead", 0, least=0, resumable=True)
    buckets: Mapping[str, BucketConfig] = setting("the batch shapes, by name", {}, nonempty=True, partial=True)
    frozen_lake: FrozenLakeConfig = setting("the generated maps", FrozenLakeConfig(), partial=True)

    def conflicts(self) -> Conflicts:
        if self.source == "frozen_lake" and self.feature_cache:
            yield "feature_cache", "empty with data.source frozen_lake, whose images are always new"
        if self.min_pixels and 0 < self.max_pixels < self.min_pixels:
            yield "max_pixels", f"0 or at least min_pixels ({self.min_pixels})"


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """The settings of the method; the defaults are the published ones."""

    latent_size: int = setting("K, slots per look; 0: markers alone", 8, least=0, most=LONGEST)
    coverage: float = setting("p, the mass of the softmax that the targets cover", 0.9, above=0, most=1)
    candidates: int = setting("L, the most features after grouping", 256, least=1)
    temperature: float = setting("of the softmax over candidates", 1.0, above=0)
    grouping: str = setting(
        "published drops features that do not divide evenly, complete uses all",
        "published",
        choices=("published", "complete"),
    )
    tau: float = setting("the teacher's momentum; 1.0 freezes it", 0.999, least=0, most=1)
    ce_weight: float = setting("weight of the cross-entropy", 1.0, least=0)
    sim_weight: float = setting("weight of the distance to targets", 1.0, least=0)
    contrast_weight: float = setting(
        "weight of telling a slot's target from the other targets of its answer", 0.0, least=0, added=True
    )
    contrast_temperature: float = setting("of the softmax over these", 0.1, above=0, added=True)
    target_noise: float = setting("deviation of the noise added to targets", 0.01, least=0)
    own_share: float = setting(
        "share of records whose slots the model fills with the objective guided; those of others hold targets",
        1.0,
        least=0,
        most=1,
        added=True,
    )
    image_visibility: str = setting(
        "text after the first look attends to the image, or not to it nor to what has seen it, except slots",
        "all",
        choices=IMAGE_VISIBILITY,
        added=True,
    )
    slot_positions: str = setting(
        "rotary positions of slots: those of text, or of a square image, or of one turned by half a turn in every "
        "second look",
        "text",
        choices=SLOT_POSITIONS,
        added=True,
    )
    selection: str = setting("the rule that selects targets, of method/selection.py", "coverage", added=True)

    def conflicts(self) -> Conflicts:
        if self.slot_positions != "text" and math.isqrt(self.latent_size) ** 2 != self.latent_size:
            yield "latent_size", f"a square number with slot_positions {self.slot_positions}"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    objective: str = setting("the loss, of method/objectives.py: text, alignment, guided or autonomy")
    helper_images: str = setting("the form of helper images in samples: latent, slots, encode or omit", "latent")
    train: tuple[str, ...] = setting(
        "the trained parts", ("decoder",), choices=("vision", "decoder", "adapters"), nonempty=True
    )
    steps: int = setting("optimizer steps", 100, least=1)
    epochs: int = setting("passes over the records, in place of steps; 0: steps count", 0, least=0)
    batch_size: int = setting("samples per step", 32, least=1)
    accumulation: int = setting("parts of a batch, processed one after another", 1, least=1)
    optimizer: str = setting("muon or adamw", "muon", choices=("adamw", "muon"))
    learning_rate: float = setting("the peak", 1.5e-3, above=0)
    schedule: str = setting("the decay", "linear", choices=("constant", "linear", "cosine"))
    warmup_steps: int = setting("steps of linear rise to the peak", 30, least=0)
    weight_decay: float = setting("of matrices", 0.01, least=0)
    beta2: float = setting("Adam's second momentum", 0.99, above=0, below=1)
    clip: float = setting("the largest norm of a gradient", 1.0, above=0)

    def conflicts(self) -> Conflicts:
        if self.batch_size % self.accumulation:
            yield "accumulation", f"a divisor of batch_size ({self.batch_size})"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The sampling of tokens, in requests and in the `eval` section of a run."""

    max_new_tokens: int = setting("slots and markers included", 1024, least=1, most=MOST_NEW_TOKENS, resumable=True)
    temperature: float = setting("0 is greedy", 0.0, least=0, most=1e6, resumable=True)
    top_k: int = setting("the most tokens to sample from; 0: all", 0, least=0, resumable=True)
    top_p: float = setting(
        "sample from the most likely tokens with this total probability", 1.0, above=0, most=1, resumable=True
    )
    early_end: bool = setting("the model may end a look early", False, resumable=True)
    min_new_tokens: int = setting(
        "tokens before which an answer does not end", 0, least=0, most=MOST_NEW_TOKENS, resumable=True, added=True
    )
    repetition_penalty: float = setting(
        "divides the logits of tokens in the prompt or answer, as in transformers; 1: none",
        1.0,
        least=0.01,
        most=100,
        resumable=True,
        added=True,
    )
    stop: tuple[str, ...] = setting("an answer ends before the first of these strings", (), resumable=True, added=True)
    n: int = setting("answers to each prompt", 1, least=1, most=MOST_SAMPLES, resumable=True, added=True)

    def conflicts(self) -> Conflicts:
        # The limits keep scaled logits and the thresholds of cumulative probabilities inside float32.
        if 0 < self.temperature < 1e-6:
            yield "temperature", "0 or a number from 1e-6 to 1e6"
        if self.top_p < 2e-38:
            yield "top_p", "above 2e-38"
        if self.min_new_tokens > self.max_new_tokens:
            yield "min_new_tokens", f"at most max_new_tokens ({self.max_new_tokens})"
        if "" in self.stop:
            yield "stop", "non-empty strings"
        if self.n > 1 and not self.temperature:
            yield "n", "1 with temperature 0, at which all answers are equal"


@dataclasses.dataclass(frozen=True)
class EvalConfig(SamplingParams):
    """The evaluation after each stage, and inside it."""

    task: str = setting(
        "the reading and scoring of answers, of tasks/__init__.py", "vsp_planning", resumable=True, added=True
    )
    data: str = setting(
        "records in a format of the task; auto: the 200 real maps if data.source is frozen_lake; else, or empty: none",
        AUTO,
        resumable=True,
    )
    # Not resumable: a stage trains on the rest.
    fraction: float = setting(
        "share of the training records that is held out, and evaluated on in place of eval.data",
        0.0,
        least=0,
        below=1,
        added=True,
    )
    limit: int = setting("the most records; 0: all", 0, least=0, resumable=True, added=True)
    every: int = setting(
        "steps between two evaluations inside a stage; 0: only after it", 0, least=0, resumable=True, added=True
    )
    question: str = setting(
        "replaces the records' own; empty: their own", "Find the shortest safe path.", resumable=True
    )
    max_new_tokens: int = setting("slots and markers included", 128, least=1, most=MOST_NEW_TOKENS, resumable=True)
    batch_size: int = setting("answers decoded in parallel", 50, least=1, resumable=True)

    def conflicts(self) -> Conflicts:
        yield from super().conflicts()
        if self.fraction and self.data not in ("", AUTO):
            yield "fraction", f"0 with eval.data {quote(self.data)}, which is evaluated on alone"

    @property
    def sampling(self) -> SamplingParams:
        """The parameters of one answer."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingParams)}
        return SamplingParams(**values | {"n": 1})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The configuration of a run. In files each stage is a section of its own name, and `stages` is their order."""

    stages: Mapping[str, StageConfig] = setting("the stages to run, in order", nonempty=True)
    seed: int = setting("of parameters, records and sampling", 0, least=0)
    model: ModelSettings = setting("the model", ModelSettings())
    mesh: MeshConfig = setting("the devices", MeshConfig(), resumable=True)
    tokenizer: str = setting("a folder; empty: made from the records' texts", "")
    data: DataConfig = setting("the records", DataConfig())
    latents: LatentsConfig = setting("the method", LatentsConfig())
    eval: EvalConfig = setting("the evaluation after each stage", EvalConfig())
    log_every: int = setting("steps between two log lines", 10, least=1, resumable=True)
    checkpoint_every: int = setting("steps between two checkpoints", 200, least=1, resumable=True)
    checkpoint_keep: int = setting("checkpoints that are kept per stage", 2, least=1, resumable=True)
    max_skipped: int = setting(
        "consecutive updates that may be skipped, for a loss or gradient that is not finite, before the run ends",
        5,
        least=1,
        resumable=True,
    )

    @property
    def decoder_part(self) -> str:
        """The part of the parameters that learns to decode: the decoder, or with LoRA its adapters."""
        return "adapters" if self.model.lora.rank else "decoder"
