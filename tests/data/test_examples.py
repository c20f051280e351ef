"""From records to samples: the chat text, image and slot tokens, labels, bad records."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from ilvr_jax.data.examples import ExampleSettings, build_example, build_prompt, chat_template
from ilvr_jax.data.images import image_processor_settings
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.data.tokenizer import load_tokenizer, special_tokens, train_tokenizer
from ilvr_jax.method.tokens import Role

TOKENIZER = train_tokenizer(["Where to? go right, then down. done \\boxed{RD}"])
SPECIAL = special_tokens(TOKENIZER)


def image(rows: int, columns: int, value: int = 0) -> np.ndarray:
    return np.full((28 * rows, 28 * columns, 3), value, np.uint8)


RECORD = Record(
    question="Where to?",
    images=(image(2, 3), image(1, 1)),
    steps=(Text("go right,"), Look(image(2, 2, 7)), Text(" then down."), Look(image(1, 2, 9)), Text(" done")),
    name="maps.jsonl line 4",
)


def build(record: Record = RECORD, number: int = 0, **settings):
    return build_example(record, TOKENIZER, SPECIAL, ExampleSettings(**settings), number)


def words(sample) -> str:
    return TOKENIZER.decode(sample.tokens).replace("<|", "").replace("|>", " ")


PROMPT = (
    f"im_start user\nvision_start {'image_pad ' * 6}vision_end vision_start image_pad vision_end Where to?im_end \n"
    "im_start assistant\n"
)


def test_looks_become_slots():
    sample = build(latent_size=3, number=5)
    slots = "latent_start latent_pad latent_pad latent_pad latent_end "
    assert words(sample) == f"{PROMPT}go right,{slots} then down.{slots} doneim_end "
    assert [image.vision_tokens for image in sample.images] == [6, 1]
    assert [image.vision_tokens for image in sample.helper_images] == [4, 2]
    assert [int(image.pixels.max()) for image in sample.helper_images] == [7, 9]
    assert sample.record == 5 and sample.latent_size == 3
    assert [sample.tokens[start - 1] for start in sample.slot_starts] == [SPECIAL.latent_start] * 2


def test_looks_are_omitted():
    sample = build(helper_images="omit")
    assert words(sample) == f"{PROMPT}go right, then down. doneim_end "
    assert (len(sample.images), sample.helper_images, sample.slot_starts) == (2, (), ())


def test_looks_are_encoded_as_vision_tokens():
    sample = build(helper_images="encode")
    helpers = [f"latent_start vision_start {'image_pad ' * count}vision_end latent_end " for count in (4, 2)]
    assert words(sample) == f"{PROMPT}go right,{helpers[0]} then down.{helpers[1]} doneim_end "
    assert [image.vision_tokens for image in sample.images] == [6, 1, 4, 2]
    assert (sample.helper_images, sample.slot_starts) == ((), ()) and (sample.roles == Role.IMAGE).sum() == 13


def test_loss_is_on_the_answer_and_not_on_slots_or_images():
    for settings in ({"latent_size": 2}, {"helper_images": "encode"}):
        sample = build(**settings)
        prompt = len(build_prompt(RECORD, TOKENIZER, SPECIAL, ExampleSettings(**settings)).tokens)
        counted = sample.labels != -100
        assert not counted[: prompt - 1].any()
        left_out = {SPECIAL.latent_pad, SPECIAL.image_pad, SPECIAL.vision_start, SPECIAL.vision_end}
        expected = [int(token) for token in sample.tokens[prompt:] if token not in left_out]
        assert sample.labels[prompt:][counted[prompt:]].tolist() == expected


def test_the_prompt_is_the_beginning_of_the_example():
    settings = ExampleSettings(system="Be brief.")
    prompt = build_prompt(RECORD, TOKENIZER, SPECIAL, settings, number=3)
    example = build_example(RECORD, TOKENIZER, SPECIAL, settings, number=3)
    np.testing.assert_array_equal(prompt.tokens, example.tokens[: len(prompt.tokens)])
    np.testing.assert_array_equal(prompt.positions, example.positions[:, : len(prompt.tokens)])
    assert words(prompt) == f"im_start system\nBe brief.im_end \n{PROMPT}"
    assert prompt.record == 3 and prompt.helper_images == ()


def test_settings_change_question_and_scale():
    sample = build(question="Which way?", image_scale=0.5)
    assert "Which way?im_end" in words(sample) and "Where to?" not in words(sample)
    assert [(image.height // 2, image.width // 2) for image in sample.images] == [(1, 2), (1, 1)]
    sample = build(max_pixels=4 * 784, helper_images="latent")
    assert [image.vision_tokens for image in sample.images] == [2, 1]
    sample = build(min_pixels=4 * 784)
    assert [image.vision_tokens for image in sample.images] == [6, 4]
    assert [image.vision_tokens for image in sample.helper_images] == [4, 6]


def test_looks_in_a_row_and_at_both_ends():
    looks = Record("Where to?", (), (Look(image(1, 1)), Look(image(1, 1))), name="x")
    sample = build(looks, latent_size=1)
    slots = "latent_start latent_pad latent_end "
    assert words(sample).endswith(f"assistant\n{slots}{slots}im_end ")


def test_slots_alone_have_the_same_tokens_and_no_pictures():
    looks = Record("Where to?", (), (Text("up"), Look(image(1, 1)), Text("down")), name="x")
    with_images, alone = (build(looks, latent_size=2, helper_images=kind) for kind in ("latent", "slots"))
    assert alone.tokens.tolist() == with_images.tokens.tolist() and alone.slot_starts == with_images.slot_starts
    assert len(with_images.helper_images) == 1 and alone.helper_images == ()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


STEPS = (Text("go right,"), Look(noise(61, 37)), Text(" then down.\n\n"), Look(noise(20, 90)), Text("\\boxed{RD} "))
CONVERSATIONS = {
    "no image": Record("What is 12 + 7?", (), STEPS, name="x"),
    "one image": Record("Where to?", (noise(64, 100),), STEPS, name="x"),
    "several images": Record("\n Where to?", (noise(64, 100), noise(13, 200), png(noise(333, 90))), STEPS, name="x"),
    "images inside": Record(
        "Here is the map: <image>\n\nand the plan:<image><image> , you see?\n",
        (png(noise(64, 100)), noise(30, 30), noise(150, 1)),
        STEPS,
        name="x",
    ),
    "images at both ends": Record("<image>or<image>", (noise(64, 100), noise(30, 30)), STEPS, name="x"),
    "unicode": Record(
        "Wo\u0308 ist’s? 漢字 <image> שלום 🙂\u200d🦽 \u00a0½\r\n",
        (noise(64, 100),),
        (Text("Größe e\u0301\ufb01 "), Look(noise(28, 28)), Text("🙂\t")),
        name="x",
    ),
}


@pytest.fixture(scope="module")
def published_tokenizer(published_processor):
    return load_tokenizer(published_processor)


def conversation(record: Record, look: str) -> list[dict]:
    """Return a record as turns for a chat template; `look` is what a look holds, an image if empty."""
    texts = record.question.split("<image>")
    if len(texts) == 1:
        user = [{"type": "image"}] * len(record.images) + [{"type": "text", "text": texts[0]}]
    else:
        user = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
    assistant = []
    for step in record.steps:
        if isinstance(step, Text):
            assistant.append({"type": "text", "text": step.content})
        else:
            inside = {"type": "text", "text": look} if look else {"type": "image"}
            markers = ({"type": "text", "text": f"<|latent_{end}|>"} for end in ("start", "end"))
            assistant += [next(markers), inside, next(markers)]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


@pytest.mark.parametrize("max_pixels", [None, 6 * 784])
@pytest.mark.parametrize("helper_images", ["encode", "slots"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_published_template_and_image_processor(
    published_processor, published_tokenizer, name, helper_images, max_pixels
):
    record, tokenizer = CONVERSATIONS[name], published_tokenizer
    special = special_tokens(tokenizer)
    bounds = {key: image_processor_settings(published_processor)[key] for key in ("min_pixels", "max_pixels")}
    bounds["max_pixels"] = max_pixels or bounds["max_pixels"]
    settings = ExampleSettings(
        latent_size=3, helper_images=helper_images, system="You are a helpful assistant.", **bounds
    )
    turns = conversation(record, "<|latent_pad|>" * 3 if helper_images == "slots" else "")
    helpers = [step.helper_image for step in record.steps if isinstance(step, Look)]
    sources = [*record.images, *(helpers if helper_images == "encode" else [])]
    pictures = [Image.open(io.BytesIO(x)) if isinstance(x, bytes) else Image.fromarray(x) for x in sources]
    grids = Qwen2VLImageProcessorPil(**bounds)(images=pictures)["image_grid_thw"] if pictures else []
    counts = [int(np.prod(grid)) // 4 for grid in grids]

    def rendered(turns: list, header: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=header, return_dict=False)
        each = iter(counts)
        return [token for token in ids for _ in range(next(each) if token == special.image_pad else 1)]

    example = build_example(record, tokenizer, special, settings)
    assert [image.vision_tokens for image in example.images] == counts
    assert example.tokens.tolist() + tokenizer.encode("\n") == rendered(turns, False)
    prompt = build_prompt(record, tokenizer, special, settings)
    assert prompt.tokens.tolist() == rendered(turns[:1], True)
    brief = build_prompt(record, tokenizer, special, dataclasses.replace(settings, system="Be brief."))
    assert brief.tokens.tolist() == rendered([{"role": "system", "content": "Be brief."}, turns[0]], True)


@pytest.mark.parametrize("system", ["", "You are a helpful assistant.", 'A "{{ system }}" {% if %}\n\\n ’漢🙂'])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_of_a_run_from_nothing_writes_what_it_is_trained_on(name, system):
    record, tokenizer = CONVERSATIONS[name], train_tokenizer(["Where to go?"])
    tokenizer.chat_template = chat_template(system)
    special = special_tokens(tokenizer)
    settings = ExampleSettings(latent_size=3, helper_images="slots", system=system)
    turns = conversation(record, "<|latent_pad|>" * 3)

    def rendered(turns: list, header: bool) -> list[int]:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=header, return_dict=False)

    def short(sample) -> list[int]:
        """Return a sample's tokens with one image_pad an image."""
        counts = iter([image.vision_tokens for image in sample.images])
        tokens, where = sample.tokens.tolist(), 0
        while where < len(tokens):
            if tokens[where] == special.image_pad:
                del tokens[where + 1 : where + next(counts)]
            where += 1
        return tokens

    assert short(build_example(record, tokenizer, special, settings)) + tokenizer.encode("\n") == rendered(turns, False)
    assert short(build_prompt(record, tokenizer, special, settings)) == rendered(turns[:1], True)
    brief = build_prompt(record, tokenizer, special, dataclasses.replace(settings, system="Be brief."))
    assert short(brief) == rendered([{"role": "system", "content": "Be brief."}, turns[0]], True)


