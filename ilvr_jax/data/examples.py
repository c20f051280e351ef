"""Samples from records: the chat text, its tokens, patches and latent slots."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.features import FeatureStore
from ilvr_jax.data.images import load_image, patch_image
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, ImageSource, Record, Text
from ilvr_jax.data.tokenizer import SPECIAL_TOKENS
from ilvr_jax.method.layout import Sample, build_sample
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import PositionIds
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage, PatchedImage
from ilvr_jax.models.qwen2_5_vl.positions import mrope_positions

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # image_pad is repeated once per vision token
LATENT = "<|latent_start|><|latent_pad|><|latent_end|>"  # latent_pad is repeated once per slot
PICTURE = f"<|latent_start|>{IMAGE}<|latent_end|>"  # a look at a picture, in the form that the engine inserts
# Tokens of the chat's structure, which texts must not hold. Marks of grounding, such as <|box_start|>, may be in texts.
STRUCTURE = (*SPECIAL_TOKENS, "<|vision_pad|>", "<|video_pad|>")
HELPER_IMAGES = {"latent": LATENT, "slots": LATENT, "omit": "", "encode": PICTURE}


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
    """The settings of samples and prompts."""

    image_scale: float = 1.0
    question: str | None = None  # replaces every record's own
    latent_size: int = 8  # K, slots per look
    # The form of looks: "latent" slots with their images for the teacher, "slots" alone, vision tokens between the same
    # markers ("encode"), or nothing ("omit").
    helper_images: str = "latent"
    slot_positions: str = "text"  # as in the config's latents
    system: str = ""  # text of a system turn, none if empty
    # Bounds on the pixels of an image, as in a published preprocessor_config.json; None is no bound.
    min_pixels: int | None = None
    max_pixels: int | None = None
    position_ids: PositionIds = dataclasses.field(default=mrope_positions, repr=False)  # the backbone's
    features: FeatureStore | None = None  # computed features of images, in place of their pixels

    def __post_init__(self):
        if self.helper_images not in HELPER_IMAGES:
            raise ValueError(f"helper_images must be one of {', '.join(HELPER_IMAGES)}, got {self.helper_images!r}")
        if self.latent_size < 0:
            raise ValueError(f"latent_size must be at least 0, got {self.latent_size}")
        if self.image_scale <= 0:
            raise ValueError(f"image_scale must be a positive number, got {self.image_scale}")
        bounds = [bound for bound in (self.min_pixels, self.max_pixels) if bound is not None]
        if any(bound < 1 for bound in bounds) or bounds != sorted(bounds):
            raise ValueError(
                "min_pixels and max_pixels must be positive numbers in ascending order, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )


def build_example(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
    settings: ExampleSettings,
    number: int = 0,
) -> Sample:
    """Return the training sample of a record: prompt and answer.

    The chat text is that of Qwen2.5-VL's published template. Images are where the question has `<image>`, or all before
    it if it has none. Steps are joined without separators; the answer ends with `<|im_end|>`.

    Raises BadRecord if the record has no steps, its text holds a special token, its question has another number of
    `<image>` than there are images, or an image cannot be read.
    """
    if not record.steps:
        raise BadRecord(f"{record.name}: must have at least one step for training, got none")
    looks = [step.helper_image for step in record.steps if not isinstance(step, Text)]
    look = HELPER_IMAGES[settings.helper_images]
    texts = [step.content for step in record.steps if isinstance(step, Text)]
    for text in texts if look else ["".join(texts)]:  # joined texts may form a special token
        _plain(text, record)
    answer = "".join(step.content if isinstance(step, Text) else look for step in record.steps)
    return _build(
        record,
        _prompt(record, settings) + answer + "<|im_end|>",
        [*record.images, *(looks if settings.helper_images == "encode" else [])],
        looks if settings.helper_images == "latent" else [],
        tokenizer,
        special,
        settings,
        number,
    )


def build_prompt(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
    settings: ExampleSettings,
    number: int = 0,
) -> Sample:
    """Return a record's prompt, up to and including the assistant header, for decoding.

    Raises BadRecord as `build_example` does, except that a record needs no steps.
    """
    return _build(record, _prompt(record, settings), record.images, [], tokenizer, special, settings, number)


def _prompt(record: Record, settings: ExampleSettings) -> str:
    system = f"<|im_start|>system\n{settings.system}<|im_end|>\n" if settings.system else ""
    question = _plain(record.question if settings.question is None else settings.question, record)
    user = f"<|im_start|>user\n{_with_images(question, record)}<|im_end|>\n"
    return f"{system}{user}<|im_start|>assistant\n"


def chat_template(system: str) -> str:
    """Return the Jinja template for transformers that writes conversations as `build_example` does.

    Messages are texts, or parts of the types "text" and "image". `system` is the system turn of conversations without
    their own; if empty they have none.
    """
    parts = (
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% elif part['type'] == 'image' %}}{IMAGE}"
        "{% else %}{{ raise_exception('messages must hold parts of the types text and image alone') }}{% endif %}"
        "{% endfor %}"
    )
    content = f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}{parts}{{% endif %}}"
    turn = f"{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}{content}{{{{ '<|im_end|>\\n' }}}}"
    first = json.dumps(f"<|im_start|>system\n{system}<|im_end|>\n", ensure_ascii=False)  # a Jinja string as well
    opening = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {first} }}}}{{% endif %}}" if system else ""
    header = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    return f"{opening}{{% for message in messages %}}{turn}{{% endfor %}}{header}"


def _with_images(question: str, record: Record) -> str:
    markers = question.count(IMAGE_MARKER)
    if not markers:
        return IMAGE * len(record.images) + question
    if markers != len(record.images):
        raise BadRecord(
            f"{record.name}: the question must have one {IMAGE_MARKER} for each of its {len(record.images)} images, or "
            f"none at all, got {markers}"
        )
    return question.replace(IMAGE_MARKER, IMAGE)


def _plain(text: str, record: Record) -> str:
    """Return the text. Raises BadRecord if it holds a special token, which would be part of the chat's structure."""
    if "<|" in text:
        for token in STRUCTURE:
            if token in text:
                raise BadRecord(f"{record.name}: a text must not hold special tokens, got {token}")
    return text


