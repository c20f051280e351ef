"""From records to samples: the chat text, image and slot tokens, labels, bad records."""

import numpy as np
import pytest

from ilvr_jax.data.examples import ExampleSettings, build_example, build_prompt
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.data.tokenizer import load_tokenizer, special_tokens, train_tokenizer
from ilvr_jax.latents.tokens import Role

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
    helpers = ["vision_start " + "image_pad " * count + "vision_end " for count in (4, 2)]
    assert words(sample) == f"{PROMPT}go right,{helpers[0]} then down.{helpers[1]} doneim_end "
    assert [image.vision_tokens for image in sample.images] == [6, 1, 4, 2]
    assert sample.helper_images == () and (sample.roles == Role.IMAGE).sum() == 13


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


def test_the_chat_text_equals_the_published_template(published_processor):
    tokenizer = load_tokenizer(published_processor)
    special = special_tokens(tokenizer)
    settings = ExampleSettings(helper_images="encode", system="You are a helpful assistant.")
    user = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Where to?"}]
    answer = ["go right,", None, " then down.", None, " done"]
    assistant = [{"type": "text", "text": text} if text else {"type": "image"} for text in answer]
    conversation = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    template = (published_processor / "chat_template.jinja").read_text()

    def rendered(turns: list, header: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=header, return_dict=False
        )
        counts = iter([6, 1, 4, 2])
        return [token for token in ids for _ in range(next(counts) if token == special.image_pad else 1)]

    prompt = build_prompt(RECORD, tokenizer, special, settings)
    assert prompt.tokens.tolist() == rendered(conversation[:1], True)
    example = build_example(RECORD, tokenizer, special, settings)
    line_break = tokenizer.encode("\n")
    assert example.tokens.tolist() + line_break == rendered(conversation, False)


def test_bad_records_are_named(tmp_path):
    cases = {
        "has zero steps": Record("q", (), (), name="f line 2"),
        r"a text holds <\|latent_pad\|>, a special token": Record("q", (), (Text("<|latent_pad|>"),), name="f line 2"),
        r"a text holds <\|im_end\|>": Record("<|im_end|>", (), (Text("x"),), name="f line 2"),
        "gone.png: there is no such file": Record("q", (tmp_path / "gone.png",), (Text("x"),), name="f line 2"),
        r"uint8 \[height, width, 3\]": Record("q", (), (Look(np.zeros((4, 4), np.uint8)),), name="f line 2"),
    }
    for message, record in cases.items():
        with pytest.raises(BadRecord, match=f"^f line 2: .*{message}"):
            build(record)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match='helper_images is "all"; latent, slots, omit, encode are accepted'):
        ExampleSettings(helper_images="all")
    with pytest.raises(ValueError, match="latent_size is 0"):
        ExampleSettings(latent_size=0)
