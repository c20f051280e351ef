"""Damaged and strange input: a clean result or one sentence of bounded length."""

import copy
import functools
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ilvr_jax.data import images
from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.errors import SENTENCE_LENGTH

SEED = 0
RECORDS = 1000  # of each format

# What people, programs and damaged disks put in the place of a value.
STRANGE = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3.5,
        10**400,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        [],
        {},
        [[]],
        [None],
        [3],
        ["x"],
    ),
    *(
        "RAW",
        "RAW",
        {"path": "a.png"},
        "a.png",
        "b.png",
        "../a.png",
        "/etc/passwd",
        "~/a.png",
        ".",
        "..",
        "/",
        "a.png/",
        "A.PNG",
    ),
    *("\0", "a\0.png", "\ud800", "\udfff.png", "é" * 300, "x" * 5000, "a/" * 3000, "\u202e", "\ufeff", "\r\n", "\\"),
    *(
        "file:///etc/passwd",
        "http://x/y.png",
        "data:",
        "data:image/png;base64,",
        "data:image/png;base64,QUJD",
        "data:,x",
    ),
    *("data:image/png;base64,@@@@", "DATA:IMAGE/PNG;BASE64,QUJD", "fifo.png", "folder", "nothing.png", "link.png"),
    *("<image>", "<image>" * 40, "<image_1>", "<image 2>", "<IMAGE1>", "<image_0>", "<image_9999>", "<|image_1|>"),
    *("<output_image>", "<output_image_1>", "<|image_pad|>", "<|im_end|>", "<latent>", "<image_start>[x]<image_end>"),
    *("<image_start>[problem_image_1]<image_end>", "<image_start>[reasoning_image_1]<image_end>", "<image_start>"),
    *(
        [[1, 2]],
        [[1, 0], [2]],
        [[1, "2"]],
        [[True, 2]],
        ["a.png"] * 3,
        ["a.png", 7],
        {"type": "text"},
        {"type": "latent"},
    ),
]
# Put in place of "RAW": what JSON's grammar, or Python's reader alone, has beside values.
RAW = ["1e999", "-1e-999", "9" * 5000, "NaN", "-Infinity", "[" * 4000, "[" * 400 + "]" * 400, '{"a": 1, "a": 2}', "'x'"]
RAW += ["01", "+1", "\\u0041", '"\\ud83d"', '"\\uZZZZ"', "//", "{,}", '"\t"', '"x" "y"', "nul", ""]


def mutate_bytes(random: random.Random, content: bytes) -> bytes:
    """Return content with some bytes flipped, cut out, doubled, or put in."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(content) + 1)
        length = random.choice((1, 2, 8, 64))
        match random.randrange(6):
            case 0:
                content[place : place + 1] = random.randbytes(1)
            case 1:
                del content[place : place + length]
            case 2:
                content[place:place] = content[place : place + length]
            case 3:
                content[place:place] = random.randbytes(length)
            case 4:
                content[place:place] = random.choice(
                    (b"\0", b"\xff", b"\n", b"[", b"{", b'"', b",", b"}", b"\xef\xbb\xbf")
                )
            case 5:
                del content[place:]
    return bytes(content)


def mutate_value(random: random.Random, value: Any) -> Any:
    """Return a JSON value with some of the values in it exchanged, removed, wrapped or repeated."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 4))):
        places = list(_places(value))
        holder, key = random.choice(places) if places else ([value], 0)
        match random.randrange(6):
            case 0 | 1:
                holder[key] = random.choice(STRANGE)
            case 2:
                del holder[key]
            case 3:
                holder[key] = [holder[key]]
            case 4:
                other, place = random.choice(places) if places else (holder, key)
                holder[key] = copy.deepcopy(other[place])
            case 5:
                holder[key] = str(holder[key]) + str(random.choice(STRANGE))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items:
        yield value, key
        yield from _places(item)


def outcome(read: Callable[[], Any], error: type[Exception]) -> Any:
    """Return what `read` returns, or the error that it raises: one sentence of bounded length."""
    try:
        return read()
    except error as raised:
        assert type(raised) is error
        sentence = str(raised)
        assert 0 < len(sentence) <= SENTENCE_LENGTH and sentence.isprintable(), sentence
        return raised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (28, 28), "teal").save(folder / name)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder").mkdir()
    (folder / "link.png").symlink_to("nothing.png")
    return folder


