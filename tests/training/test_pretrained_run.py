"""Both stages from a published checkpoint on real examples: losses fall, runs resume, results are exported."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from ilvr_jax import convert, evaluate
from ilvr_jax.checkpoints.export import write_adapter
from ilvr_jax.checkpoints.runs import build_run_model, restore_run
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.config.experiments import load_config, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LoraConfig
from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.tokenizer import read_tokenizer, record_texts
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.progress import Progress
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import train
from ilvr_jax.training.metrics import read_metrics
from tests.published import save_published
from tests.vectors import SHARED

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = Path(__file__).parents[1] / "data" / "mirage" / "sample.jsonl"
STAGES, STEPS = ("stage1", "stage2"), 10


def tiny_run(checkpoint, examples, lora):
    """Return the published settings on a tiny checkpoint, few records and few steps."""
    config = load_config(f"{CONFIGS / 'qwen2_5_vl.py'}:7b{'-lora' * lora}-stage2")
    config.model.init_from = str(checkpoint)
    config.model.lora.dropout = 0.0
    config.model.dtype = "float32"  # of activations: bfloat16 is slow on a CPU
    config.data.update(source="mirage", path=str(examples), workers=0, max_pixels=196 * 196)
    config.data.feature_cache = str(checkpoint.parent / "features")
    bucket = {**config.data.buckets.one_look, "prefix": 704, "tail": 256}
    config.data.buckets = {"one_look": bucket}
    for name in STAGES:
        config[name].update(epochs=0, steps=STEPS, batch_size=2, accumulation=2, learning_rate=1e-2, warmup_steps=2)
    config.update(log_every=1, checkpoint_every=4)
    config.eval.max_new_tokens = 8
    return config


def curve(workdir):
    timing = ("seconds", "samples_per_second", "data_wait_share", "goodput")
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(workdir)]


@pytest.fixture(scope="module", autouse=True)
def compiled_well():
    """Steps over a whole vocabulary take longer than compiling them well."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true")


