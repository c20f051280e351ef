"""The cases of benchmarks.latency, and the steps of their answers by each method."""

import dataclasses

from ilvr_jax.method.tokens import SpecialTokens

METHODS = ("latent", "pixels", "text", "single")
FIRST_WORD = 10  # smaller ids are special tokens
SPECIAL = SpecialTokens(*range(FIRST_WORD))
QUESTION = 32  # words of a prompt, besides its image
GRIDS = {64: (8, 8), 256: (16, 16), 512: (16, 32), 1024: (32, 32), 2048: (32, 64)}  # rows and columns


@dataclasses.dataclass(frozen=True)
class Case:
    """A measured setting."""

    name: str
    vision_tokens: int = 1024  # of the prompt's image and of each picture, one of GRIDS
    looks: int = 4
    slots: int = 8  # K
    batch: int = 1  # requests served at once
    text: int = 32  # tokens of each text, before, between and after the looks
    shared: bool = False  # whether all requests have the same prompt

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: image and question with their markers."""
        return self.vision_tokens + QUESTION + 6

    @property
    def shape(self) -> str:
        """Its sizes, in the order of SHAPE."""
        shared = ", one prompt" if self.shared else ""
        return f"{self.vision_tokens} / {self.looks} / {self.slots} / {self.text} / {self.batch}{shared}"


SHAPE = "vision tokens / looks / K / text / batch"
SMALL_GAIN = "long-text"
CASES = (
    Case("base"),
    *(Case(f"tokens-{count}", vision_tokens=count) for count in (256, 512, 2048)),
    *(Case(f"looks-{count}", looks=count) for count in (1, 8)),
    *(Case(f"slots-{count}", slots=count) for count in (4, 16)),
    Case(SMALL_GAIN, vision_tokens=64, looks=1, text=256),
    Case("shared-16", batch=16, shared=True),
    *(Case(f"batch-{count}", vision_tokens=256, batch=count) for count in (4, 16, 64)),
)
FOUR_METHODS = ("base", "tokens-256", "tokens-512", "tokens-2048")  # cases with all methods; others have two
QUICK = ("tokens-256", "looks-1", SMALL_GAIN)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The steps of an answer: the columns that each attends to, itself included, and those before each picture."""

    text: tuple[int, ...]
    slots: tuple[int, ...]
    pictures: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.text) + len(self.slots)


def forced_tokens(case: Case, method: str) -> tuple[int, ...]:
    """Return the tokens of an answer, -1 where the method decides."""
    text = (FIRST_WORD,) * case.text
    slots = (SPECIAL.latent_start, *(-1,) * (case.slots + 1))
    if method == "single":
        return slots + text * (case.looks + 1)
    look = {"latent": slots, "pixels": (SPECIAL.latent_start,), "text": ()}[method]
    return text + (look + text) * case.looks


def trace(case: Case, method: str) -> Trace:
    """Return the steps of an answer; its last token is written but not read."""
    length, text, slots, pictures = case.prompt, [], [], []
    for token in forced_tokens(case, method)[:-1]:
        if method == "pixels" and token == SPECIAL.latent_start:
            pictures.append(length)
            length += case.vision_tokens + 4
            continue
        length += 1
        (text if token == FIRST_WORD else slots).append(length)
    return Trace(tuple(text), tuple(slots), tuple(pictures))