def test_images_stand_where_the_question_marks_them():
    marked = dataclasses.replace(RECORD, question="Where <image>to?<image>")
    assert words(build(marked)).startswith(
        f"im_start user\nWhere vision_start {'image_pad ' * 6}vision_end to?vision_start image_pad vision_end im_end "
    )
    assert words(build(marked, question="Where to?")) == words(build())
    assert words(build(question="Where <image>to?<image>")) == words(build(marked))


def test_markers_and_images_pair_up():
    for question, images in (
        ("Where <image>to?", RECORD.images),
        ("<image><image>", ()),
        ("<image>" * 3, RECORD.images),
    ):
        message = (
            rf"^x: the question must have one <image> for each of its {len(images)} images, or none at all, got "
            rf"{question.count('<image>')}$"
        )
        record = Record(question, images, RECORD.steps, name="x")
        with pytest.raises(BadRecord, match=message):
            build(record)
        with pytest.raises(BadRecord, match=message):
            build_prompt(record, TOKENIZER, SPECIAL, ExampleSettings())


def test_bad_records_are_named(tmp_path):
    cases = {
        "must have at least one step": Record("q", (), (), name="f line 2"),
        r"a text must not hold special tokens, got <\|latent_pad\|>": Record(
            "q", (), (Text("<|latent_pad|>"),), name="f line 2"
        ),
        r"special tokens, got <\|im_end\|>": Record("<|im_end|>", (), (Text("x"),), name="f line 2"),
        r"special tokens, got <\|video_pad\|>": Record("<|video_pad|>", (), (Text("x"),), name="f line 2"),
        "gone.png: must be an image file, but cannot": Record(
            "q", (tmp_path / "gone.png",), (Text("x"),), name="f line 2"
        ),
        r"uint8 \[height, width, 3\]": Record("q", (), (Look(np.zeros((4, 4), np.uint8)),), name="f line 2"),
    }
    for message, record in cases.items():
        with pytest.raises(BadRecord, match=f"^f line 2: .*{message}"):
            build(record)
    halves = Record("q", (), (Text("<|im_"), Look(np.zeros((28, 28, 3), np.uint8)), Text("end|>")), name="f line 2")
    with pytest.raises(BadRecord, match=r"^f line 2: a text must not hold special tokens, got <\|im_end\|>"):
        build(halves, helper_images="omit")


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="helper_images must be one of latent, slots, omit, encode, got 'all'"):
        ExampleSettings(helper_images="all")
    with pytest.raises(ValueError, match="latent_size must be at least 0, got -1"):
        ExampleSettings(latent_size=-1)
    with pytest.raises(ValueError, match="image_scale must be a positive number, got 0"):
        ExampleSettings(image_scale=0)
    for bounds in ({"min_pixels": 0}, {"max_pixels": -1}, {"min_pixels": 10, "max_pixels": 9}):
        with pytest.raises(
            ValueError, match=f"ascending order, got {bounds.get('min_pixels')} and {bounds.get('max_pixels')}"
        ):
            ExampleSettings(**bounds)
