"""Markers: the places of images in texts, in the spellings of data sets."""

import re
from collections.abc import Sequence

from ilvr_jax.data.image_files import MOST_IMAGES
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, ImageSource, Record, Text
from ilvr_jax.errors import listed

OUTPUT_MARKER = "<output_image>"  # the place of a helper image in an answer of the mirage format

NUMBERED = {  # <image_1>, <image 1>, <image1>, <|image_1|>
    marker: re.compile(rf"<\|?{marker.strip('<>')}[ _-]?([0-9]{{1,4}})\|?>", re.IGNORECASE)
    for marker in (IMAGE_MARKER, OUTPUT_MARKER)
}
# Everything that looks like a marker, except special tokens, which raise an error where samples are made.
MARKER_LIKE = re.compile(
    r"<(?!\|(?:image_pad|vision_|video_pad|latent_))[/|]?(?:[a-z]{1,10}[ _-])?"
    r"(?:images?|img|pictures?|videos?|latents?|abs_vis|lvr)"
    r"(?:[ _-]?(?:start|end|pad|token|placeholder|here|[0-9]{1,4}))?[ ]?[/|]?>",
    re.IGNORECASE,
)


def place_images(
    text: str, images: Sequence[ImageSource], marker: str, where: str
) -> tuple[str, tuple[ImageSource, ...]]:
    """Return a text with `marker` in place of each numbered marker, and the images in the order of their markers.

    Numbers begin at 1, or at 0 if that is among them; an image is repeated with its marker. A text without numbered
    markers is returned unchanged, with its images. Raises BadRecord, beginning with `where`, if numbers and images do
    not pair up, or a text has markers with and without numbers.
    """
    markers = [match.group(0, 1) for match in NUMBERED[marker].finditer(text)]
    if not markers:
        return text, tuple(images)
    if marker in text:
        raise BadRecord(f"{where} must have {marker} or markers with numbers, got both ({markers[0][0]})")
    if len(markers) > MOST_IMAGES:
        raise BadRecord(f"{where} must mark at most {MOST_IMAGES} images, got {len(markers)}")
    numbers = [int(number) for _, number in markers]
    first = min(1, *numbers)
    if set(numbers) != set(range(first, first + len(images))):
        raise BadRecord(
            f"{where} must have a marker such as {markers[0][0]} for each of its {len(images)} images, got the numbers "
            f"{listed(map(str, sorted(set(numbers))))}"
        )
    return NUMBERED[marker].sub(marker, text), tuple(images[number - first] for number in numbers)


class UnreadMarkers:
    """Counts what looks like a marker in the texts of records but was not read as one."""

    def __init__(self):
        self._first: dict[str, tuple[str, int]] = {}  # by spelling: the first one, and the number of records

    def add(self, record: Record) -> None:
        """Add the markers that stay as text in a record."""
        answer = "".join(step.content for step in record.steps if isinstance(step, Text))
        in_question = (marker for marker in MARKER_LIKE.findall(record.question) if marker != IMAGE_MARKER)
        spellings: dict[str, str] = {}
        for marker in (*in_question, *MARKER_LIKE.findall(answer)):
            spellings.setdefault(re.sub("[0-9]+", "1", marker.lower()), marker)
        for spelling, marker in spellings.items():
            first, count = self._first.get(spelling, (f"{record.name} has {marker}", 0))
            self._first[spelling] = first, count + 1

    def remarks(self) -> list[str]:
        """Return a sentence for each spelling, naming the first record."""
        return [
            f"{first}, which stays as text, since it has no image (records with it: {count})"
            for first, count in self._first.values()
        ]
