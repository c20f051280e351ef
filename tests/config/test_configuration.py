"""The configuration: overrides keep types, mistakes get one sentence, a workdir belongs to one config."""

import argparse
import dataclasses
import json
import subprocess
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_jax.config import schema
from ilvr_jax.config.experiments import as_file, load_config, parse, resolve_path
from ilvr_jax.config.fields import BadConfig, read_value, rule_of
from ilvr_jax.config.flags import parse_text, read_command
from ilvr_jax.config.workdir import check_resumable, read_config, write_config
from ilvr_jax.data.sources import open_source
from ilvr_jax.training.run import check_choices
from tests.paths import REPOSITORY

CONFIG = """
from configs import plain_maps
from ilvr_jax.config.experiments import stage_config

def get_config():
    config = plain_maps.get_config()
    config.stages = ("warm_up",)
    config.warm_up.steps = 4
    return config
"""


PUBLISHED = REPOSITORY / "configs" / "qwen2_5_vl.py"


def schemas():
    return [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind)]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def read(config_file, *flags):
    options = read_command(argparse.ArgumentParser(), [f"--config={config_file}", *flags])
    check_choices(options.config)
    return options


def test_overrides_keep_the_type_of_the_value(config_file):
    options = read(
        config_file,
        "--config.warm_up.steps=7",
        "--config.warm_up.learning_rate=1",
        "--config.data.path",
        "3",
        "--config.data.frozen_lake.levels=5",
        "--config.model.vision.image_mean=(0.5, 1, 0)",
        "--config.data.frozen_lake.exclude=a.jsonl, b.jsonl",
        "--config.model.tie_word_embeddings=false",
    )
    config, warm_up = options.config, options.config.stages["warm_up"]
    assert warm_up.steps == 7
    assert warm_up.learning_rate == 1.0 and isinstance(warm_up.learning_rate, float)
    assert config.data.path == "3"
    assert config.data.frozen_lake.levels == (5,)
    assert config.model.vision.image_mean == (0.5, 1, 0)
    assert config.data.frozen_lake.exclude == ("a.jsonl", "b.jsonl")
    assert config.model.tie_word_embeddings is False
    assert str(options.workdir) == "runs/small"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.warm_up.step=7", "config.warm_up.step must be a key of the config; the nearest is warm_up.steps"),
        ("--config.steps=7", "the nearest is stage1.steps"),
        ("--config.warm_up=7", "config.warm_up must be one of the section's keys, such as accumulation, batch_size"),
        ("--config.warm_up.steps=many", "`warm_up.steps` must be an integer, got 'many'"),
        ("--config.warm_up.steps=1.5", "`warm_up.steps` must be an integer, got '1.5'"),
        ("--config.warm_up.steps=true", "`warm_up.steps` must be an integer, got 'true'"),
        ("--config.warm_up.learning_rate=", "`warm_up.learning_rate` must be a number, got ''"),
        ("--config.model.tie_word_embeddings=1", "`model.tie_word_embeddings` must be true or false, got '1'"),
        ("--config.data.frozen_lake.levels=3,x", "levels` must be a tuple of int, got '3,x'"),
        ("--config.model.vision.image_mean=x", "image_mean` must be a tuple of float, got 'x'"),
        ("--config.warm_up.steps", "config.warm_up.steps must have a value"),
        ("--config.warm_up.steps=0", "`warm_up.steps` must be at least 1, got 0"),
        ("--config.stages=stage3", "got 'stage3'"),
        ("--config.stages=warm_up,warm_up", "must name each stage once, got warm_up, warm_up"),
        ("--config.warm_up.objective=texts", "must be one of text, alignment, guided, autonomy, got 'texts'"),
        ("--config.warm_up.helper_images=slots", "must be one of omit, encode with objective text, got 'slots'"),
        ("--config.warm_up.objective=alignment", "must be one of latent with objective alignment"),
        ("--config.warm_up.accumulation=0", "`warm_up.accumulation` must be at least 1, got 0"),
        ("--config.seed=-1", "`seed` must be at least 0, got -1"),
        ("--config.data.records=0", "`data.records` must be at least 1, got 0"),
        (
            "--config.data.buckets.small_short.prefix=-1",
            "small_short.prefix` must be from 0 to 1048576, got -1",
        ),
        ("--config.warm_up.train=teacher", "must be one of vision, decoder, adapters, got 'teacher'"),
        ("--config.seed=12345678901234567890", "`seed` must be from -2147483647 to 2147483647, got 1234"),
        ("--config.eval.top_k=3000000000", "`eval.top_k` must be from "),
        ("--config.stage1.steps=" + "9" * 5000, "`stage1.steps` must be an integer, got '9999"),
        ("--config.stage1.steps=" + "(" * 5000, "`stage1.steps` must be an integer, got '(((("),
        ("--config.stage1.steps={[]: 1}", "`stage1.steps` must be an integer, got '{[]: 1}'"),
        ("--config.stage1.learning_rate=1e999", "`stage1.learning_rate` must be a finite number, got inf"),
        ("--config.data.buckets.small_short.prefix=4294967296", "`data.buckets.small_short.prefix` must be from "),
        ("--workdir=", "--workdir must be a folder, got ''"),
        ("--workdir=a\0b", "--workdir must be a folder, got 'a\\x00b'"),
        ("--config.data.on_bad_record=stop", "must be one of error, skip, got 'stop'"),
    ],
)
def test_a_wrong_flag_gets_one_sentence(config_file, flag, sentence):
    with pytest.raises(BadConfig) as error:
        read(config_file, flag)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "config.latents.coverag = 0.5",
            "latents.coverag` must be a key of the config; the nearest is latents.coverage",
        ),
        (
            "config.model.vision.dept = 1",
            "model.vision.dept` must be a key of the config; the nearest is model.vision.depth",
        ),
        ("config.data.buckets.small_short.prefixes = 1", "the nearest is data.buckets.small_short.prefix"),
        ("del config.model.hidden_size", "`model.hidden_size` must be given without model.init_from, got None"),
        ("del config.model['vision']", "`model.vision` must be given without model.init_from, got None"),
        ("del config.model['vision']; config.model.vision = 3", "`model.vision` must be a section with depth, "),
        ("del config.data.buckets.large_looks.prefix", "`data.buckets.large_looks.prefix` must be given"),
        ("config.data.buckets = {}", "`data.buckets` must hold at least one section, got none"),
        ("config.warm_up.stesp = 3", "`warm_up.stesp` must be a key of the config; the nearest is warm_up.steps"),
        ("del config.warm_up.objective", "`warm_up.objective` must be given"),
        ("config.log_evry = 3", "`log_evry` must be a key of the config; the nearest is log_every"),
        (
            "config.stage1.train = ('vision', 'decoder'); config.stages = ('stage1',)",
            "`stage1.train` must name only decoder with objective alignment, got vision, decoder",
        ),
        ("del config.data; config.data = 3", "`data` must be a section with source, path, "),
        ("del config.seed; config.seed = config.stage1", "`seed` must be a value, not a section"),
        ("del config.seed; config.seed = 'x'", "`seed` must be an integer, got 'x'"),
        ("del config.stages; config.stages = 'warm_up'", "`stages` must be a tuple, got 'warm_up'"),
        ("del config.data.buckets; config.data.buckets = 3", "`data.buckets` must be a section, got 3"),
        ("del config.eval.top_p; config.eval.top_p = None", "`eval.top_p` must be a number, got None"),
        ("config.warm_up = stage_config('text', stesp=3)", 'line 9: KeyError: Key "stesp" does not exist'),
    ],
)
def test_a_key_that_nothing_reads_or_is_missing_is_named(tmp_path, line, sentence):
    path = tmp_path / "bad.py"
    path.write_text(CONFIG.replace("    return", f"    {line}\n    return"))
    with pytest.raises(BadConfig) as error:
        read(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config():\n    return missing\n", "line 2: NameError: name 'missing' is not defined"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        (
            "def get_config():\n    return {}\n",
            "must have a function get_config() that returns an ml_collections.ConfigDict",
        ),
        ("value = 1\n", "must have a function get_config()"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n"
            "    config = ConfigDict(dict(steps=1))\n    config.steps = 'x'\n    return config\n",
            "line 4: TypeError",
        ),
        ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
        ("value = 1\0\n", "bad.py: "),
        ("from json import missing\n", "line 1: ImportError"),
    ],
)
def test_a_config_file_that_is_no_good_gets_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(BadConfig) as error:
        load_config(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(BadConfig, match="there is no file .*absent.py"):
        load_config(tmp_path / "absent.py")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadConfig, match="must be a Python file"):
        load_config(tmp_path / "config.json")


