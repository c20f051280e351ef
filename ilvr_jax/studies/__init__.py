"""Studies: variants of one config, trained with several seeds and compared with the first of them, the base.

`python -m ilvr_jax.study NAME` runs an entry of STUDIES. To add one, write another entry.
"""

import dataclasses
from collections.abc import Mapping

from ilvr_jax.config.experiments import VSP_MAPS


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a study's config.

    Attributes:
        meaning: one sentence about it, for the page.
        variant: the config file's own variant, as in `configs/base.py:pause`; empty for none.
        changes: flags of the config by key, without `--config.`.
        method: how the trained model looks when it is evaluated, as `--method` of `python -m ilvr_jax.evaluate`.
        slots: interventions with which it is evaluated as well, as `--slots` of `python -m ilvr_jax.evaluate`.
    """

    meaning: str
    variant: str = ""
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: str = "latent"
    slots: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants of a config that are compared with the first one.

    Attributes:
        config: the config file.
        variants: by name; the first is the base.
        minutes: of a run on two cores, for the estimate before one is finished.
        quick: changes of a quick study, as those of variants; `*` in a key is replaced by the name of each stage.
        leads: variants whose difference from the base is compared with that of the intervention `swap`.
        more_data: further files of records that every run is evaluated on, by the name of their table.
    """

    config: str
    variants: Mapping[str, Variant]
    minutes: float
    quick: Mapping[str, str]
    leads: tuple[str, ...] = ()
    more_data: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name of the variant that the others are compared with."""
        return next(iter(self.variants))


STUDIES = {
    "slots": Study(
        config="configs/detours.py",
        variants={
            "own": Variant(
                "The run itself: three looks of 36 slots, which the model fills.",
                slots=("swap", "noise", "zero", "pause"),
            ),
            "text": Variant("No looks: the answer is the moves in words.", variant="text"),
            "text_tokens": Variant(
                "No looks: the sketches are written in words before the moves.", variant="text_tokens"
            ),
            "markers": Variant("Looks without slots: their markers alone.", variant="markers"),
            "pause": Variant(
                "Looks of the same length without content, whose slots are learned constants.", variant="pause"
            ),
            "unrelated_targets": Variant(
                "Looks whose targets are the sketches of another map, with the image in sight.",
                variant="unrelated_targets",
            ),
            "single": Variant("One look, at the last sketch alone.", variant="single"),
            "stage1": Variant(
                "Alignment alone, without slots that the model filled itself in training.", variant="stage1"
            ),
            "stage2": Variant(
                "Autonomy right after alignment, as published, without the stage `guided`.", variant="stage2"
            ),
            "pixels": Variant("Looks at the true sketches, drawn as pictures.", variant="pixels", method="pixels"),
        },
        minutes=20,
        quick={"*.steps": "10", "eval.limit": "20"},
        leads=("text", "pause", "single"),
        more_data={"real": VSP_MAPS},
    ),
}
