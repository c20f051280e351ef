"""Ahead-of-time compilation for TPU topologies."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ilvr_jax import aot
from ilvr_jax.analysis.compilation import compile_decoding, config_model, open_topology
from ilvr_jax.analysis.flops import SHAPES, decoder_flops, train_flops, vision_flops
from ilvr_jax.config.experiments import load_config, parse
from ilvr_jax.method.layout import Layout
from ilvr_jax.models.attention import causal_attention, causal_mask
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import ROWS, make_mesh, on_mesh
from tests.paths import REPOSITORY
from tests.samples import CONFIG

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="optional: libtpu, of requirements-tpu.txt, is not installed"
)
PLAIN_MAPS = f"--config={REPOSITORY / 'configs' / 'plain_maps.py'}"
PUBLISHED = REPOSITORY / "configs" / "qwen2_5_vl.py"
STAGE1 = f"--config={PUBLISHED}:7b-stage1"
WIDE = dataclasses.replace(
    CONFIG, hidden_size=256, intermediate_size=512, num_hidden_layers=1, mrope_section=(8, 12, 12)
)


@pytest.fixture(autouse=True)
def no_flags_for_another_compiler(monkeypatch):
    """libtpu ends the process at an unknown flag, such as one for CPUs."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def flops_xla_counts(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_pass_costs_what_the_compiler_counts():
    model, columns = Qwen2_5VL(WIDE), 128
    params = jax.eval_shape(model.init, jax.random.key(0))["decoder"]
    inputs = jax.ShapeDtypeStruct((1, columns, WIDE.hidden_size), "float32")

    def forward(params, inputs):
        mask = causal_mask(jnp.ones((1, columns), bool))
        hidden, _ = model.decode(params, inputs, jnp.zeros((1, 3, columns), jnp.int32), mask)
        return model.logits(params, hidden)

    counted = flops_xla_counts(forward, params, inputs)
    # The compiler multiplies the upper half of the attention as well, and counts sums, roots and exponentials.
    assert 0.85 < decoder_flops(WIDE, columns, columns) / counted < 1.0
    assert decoder_flops(WIDE, columns, 0) < decoder_flops(WIDE, columns, columns)


def test_what_learns_costs_two_more_passes_and_what_does_not_one():
    layout = Layout(prefix=128, images=1, image_tokens=16)
    full = train_flops(WIDE, "text", ("decoder",), layout, 2, encodes=False)
    forward = 2 * decoder_flops(WIDE, 128, 128)
    assert full == 3 * forward
    assert train_flops(WIDE, "text", ("adapters",), layout, 2, encodes=False) == 2 * forward
    teacher = 2 * decoder_flops(WIDE, 128, 0)
    assert train_flops(WIDE, "alignment", ("decoder",), layout, 2, encodes=False) == full + teacher
    tower = 2 * vision_flops(WIDE, 16)
    assert train_flops(WIDE, "text", ("vision", "decoder"), layout, 2, encodes=True) == full + 3 * tower


@pytest.mark.parametrize(("size", "billions"), [("3B", 3.09), ("7B", 7.62), ("32B", 32.8), ("72B", 72.7)])
def test_published_models_have_their_shapes_without_a_network(size, billions):
    config = load_config(f"{PUBLISHED}:{size.lower()}-stage1")
    config = parse(config)
    assert config.model.init_from in SHAPES
    shapes = jax.eval_shape(config_model(config).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["decoder"]))
    assert abs(count / 1e9 / billions - 1) < 0.01  # of the language model, as published for Qwen2.5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([PLAIN_MAPS], "--config and --topology (such as v5e:4x4), or --sweep, must be given"),
        ([PLAIN_MAPS, "--topology=v9:2x2"], "--topology must be one of v5e, v5p, v6e, a colon and a shape"),
        (
            [PLAIN_MAPS, "--topology=v5e:2x2", "--stage=stage3"],
            "--stage must be one of warm_up, stage1, stage2, decoding, got",
        ),
        ([PLAIN_MAPS, "--topology=v5e:2x2", "--bucket=huge"], "--bucket must be one of large_long, "),
        pytest.param(
            [PLAIN_MAPS, "--topology=v5e:3x5"],
            "--topology must be one of v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4",
            marks=needs_libtpu,
        ),
        pytest.param(
            [STAGE1, "--topology=v5e:4x4"],
            "stage1: batch_size must be a multiple of 16, the devices that share its rows, got 8",
            marks=needs_libtpu,
        ),
    ],
)
def test_bad_flags_get_one_sentence(flags, sentence, capsys):
    assert aot.main(flags) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_without_the_compiler_the_error_names_the_requirements(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aot.main([PLAIN_MAPS, "--topology=v5e:2x2"]) == 2
    assert "pip install -r requirements-tpu.txt" in capsys.readouterr().err


@needs_libtpu
def test_a_train_step_is_compiled_and_its_memory_printed(capsys):
    flags = ["--topology=v5e:2x2", "--stage=warm_up", "--bucket=small_short", "--config.mesh.fsdp=2"]
    assert aot.main([PLAIN_MAPS, *flags]) == 0
    output = capsys.readouterr().out
    assert "warm_up, small_short on v5e:2x2" in output and "fits: 100% to spare" in output and "all-gather" in output
    assert "calls of attention kernels: 4" in output  # forward, recomputed for the gradient, and two backward
    assert aot.main([PLAIN_MAPS, *flags, "--config.model.attention=xla"]) == 0
    assert "calls of attention kernels: 0" in capsys.readouterr().out


@needs_libtpu
def test_a_program_that_does_not_fit_gets_advice(capsys):
    assert aot.main([STAGE1, "--topology=v5e:2x2", "--stage=stage1"]) == 1
    output = capsys.readouterr().out
    assert "each chip of 16 GiB would hold weights 7.4, optimizer 14.2, teacher 7.1" in output
    assert "use more chips" in output and "model.lora.rank" in output


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("columns", [1500, 2080])
def test_attention_of_a_published_size_keeps_no_scores(topology, columns):
    _, devices = open_topology(topology)
    mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 1, "tensor": 2}, devices)
    place = NamedSharding(mesh, PartitionSpec(ROWS))
    query = jax.ShapeDtypeStruct((2, columns, 28, 128), "bfloat16", sharding=place)
    key = jax.ShapeDtypeStruct((2, columns, 4, 128), "bfloat16", sharding=place)
    valid = jax.ShapeDtypeStruct((2, columns), bool, sharding=place)

    def total(query, key, value, valid):
        return causal_attention(query, key, value, valid).astype("float32").sum()

    with on_mesh(mesh):
        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, key, key, valid)
    scores = 14 * 4 * columns**2
    assert lowered.compile().memory_analysis().temp_size_in_bytes < scores / 4


@needs_libtpu
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 4}, {"fsdp": 16}])
def test_a_step_of_decoding_reads_weights_and_cache_once_and_gathers_no_weights(mesh):
    config = load_config(f"{PUBLISHED}:7b-stage1")
    config.mesh.update(data=1, **mesh)
    config.eval.batch_size = 16
    config = parse(config)
    chip, devices = open_topology("v5e:4x4")
    _, step = compile_decoding(config, "few_looks", config_model(config), chip, devices)
    assert step.traffic < step.reads < 1.15 * step.traffic  # of the weights and the whole cache
    sent = sum(call.bytes for call in step.collectives)
    assert sent < 0.05 * step.memory["weights"]  # activations alone