def test_unknown_flags_end_the_process_with_status_2(config_file, capsys):
    with pytest.raises(SystemExit) as ended:
        read(config_file, "--steps=3")
    assert ended.value.code == 2
    assert "--steps=3" in capsys.readouterr().err


scalars = st.booleans() | st.integers() | st.floats(allow_nan=False)


@given(scalars)
def test_a_printed_value_is_read_back(value):
    read_back = parse_text("key", repr(value).replace("inf", "1e999"), type(value))
    assert read_back == value and type(read_back) is type(value)


@given(st.lists(st.integers()).map(tuple) | st.lists(st.from_regex(r"[a-z_/]+", fullmatch=True)).map(tuple))
def test_a_printed_tuple_is_read_back_with_and_without_parentheses(value):
    kind = tuple[type(value[0]) if value else int, ...]
    assert parse_text("key", repr(value), kind) == value
    assert parse_text("key", ",".join(map(str, value)), kind) == value


def test_a_workdir_belongs_to_one_config(config_file, tmp_path):
    workdir = tmp_path / "run"
    config = read(config_file).config
    other = read(config_file, "--config.warm_up.steps=6").config
    check_resumable(config, workdir)
    write_config(config, workdir)
    assert read_config(workdir) == config
    check_resumable(other, workdir)  # nothing was saved yet
    (workdir / "checkpoints" / "warm_up" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    check_resumable(other, workdir)  # nothing was saved completely
    (workdir / "checkpoints" / "warm_up" / "2").mkdir()
    check_resumable(config, workdir)
    check_resumable(
        read(config_file, "--config.log_every=5", "--config.data.workers=2", "--config.eval.batch_size=9").config,
        workdir,
    )
    with pytest.raises(BadConfig, match=r"another config: warm_up.steps \(4 there, 6 here\); give"):
        check_resumable(other, workdir)


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("last", ["", "-stage1", "-stage2"])
def test_the_published_configs_are_whole(size, lora, last, capsys):
    arguments = [f"--config={PUBLISHED}:{size}{'-lora' * lora}{last}", "--config.data.path=train.jsonl"]
    with pytest.raises(SystemExit) as ended:
        read_command(argparse.ArgumentParser(), [*arguments, "--config.print=true"])
    shown = parse(json.loads(capsys.readouterr().out), complete=True)
    assert ended.value.code == 0 and shown == read_command(argparse.ArgumentParser(), arguments).config
    assert list(shown.stages) == (["stage1"] if last == "-stage1" else ["stage1", "stage2"])
    assert shown.model.init_from == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    for stage in shown.stages.values():
        assert (stage.optimizer, stage.learning_rate, stage.weight_decay) == ("adamw", 1e-5, 0.01)
        assert (stage.warmup_steps, stage.clip, stage.batch_size, stage.accumulation) == (10, 1.0, 8, 8)
        assert (stage.epochs, stage.train) == (15, ("adapters",) if lora else ("decoder",))
    latents = shown.latents
    assert (latents.latent_size, latents.coverage, latents.candidates, latents.tau) == (8, 0.9, 256, 0.999)
    assert (latents.ce_weight, latents.sim_weight, latents.target_noise) == (1.0, 1.0, 0.01)
    if lora:
        adapters = shown.model.lora
        assert (adapters.rank, adapters.alpha, adapters.dropout, len(adapters.targets)) == (32, 64.0, 0.05, 7)


def test_a_variant_that_does_not_exist_is_one_sentence_that_lists_those_that_do():
    with pytest.raises(
        BadConfig, match="ValueError: the variant must be one of 3b, .*7b-lora-stage2.*, got '8b'"
    ) as error:
        load_config(f"{PUBLISHED}:8b")
    assert len(str(error.value)) < 400
    with pytest.raises(BadConfig, match="plain_maps.py, which has no variants, got "):
        load_config(f"{REPOSITORY / 'configs' / 'plain_maps.py'}:small")


def test_reading_a_config_imports_no_model():
    """It takes a fraction of a second; jax alone takes a whole one."""
    program = "import sys; from ilvr_jax.config import flags, workdir; flags.load_config(sys.argv[1]); "
    program += "print([name for name in ('jax', 'flax', 'transformers', 'grain') if name in sys.modules])"
    command = [sys.executable, "-c", program, "configs/base.py"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout == "[]\n"


def test_keys_of_later_versions_may_be_missing_in_a_workdir_and_no_others(config_file, tmp_path):
    (tmp_path / "checkpoints" / "warm_up" / "2").mkdir(parents=True)
    config = read(config_file).config
    values = as_file(config)
    del values["data"]["accept_change"], values["model"]["slot_input"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == config
    check_resumable(config, tmp_path)
    del values["latents"]["tau"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BadConfig, match="config.json: `latents.tau` must be given, but is missing.*; to restore it"):
        read_config(tmp_path)


def test_stages_may_be_added_and_not_exchanged(config_file, tmp_path):
    first = read(config_file, "--config.stages=warm_up,stage1").config
    write_config(first, tmp_path)
    (tmp_path / "checkpoints" / "warm_up" / "2").mkdir(parents=True)
    check_resumable(read(config_file, "--config.stages=warm_up,stage1,stage2").config, tmp_path)
    for stages in ("warm_up", "warm_up,stage2", "stage1,warm_up"):
        with pytest.raises(BadConfig, match="another config: stages "):
            check_resumable(read(config_file, f"--config.stages={stages}").config, tmp_path)


@pytest.mark.parametrize("schema", sorted(schemas(), key=lambda schema: schema.__name__))
def test_each_key_has_a_sentence_and_a_default_in_its_range(schema):
    for field in dataclasses.fields(schema):
        rule = rule_of(field)
        assert rule.meaning
        if field.default not in (dataclasses.MISSING, None) and not dataclasses.is_dataclass(field.default):
            read_value(typing.get_type_hints(schema)[field.name], field.default, field.name, rule)


def test_a_data_set_needs_a_path():
    with pytest.raises(BadConfig, match="`data.path` must be a file of the format ilvr"):
        open_source(parse(load_config(PUBLISHED)).data, seed=0)


def test_a_workdir_that_cannot_be_one(config_file, tmp_path):
    with pytest.raises(BadConfig, match="must be the workdir of a training run"):
        read_config(tmp_path)


def test_paths_are_looked_for_here_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("tests").is_dir()
    (tmp_path / "tests").mkdir()
    assert resolve_path("tests").resolve() == (tmp_path / "tests").resolve()
    assert str(resolve_path("absent/file")) == "absent/file"