def is_whole(record: Record) -> bool:
    """Return whether a record's values are what a Record's have to be."""
    images = [*record.images, *(step.helper_image for step in record.steps if isinstance(step, Look))]
    texts = [record.question, *(step.content for step in record.steps if isinstance(step, Text)), record.answer or ""]
    exist = all(isinstance(image, bytes) or image.is_file() for image in images)
    return exist and all(isinstance(text, str) and text.encode() is not None for text in texts)


def read_records(format: str, path: Path, for_evaluation: bool) -> list[Record]:
    find_format(path)
    source = FORMATS[format](path, None, for_evaluation=for_evaluation)
    records = [source[number] for number in range(len(source))]
    assert records and all(map(is_whole, records))
    return records


PLAN = [{"type": "text", "content": "x"}, {"type": "latent", "helper_image": "b.png"}, {"type": "text", "content": "y"}]
GOOD = {
    "ilvr": {"text_input": "Where?", "image_input": "a.png", "sequence_plan": PLAN, "original_final_answer": "R"},
    "mirage": {
        "text_input": "<image> or <image>?",
        "image_input": ["a.png", "b.png"],
        "image_output": "b.png",
        "text_output": "Look: <output_image>there.",
    },
    "vsp": {"text_input": "Where?", "image_input": ["a.png"], "map_desc": [[1, 0], [-1, 2]]},
}


def write_json(random: random.Random, path: Path, record: dict) -> None:
    """Write a mutated record, among good ones or alone, in lines or an array."""
    mutated = mutate_value(random, record) if random.random() < 0.6 else record
    records = random.choice(([mutated], [record, mutated], [mutated, record]))
    match random.randrange(3):
        case 0 | 1:
            text = "\n".join(map(json.dumps, records))
        case 2:
            text = json.dumps(records, indent=random.choice((None, 1)))
    content = text.replace('"RAW"', random.choice(RAW)).encode()
    path.write_bytes(content if mutated is not record else mutate_bytes(random, content))


@pytest.mark.parametrize("format", GOOD)
def test_json_records(folder, format):
    rng, counts = random.Random(f"{SEED} {format}"), {True: 0, False: 0}
    for number in range(RECORDS):
        write_json(rng, folder / "train.json", GOOD[format])
        read = functools.partial(read_records, format, folder / "train.json", number % 2 == 1)
        counts[isinstance(outcome(read, BadRecord), BadRecord)] += 1
    assert min(counts.values()) > RECORDS // 25, counts


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROW = {
    "Question": "Is <image_start>[problem_image_1]<image_end> a cat?",
    "Text Reasoning Trace": "see\n<image_start>[reasoning_image_1]<image_end>\nso",
    "Final Answer": "yes",
    "problem_image_1": {"bytes": b"a cat", "path": None},
    "reasoning_image_1": {"bytes": b"its ear", "path": "b.png"},
}
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
TYPES += [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary()), IMAGE, pa.list_(IMAGE), pa.null()]
TYPES += [pa.int64(), pa.float32(), pa.bool_(), pa.list_(pa.string()), pa.list_(pa.list_(pa.int8())), pa.date32()]
TYPES += [
    pa.decimal128(8, 2),
    pa.struct([("bytes", pa.string()), ("path", pa.string())]),
    pa.struct([("bytes", pa.binary())]),
]
TYPES += [pa.struct([("path", pa.string())]), pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.int8())])]
VALUES = [
    None,
    "",
    "x",
    "a.png",
    "../x",
    "/etc/passwd",
    b"",
    b"abc",
    b"\xff",
    7,
    2.5,
    float("nan"),
    True,
    [],
    ["x"],
    [[1]],
]
VALUES += [{"bytes": None, "path": None}, {"bytes": b"", "path": "a.png"}, {"bytes": None, "path": "fifo.png"}]
VALUES += [{"bytes": "/etc/passwd", "path": "a.png"}, {"path": "b.png"}, [{"bytes": b"abc", "path": None}]]
VALUES += [marker for marker in STRANGE if isinstance(marker, str) and "<" in marker]


def as_array(random: random.Random, values: list) -> pa.Array:
    """Return values as an array of a random type that takes them, or of some other one as nulls."""
    for kind in random.sample(TYPES, 8):
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return pa.nulls(len(values), random.choice(TYPES))


