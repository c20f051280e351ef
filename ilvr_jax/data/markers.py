"""Markers: what stands in a text where an image belongs, in the spellings that data sets have."""

import re
from collections.abc import Sequence

from ilvr_jax.data.image_files import MOST_IMAGES
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, ImageSource, Record, Text
from ilvr_jax.errors import listed

OUTPUT_MARKER = "<output_image>"  # stands in an answer of the mirage format where a helper image belongs

NUMBERED = {  # <image_1>, <image 1>, <image1>, <|image_1|>
    marker: re.compile(rf"<\|?{marker.strip('<>')}[ _-]?([0-9]{{1,4}})\|?>", re.IGNORECASE)
    for marker in (IMAGE_MARKER, OUTPUT_MARKER)
}
# What looks like a marker. The special tokens that it resembles are refused where samples are made.
ANY = re.compile(
    r"<(?!\|(?:image_pad|vision_|video_pad|latent_))[/|]?(?:[a-z]{1,10}[ _-])?"
    r"(?:images?|img|pictures?|videos?|latents?|abs_vis|lvr)"
    r"(?:[ _-]?(?:start|end|pad|token|placeholder|here|[0-9]{1,4}))?[ ]?[/|]?>",
    re.IGNORECASE,
)


def place_images(
    text: str, images: Sequence[ImageSource], marker: str, where: str
) -> tuple[str, tuple[ImageSource, ...]]:
    """Returns a text with `marker` in place of each numbered marker, and the images in the order of their markers.

    Numbers begin at 1, or at 0 if that is among them; an image that is marked again comes again. A text without
    numbered markers and its images are returned as they are. Raises BadRecord, which begins with `where`, if numbers
    and images do not pair up, or a text has markers with numbers and without.
    """
    found = [match.group(0, 1) for match in NUMBERED[marker].finditer(text)]
    if not found:
        return text, tuple(images)
    if marker in text:
        raise BadRecord(f"{where} must have {marker} or markers with numbers, got both ({found[0][0]})")
    if len(found) > MOST_IMAGES:
        raise BadRecord(f"{where} must mark at most {MOST_IMAGES} images, got {len(found)}")
    numbers = [int(number) for _, number in found]
    first = min(1, *numbers)
    if set(numbers) != set(range(first, first + len(images))):
        raise BadRecord(
            f"{where} must have a marker such as {found[0][0]} for each of its {len(images)} images, got the numbers "
            f"{listed(map(str, sorted(set(numbers))))}"
        )
    return NUMBERED[marker].sub(marker, text), tuple(images[number - first] for number in numbers)


class UnreadMarkers:
    """What looks like markers in the texts of records, and was not read as such."""

    def __init__(self):
        self._found: dict[str, tuple[str, int]] = {}  # by spelling: the first, with its record, and how many records

    def add(self, record: Record) -> None:
        """Adds the markers that stay as text in a record."""
        answer = "".join(step.content for step in record.steps if isinstance(step, Text))
        markers = [found for found in ANY.findall(record.question) if found != IMAGE_MARKER] + ANY.findall(answer)
        spellings: dict[str, str] = {}
        for found in markers:
            spellings.setdefault(re.sub("[0-9]+", "1", found.lower()), found)
        for spelling, found in spellings.items():
            first, count = self._found.get(spelling, (f"{record.name} has {found}", 0))
            self._found[spelling] = first, count + 1

    def remarks(self) -> list[str]:
        """Returns a sentence for each spelling, with its first record."""
        return [
            f"{first}, which stays as text, since no image belongs there (records with it: {count})"
            for first, count in self._found.values()
        ]