def _build(
    record: Record,
    chat: str,
    sources: Sequence[ImageSource],
    helper_sources: Sequence[ImageSource],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
    settings: ExampleSettings,
    number: int,
) -> Sample:
    try:
        images = [read_image(source, settings) for source in sources]
        helper_images = [read_image(source, settings) for source in helper_sources]
    except BadRecord as error:
        raise BadRecord(f"{record.name}: {error}") from error
    # The Rust tokenizer directly: its wrapper takes several times as long for a text of this length.
    tokens = np.array(tokenizer.backend_tokenizer.encode(chat, add_special_tokens=False).ids, np.int32)
    tokens = _expand(tokens, images, special, settings.latent_size)
    size, position_ids = settings.latent_size, settings.position_ids
    return build_sample(tokens, images, helper_images, special, size, number, position_ids, settings.slot_positions)


def read_image(source: ImageSource, settings: ExampleSettings) -> PatchedImage | EncodedImage:
    """Return an image for the model: its features if the store of `settings` holds them, else patches.

    Raises BadRecord as `load_image` does.
    """
    encoded = settings.features.get(source) if settings.features else None
    if encoded is not None:
        return encoded
    return patch_image(load_image(source, settings.image_scale, settings.min_pixels, settings.max_pixels))


def _expand(
    tokens: Int[np.ndarray, " short"],
    images: Sequence[PatchedImage | EncodedImage],
    special: SpecialTokens,
    latent_size: int,
) -> Int[np.ndarray, " time"]:
    """Repeat each image_pad once per vision token and each latent_pad once per slot."""
    counts = np.ones(len(tokens), np.int64)
    counts[tokens == special.image_pad] = [image.vision_tokens for image in images]
    counts[tokens == special.latent_pad] = latent_size
    return np.repeat(tokens, counts)