def write_parquet(random: random.Random, path: Path) -> None:
    """Write a parquet file with a mutated row or column, or mutated itself."""
    rows = [copy.deepcopy(ROW) for _ in range(random.choice((1, 2, 5)))]
    columns = {name: pa.array([row[name] for row in rows], IMAGE if "image" in name else pa.string()) for name in ROW}
    names, arrays = list(columns), list(columns.values())
    mutated = random.randrange(5)
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(names))
        match mutated:
            case 0:  # other values
                values = arrays[place].to_pylist()
                values[random.randrange(len(values))] = random.choice(VALUES)
                arrays[place] = as_array(random, values)
            case 1:  # another type
                arrays[place] = as_array(random, [random.choice((None, value)) for value in arrays[place].to_pylist()])
            case 2:  # columns that stand twice, or not at all, or are named otherwise
                match random.randrange(3):
                    case 0:
                        names.append(names[place])
                        arrays.append(arrays[random.randrange(len(arrays))])
                    case 1 if len(names) > 1:
                        del names[place], arrays[place]
                    case 2:
                        names[place] = random.choice(("problem_image_2", "reasoning_image_9", "x.path", "é\n", ""))
            case 3:  # rows that there are none of
                rows_left = random.randrange(len(rows))
                arrays = [array.slice(0, rows_left) for array in arrays]
    file = io.BytesIO()
    try:
        table = pa.Table.from_arrays(arrays, names)
        pq.write_table(
            table, file, row_group_size=random.choice((1, 2, 100)), compression=random.choice(("none", "snappy"))
        )
    except pa.ArrowException:  # Arrow does not write every type
        return write_parquet(random, path)
    content = file.getvalue()
    path.write_bytes(mutate_bytes(random, content) if mutated == 4 else content)


def test_parquet_rows(folder):
    rng, counts = random.Random(SEED), {True: 0, False: 0}
    for number in range(RECORDS):
        write_parquet(rng, folder / "train.parquet")
        read = functools.partial(read_records, "zebra_cot", folder / "train.parquet", number % 2 == 1)
        counts[isinstance(outcome(read, BadRecord), BadRecord)] += 1
    assert min(counts.values()) > RECORDS // 25, counts


def image_files() -> dict[str, bytes]:
    """Return image files of every format that is read, with EXIF data, palettes, transparency and several frames."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    palette, grey, exif = colours.quantize(16), colours.convert("L"), Image.Exif()
    transparent = colours.convert("RGBA")
    transparent.putalpha(grey)
    exif[0x0112], exif[0x010F] = 6, "a camera"
    made = [(colours, kind.lower(), {}) for kind in images.FORMATS]
    made += [(colours, kind, {"exif": exif}) for kind in ("png", "jpeg", "webp", "tiff", "avif")]
    made += [(colours, kind, {"save_all": True, "append_images": [colours]}) for kind in ("png", "gif", "tiff", "mpo")]
    made += [(palette, kind, {"transparency": 3}) for kind in ("png", "gif")] + [(palette, "bmp", {})]
    made += [(transparent, kind, {}) for kind in ("png", "webp", "bmp", "avif")]
    made += [(colours, "jpeg", {"progressive": True}), (colours.convert("CMYK"), "jpeg", {}), (grey, "ppm", {})]
    made += [(colours, "tiff", {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")]
    made += [(grey.convert("1"), "tiff", {"compression": "group4"}), (grey.convert("F"), "tiff", {})]
    files = {}
    for number, (image, kind, options) in enumerate(made):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[f"{number} {kind}"] = file.getvalue()
    return files


IMAGES = image_files()


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("name", IMAGES)
def test_images(name, capfd):
    generator = random.Random(name)
    for _ in range(8):
        head = generator.choice((60, 400, 10_000))  # headers are where most can go wrong
        other = generator.choice(list(IMAGES.values()))
        whole = IMAGES[name] if generator.random() < 0.8 else IMAGES[name][:head] + other[head // 2 :]
        content = mutate_bytes(generator, whole[:head]) + whole[head:]
        pixels = outcome(lambda content=content: images.load_image(content), BadRecord)
        if isinstance(pixels, BadRecord):
            assert str(pixels).startswith(f"an image of {len(content)} bytes: must ")
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert capfd.readouterr().err == ""  # decoders in C print there by themselves
