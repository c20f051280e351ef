"""Special tokens by name, and the role of each token of a sample in the method."""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int, Int8


class Role(enum.IntEnum):
    """The role of a token in the method. All but PADDING are attended to."""

    PADDING = 0
    PROMPT = 1  # prompt text, the chat header of the user's turn included
    IMAGE = 2  # a vision token
    MARKER = 3  # vision start and end, latent start, pad and end
    ANSWER = 4  # the assistant's text, its header included


class Visibility(enum.IntEnum):
    """The part of a token in `latents.image_visibility="until_look"`: AFTER tokens do not attend to BEFORE tokens."""

    OPEN = 0  # what precedes the first image, slots, and pictures in looks
    BEFORE = 1  # from the first image to the first `latent_start`: these have seen the image
    AFTER = 2  # text after it, the markers of looks included


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The ids of tokens with a meaning of their own, looked up in a tokenizer."""

    pad: int
    im_start: int
    im_end: int
    assistant: int
    vision_start: int
    vision_end: int
    image_pad: int
    latent_start: int
    latent_pad: int
    latent_end: int
    stop: tuple[int, ...] = ()  # tokens that end an answer, beside `<|im_end|>`

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.im_end, *self.stop

    @property
    def of_looks(self) -> tuple[int, ...]:
        """Tokens that a look is made of."""
        return self.latent_start, self.latent_pad, self.latent_end

    @property
    def markers(self) -> tuple[int, ...]:
        return self.vision_start, self.vision_end, *self.of_looks


def assistant_header(tokens: Int[np.ndarray, " time"], special: SpecialTokens) -> int:
    """Return where the assistant's turn begins: the index of its `<|im_start|>`.

    Raises ValueError if there is no assistant header, `<|im_start|>assistant`.
    """
    headers = np.flatnonzero((tokens[:-1] == special.im_start) & (tokens[1:] == special.assistant))
    if not len(headers):
        raise ValueError("the tokens must hold an assistant header (<|im_start|>assistant), got none")
    return int(headers[0])


def token_roles(tokens: Int[np.ndarray, " time"], special: SpecialTokens) -> Int8[np.ndarray, " time"]:
    """Return the role of each token; the assistant header itself counts as answer text."""
    roles = np.where(np.arange(len(tokens)) < assistant_header(tokens, special), Role.PROMPT, Role.ANSWER)
    roles[np.isin(tokens, special.markers)] = Role.MARKER
    roles[tokens == special.image_pad] = Role.IMAGE
    return roles.astype(np.int8)


def token_visibility(tokens: Int[np.ndarray, " time"], special: SpecialTokens) -> Int8[np.ndarray, " time"]:
    """Return the Visibility of each token; OPEN for all without an image before a look."""
    visibility = np.zeros(len(tokens), np.int8)
    images, looks = (np.flatnonzero(tokens == token) for token in (special.image_pad, special.latent_start))
    if len(images) and len(looks) and images[0] < looks[0]:
        visibility[images[0] : looks[0] + 1] = Visibility.BEFORE
        content = (special.latent_pad, special.image_pad, special.vision_start, special.vision_end)
        visibility[looks[0] + 1 :] = np.where(
            np.isin(tokens[looks[0] + 1 :], content), Visibility.OPEN, Visibility.AFTER
        )
    return visibility


def answer_labels(tokens: Int[np.ndarray, " time"], special: SpecialTokens) -> Int[np.ndarray, " time"]:
    """Return the labels of the method: the assistant's tokens after its header, -100 where there is no loss.

    `latent_start` and `latent_end` carry loss, `latent_pad` and vision tokens do not.
    """
    labels = tokens.astype(np.int32).copy()
    labels[: assistant_header(tokens, special) + 2] = -100
    visual = (special.latent_pad, special.image_pad, special.vision_start, special.vision_end)
    labels[np.isin(tokens, visual)] = -100
    return labels