def end_with_text(folder):
    """Let the answers of a checkpoint end with <|endoftext|>."""
    end = read_tokenizer(folder).convert_tokens_to_ids("<|endoftext|>")
    described = {"eos_token_id": [end], "temperature": 0.5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with a small tokenizer, and three of the examples."""
    folder = tmp_path_factory.mktemp("small")
    save_published(folder, texts=record_texts(MirageSource(EXAMPLES)), vocabulary=1024)
    end_with_text(folder)
    return folder, EXAMPLES


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    """A checkpoint and examples: with the published tokenizer and all ten where they are at hand, else small ones."""
    examples = SHARED / "data" / "vsp_reasoning_examples" / "sample.jsonl"
    processor = SHARED / "data" / "qwen2_5_vl_processor"
    if not (examples.is_file() and processor.is_dir()):
        return small
    folder = tmp_path_factory.mktemp("published")
    save_published(folder, vocabulary=152064)
    for path in processor.iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    end_with_text(folder)
    return folder, examples


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def finished(request, checkpoint, small, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny_run(*(small if request.param else checkpoint), request.param)  # one pass with a large vocabulary
    train(parse(config), workdir)
    return config, workdir


def check_falling(workdir):
    for stage in STAGES:
        losses = [line["cross_entropy"] for line in read_metrics(workdir) if line["stage"] == stage]
        assert len(losses) == STEPS
        assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_losses_fall_in_both_stages(finished):
    _, workdir = finished
    check_falling(workdir)


def test_the_record_held_out_is_evaluated_on_as_by_the_command(finished):
    """The model of training is the one that is loaded: one digest of parameters, tokenizer and settings."""
    _, workdir = finished
    files = {path: path.read_bytes() for path in (workdir / "evaluations").iterdir()}
    assert len(files) == 3 * len(STAGES)
    for stage in STAGES:
        assert evaluate.main([str(workdir), f"--stage={stage}"]) == 0
    assert {path: path.read_bytes() for path in (workdir / "evaluations").iterdir()} == files


def stop_after(stage, step, config, workdir):
    """Train until a step, and stops there as Ctrl-C does."""
    advance = Progress.advance

    def advance_or_stop(progress):
        advance(progress)
        if (progress._stage, progress._step) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Progress, "advance", advance_or_stop)
        train(parse(config), workdir)


def test_a_stopped_run_goes_on_with_the_same_curve(finished, tmp_path):
    config, whole = finished
    stop_after("stage1", 6, config, tmp_path)
    train(parse(config), tmp_path)
    assert curve(tmp_path) == curve(whole)


def test_a_run_that_encodes_images_in_every_step_has_the_same_losses(finished, tmp_path):
    config, whole = finished
    assert list(Path(config.data.feature_cache).glob("*/*.safetensors"))
    config = config.copy_and_resolve_references()
    config.data.feature_cache = ""
    stop_after("stage1", 3, config, tmp_path)
    for line, expected in zip(curve(tmp_path), curve(whole), strict=False):
        assert line == pytest.approx(expected, abs=1e-4)


def test_what_is_frozen_stays_in_bfloat16_and_what_learns_is_float32(finished):
    config, workdir = finished
    params = restore_run(workdir).params
    lora = "adapters" in params
    assert lora == bool(config.model.lora.rank)
    dtypes = {part: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for part, tree in params.items()}
    frozen = {"vision": {"bfloat16"}, "decoder": {"bfloat16"}, "adapters": {"float32"}}
    assert dtypes == (frozen if lora else {"vision": {"bfloat16"}, "decoder": {"float32"}})


def our_logits(workdir, ids):
    return logits_of(*restore_run(workdir)[1:3], ids)


def logits_of(model, params, ids):
    decoder = decoder_params(jax.tree.map(lambda leaf: leaf.astype("float32"), params))
    positions = np.broadcast_to(np.arange(len(ids)), (1, 3, len(ids)))
    mask = causal_mask(np.ones((1, len(ids)), bool))
    hidden, _ = model.decode(decoder, model.embed(decoder, np.array([ids])), positions, mask)
    return np.asarray(model.logits(decoder, hidden))


def their_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.numpy()


def test_transformers_opens_the_result_with_the_same_logits(finished, tmp_path, capsys):
    config, workdir = finished
    lora = bool(config.model.lora.rank)
    if lora:
        assert convert.main(["to-hf", str(workdir), str(tmp_path / "out")]) == 2
        assert "give --merge-lora or --adapter" in capsys.readouterr().err
    flags = ["--merge-lora"] if lora else []
    assert convert.main(["to-hf", str(workdir), str(tmp_path / "out"), "--dtype=float32", *flags]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Here is the map<|latent_start|><|latent_pad|><|latent_end|>")["input_ids"]
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs.config.latent_size == 8
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])  # of training, of the checkpoint begun from
    assert theirs.generation_config.eos_token_id == ends and theirs.generation_config.temperature == 0.5
    assert theirs.config.get_text_config().eos_token_id == tokenizer.eos_token_id == ends[0]
    assert restore_run(workdir).special.ends == tuple(ends)
    # bfloat16 kernels that adapters are merged into are rounded once more.
    np.testing.assert_allclose(our_logits(workdir, ids), their_logits(theirs, ids), atol=2e-2 if lora else 2e-4)


def test_adapters_have_pefts_names_and_shapes(finished, tmp_path, capsys):
    config, workdir = finished
    status = convert.main(["to-hf", str(workdir), str(tmp_path / "adapter"), "--adapter"])
    if not config.model.lora.rank:
        assert status == 2 and "has no LoRA adapters" in capsys.readouterr().err
        return
    assert status == 0
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    assert convert.main(["from-hf", config.model.init_from, str(tmp_path / "converted")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "converted"), str(tmp_path / "base")]) == 0
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = tokenizer("Here is the map<|latent_start|><|latent_pad|><|latent_end|>")["input_ids"]
    np.testing.assert_allclose(our_logits(workdir, ids), their_logits(model, ids), atol=2e-4)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 2  # layers, targets, matrices
    again = load_model(str(tmp_path / "adapter"), dtype="float32")
    assert again.looks and again.special == restore_run(workdir).special
    np.testing.assert_allclose(logits_of(again.model, again.params, ids), our_logits(workdir, ids), atol=2e-4)


def test_the_teachers_weights_go_out_on_request(finished, tmp_path, capsys):
    config, workdir = finished
    flags = ["--merge-lora"] if config.model.lora.rank else []
    for name, more in (("student", []), ("teacher", ["--teacher"])):
        command = ["to-hf", str(workdir), str(tmp_path / name), "--stage=stage1", "--dtype=float32", *flags, *more]
        assert convert.main(command) == 0
    student, teacher = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "teacher"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert student.keys() == teacher.keys() and np.abs(student[name] - teacher[name]).max() > 0
    assert convert.main(["to-hf", str(workdir), str(tmp_path / "none"), "--teacher", *flags]) == 2
    assert "has no teacher" in capsys.readouterr().err


def test_stage_2_resumes_in_the_workdir_of_stage_1(small, tmp_path):
    """Both train adapters further, and neither needs the published checkpoint again."""
    config, workdir, adapter = tiny_run(*small, lora=True), tmp_path / "run", tmp_path / "adapter"
    base, settings = config.model.init_from, LoraConfig(config.model.lora.rank, config.model.lora.alpha)
    model = build_run_model(parse(config), small[0], read_tokenizer(small[0]))
    begun = jax.tree.map(lambda leaf: 0.01 + jnp.abs(leaf), model.init(jax.random.key(5))["adapters"])
    adapter.mkdir()
    write_adapter(begun, settings, base, adapter)
    config.model.init_from = str(adapter)
    first = config.copy_and_resolve_references()
    first.stages = ("stage1",)
    for stage in STAGES:
        first[stage].steps = config[stage].steps = 2
    train(parse(first), workdir)
    learnt = restore_run(workdir).params["adapters"]
    for one, other in zip(jax.tree.leaves(learnt), jax.tree.leaves(begun), strict=True):
        assert 0 < np.abs(one - other).max() < 0.1  # two steps after its start
    shutil.rmtree(adapter)
    train(parse(config), workdir)
    assert [(line["stage"], line["step"]) for line in curve(workdir)] == [(s, n) for s in STAGES for n in (1, 2)]
    with pytest.raises(BadConfig, match="another config: stages"):
        train(parse(first), workdir)
    assert convert.main(["to-hf", str(workdir), str(tmp_path / "out"), "--adapter"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
