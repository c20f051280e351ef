"""python -m ilvr_jax.generate: its output for runs, published checkpoints and bad input."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import transformers
from PIL import Image

from ilvr_jax import convert
from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.config.experiments import parse
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.generate import main
from tests.paths import REPOSITORY
from tests.published import save_published
from tests.samples import tiny_config, untrained_run

MAP = ((1, 0, 2), (0, -1, 0), (0, 0, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("generate") / "run")


@pytest.fixture(scope="module")
def picture(run):
    Image.fromarray(draw_map(MAP)).save(run.parent / "map.png")
    return run.parent / "map.png"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder, dtype="float32", texts=["What is this?"])
    return folder


def printed(capsys, *flags) -> str:
    assert main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


def test_looks_are_printed_while_they_happen_and_json_holds_the_same_answer(run, picture, capsys):
    out = printed(capsys, run, f"--image={picture}")
    text, counts, last_line = out.rstrip("\n").rsplit("\n", 2)[-3:]
    answer = json.loads(printed(capsys, run, f"--image={picture}", "--json"))
    assert answer["looks"] and out.startswith(answer["text"].partition("‹")[0])
    whole = [look for look in answer["looks"] if look["slots"] == 4]
    assert out.count("‹looking: 4 slots›") == len(whole) or answer["stop_reason"] == "length"
    assert re.match(rf"{len(answer['tokens'])} tokens, {len(answer['looks'])} looks? with", counts)
    assert last_line == "answer: none found" and answer["answer"] is None
    assert set(answer) == {"answer", "tokens", "text", "looks", "stop_reason", "timings"}


def test_what_slots_held_and_log_probabilities_are_given_on_request(run, picture, tmp_path, capsys):
    file = tmp_path / "latents.npy"
    flags = (run, f"--image={picture}", "--json", "--log-probabilities", f"--latents={file}")
    answer = json.loads(printed(capsys, *flags))
    assert len(answer["log_probabilities"]) == len(answer["tokens"]) and max(answer["log_probabilities"]) <= 0
    latents = np.load(file)
    assert latents.shape == (sum(look["slots"] for look in answer["looks"]), 32) and latents.dtype == np.float32
    other = tmp_path / "none" / "latents.npy"
    printed(capsys, *flags[:-1], f"--latents={other}")
    np.testing.assert_array_equal(np.load(other), latents)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["latents.npy", "latents.npy", "none"]


def test_methods_and_sampling_are_chosen_by_flags(run, picture, capsys):
    def answer(*flags):
        return json.loads(printed(capsys, run, f"--image={picture}", "--json", *flags))

    assert not answer("--method=text")["looks"]
    assert [look["position"] for look in answer("--method=single", "--latent-size=2")["looks"]] == [0]
    assert len(answer("--max-new-tokens=3")["tokens"]) <= 3
    drawn = [answer("--temperature=1.5", f"--seed={seed}")["tokens"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_published_checkpoint_without_latent_tokens_answers_in_plain_text_with_a_warning(published, picture, capsys):
    flags = [str(published), "What is this?", f"--image={picture}", "--max-new-tokens=6", "--json"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert err == f"{published} has no latent tokens; it is decoded as plain text\n"
    answer = json.loads(out)
    assert not answer["looks"] and 1 <= len(answer["tokens"]) <= 6


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image=missing.png"], "missing.png: must be an image file, but cannot be read: No such file or directory"),
        (["--max-new-tokens=0"], "--max-new-tokens must be from 1 to 131072, got 0"),
        (["--max-new-tokens=99999999999"], "--max-new-tokens must be from -2147483647 to 2147483647, got 99999999999"),
        (["--latent-size=-1"], "--latent-size must be a whole number from 0 to 2147483647, got -1"),
        (["--latent-size=2147483648"], "--latent-size must be a whole number from 0 to 2147483647, got 2147483648"),
        (["--top-k=-1"], "--top-k must be at least 0, got -1"),
        (["--top-k=2147483648"], "--top-k must be from -2147483647 to 2147483647, got 2147483648"),
        (["--top-p=nan"], "--top-p must be a finite number, got nan"),
        (["--temperature=-1"], "--temperature must be from 0 to 1000000.0, got -1.0"),
        (["--temperature=1e-9"], "--temperature must be 0 or a number from 1e-6 to 1e6, got 1e-09"),
        (["--temperature=inf"], "--temperature must be a finite number, got inf"),
        (
            ["--seed=12345678901234567890"],
            "--seed must be a whole number from 0 to 4294967295, got 1234567",
        ),
        (["--seed=-1"], "--seed must be a whole number from 0 to 4294967295, got -1"),
        (["--min-new-tokens=99999"], "--min-new-tokens must be at most max_new_tokens ("),
        (["--repetition-penalty=0"], "--repetition-penalty must be from 0.01 to 100, got 0.0"),
        (["--stop="], "--stop must be non-empty strings, got ('',)"),
        (["--n=0", "--json"], "--n must be from 1 to 65536, got 0"),
        (["--n=2"], "--n must be 1 with temperature 0, at which all answers are equal, got 2"),
        (["--n=2", "--temperature=1", "--latents=x.npy"], "--n must be 1 with --latents, a file for one answer, got 2"),
        (["--longest-prompt=10"], "the prompt must have at most 10 tokens (--longest-prompt), got 25"),
        (["--longest-prompt=0"], "--longest-prompt must be a whole number from 1"),
        (["--largest-image=8"], "an image must take at most 8 vision tokens (--largest-image), got 9"),
        (["--largest-image=-5"], "--largest-image must be a whole number from 1"),
        (["--image=map.png"], "the number of images (--image) must be at most 1, as in the training of"),
        (["--log-probabilities"], "--log-probabilities must be combined with --json"),
        (["--latents=/dev/null"], "/dev/null must be a regular file or a new one, but it is a device"),
        (["--latents=."], ". must be a regular file or a new one, but it is a folder"),
        (["--latents=/dev/null/x.npy"], "/dev/null cannot be read or written"),
        ([""], "the question must have text, got ''"),
        (["what \udce9?"], "each argument must be text in UTF-8, got b'what \\xe9?'"),
        (["--method=pixels"], '--method must not be "pixels", which only evaluate has'),
        (["--stage="], "no checkpoint of stage ''"),
        (["--stage=stage2"], "no checkpoint of stage 'stage2'"),
        (
            ["one <image> two <image>"],
            "the question must have one <image> for each of its 1 images, or none at all, got 2",
        ),
        (["<|latent_start|>"], "a text must not hold special tokens, got <|latent_start|>"),
    ],
)
def test_bad_input_is_an_error_of_one_sentence(run, picture, capsys, flags, sentence):
    assert main([str(run), *([] if "missing" in flags[0] else [f"--image={picture}"]), *flags]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1 and out == ""


def test_images_that_are_no_files_are_named(run, picture, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, "/dev/null", "x" * 5000, "a\nb"):
        assert main([str(run), f"--image={name}"]) == 2
        out, err = capsys.readouterr()
        assert str(name)[:20].splitlines()[0] in err and err.count("\n") == 1 and len(err) <= 400 and out == ""
    assert main([str(run)]) == 2
    assert "--image must be given with the run's own question" in capsys.readouterr().err


def test_a_published_checkpoint_takes_several_images(published, picture, capsys):
    def answer(*flags):
        flags = [f"--image={picture}", *flags, "--max-new-tokens=6", "--json", "--log-probabilities"]
        return json.loads(printed(capsys, published, *flags))["log_probabilities"]

    first = answer("What is this?", f"--image={picture}")
    assert first == answer("<image><image>What is this?", f"--image={picture}") != answer("What is this?")


def test_ctrl_c_while_an_answer_is_decoded(run, picture):
    flags = [run, f"--image={picture}", "--max-new-tokens=100000", "--method=text"]
    with subprocess.Popen(
        [sys.executable, "-m", "ilvr_jax.generate", *map(str, flags)], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_a_checkpoint_that_is_none_is_named(tmp_path, published, capsys):
    for name, sentence in (
        ("", "the checkpoint must be a folder or a name on the hub, got ''"),
        (tmp_path, "must be the workdir of a run or a published checkpoint, but has no config.json"),
        (tmp_path / "absent", "absent must be the folder of a checkpoint or a name on the hub, but is neither"),
    ):
        assert main([str(name), "What?"]) == 2
        assert sentence in capsys.readouterr().err
    assert main([str(published), "What?", "--stage=stage1"]) == 2
    assert "--stage must not be given for" in capsys.readouterr().err
    assert main([str(published)]) == 2
    assert "the question must be given" in capsys.readouterr().err


def test_the_example_of_the_guide_runs(run, capsys):
    guide = (REPOSITORY / "docs" / "guide.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(example.replace('"runs/base"', repr(str(run))).replace('"tests/', f'"{REPOSITORY}/tests/'), {})
    names = re.findall(r"^level3_\d+\.png", capsys.readouterr().out, re.MULTILINE)
    assert len(names) == len(set(names)) == 50


def test_a_model_looks_as_it_was_trained_to():
    config = tiny_config()
    config.latents.update(latent_size=4, image_visibility="until_look", slot_positions="turning_grid")
    parts = {"model": None, "params": None, "tokenizer": None, "special": None, "looks": True}
    trained = TrainedModel(prompts=ExampleSettings(latent_size=4), config=parse(config), **parts)
    assert trained.look_fields == {
        "latent_size": 4,
        "image_visibility": "until_look",
        "slot_positions": "turning_grid",
    }
    published = TrainedModel(prompts=ExampleSettings(latent_size=8), **parts)
    assert published.look_fields == {"latent_size": 8, "image_visibility": "all", "slot_positions": "text"}


def test_a_run_from_nothing_is_exported_with_the_end_of_its_chat(run, tmp_path):
    assert convert.main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == ([end], pad)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out").get_text_config()
    assert (config.eos_token_id, config.bos_token_id, tokenizer.eos_token_id) == (end, pad, end)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("fsdp", "must be axis=size, each axis at most once of slice, data, fsdp, tensor, with commas between them"),
        ("fsdp=2,fsdp=4", "each axis at most once of slice, data, fsdp, tensor"),
        ("fsdp=3", "--mesh must fit: the number of devices must be 3 for slice 1, data 1, fsdp 3, tensor 1, got "),
        ("tensor=0", "--mesh must fit: sizes must be whole numbers from 1, or -1 for the rest, got slice 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(run, picture, capsys, flag, sentence):
    with contextlib.suppress(SystemExit):
        assert main([str(run), f"--image={picture}", f"--mesh={flag}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_several_devices_give_the_answer_of_one(run, picture):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "ilvr_jax.generate", str(run), f"--image={picture}", "--json"]
    outputs = []
    for flags in ([], ["--mesh=fsdp=2,tensor=2"]):
        done = subprocess.run([*command, *flags], capture_output=True, cwd=REPOSITORY, env=environment, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout)["tokens"])
    assert outputs[0] == outputs[1]
    refused = subprocess.run([*command, "--mesh=tensor=3"], capture_output=True, cwd=REPOSITORY, env=environment)
    assert refused.returncode == 2 and b"tensor must divide the model's num_attention" in refused.stderr


def test_several_answers_and_stop_strings(run, picture, capsys):
    flags = [run, f"--image={picture}", "--json"]
    sampled = [*flags, "--n=3", "--temperature=1.5", "--seed=4"]
    answers = [json.loads(line) for line in printed(capsys, *sampled).splitlines()]
    assert [answer["sample"] for answer in answers] == [0, 1, 2]
    assert len({tuple(answer["tokens"]) for answer in answers}) > 1
    (alone,) = [json.loads(line) for line in printed(capsys, *flags, "--temperature=1.5", "--seed=4").splitlines()]
    assert alone["tokens"] == answers[0]["tokens"]
    whole = json.loads(printed(capsys, *flags, "--method=text"))["text"]
    stop = whole[len(whole) // 2 :][:2]
    out = printed(capsys, run, f"--image={picture}", "--method=text", f"--stop={stop}")
    assert out.startswith(whole[: whole.index(stop)] + "\n")
