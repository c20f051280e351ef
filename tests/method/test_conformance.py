"""Our numbers against the published code's (see the conformance README for the tolerances)."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from ilvr_jax.config.schema import LatentsConfig, StageConfig
from ilvr_jax.inference.engine import generate
from ilvr_jax.method.layout import collate, merge_layouts, required_layout, sample_columns
from ilvr_jax.method.objectives import alignment_loss, autonomy_loss
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import tensor_name
from ilvr_jax.training.state import create_state
from ilvr_jax.training.step import make_train_step
from tests.decoding import make_request
from tests.vectors import Vector, of_kind, read

FEATURES, LOSS, GRADIENT, TRAIN_LOSS, WEIGHT = 2e-4, 1e-4, 1e-3, 2e-3, 1e-4


def pytest_generate_tests(metafunc):
    if "vector" in metafunc.fixturenames:
        kind = metafunc.function.__name__.split("_")[1]
        vectors = of_kind(metafunc.config.getoption("vectors"), kind)
        metafunc.parametrize("vector", vectors, ids=[vector.name for vector in vectors])


def lay_out(vectors: list[Vector]):
    """Return the batch of the vectors' samples, and each sample's columns."""
    geometry = vectors[0].config.vision.geometry
    samples = [vector.sample(record) for record, vector in enumerate(vectors)]
    layout = merge_layouts([required_layout(sample, geometry) for sample in samples])
    return collate(samples, layout, vectors[0].special, geometry), [
        sample_columns(sample, layout) for sample in samples
    ]


def settings(vector: Vector) -> LatentsConfig:
    meta = vector.meta
    return LatentsConfig(meta["latent_size"], meta["coverage_p"], meta["helper_group_size"], target_noise=0.0)


def check_gradients(vector: Vector, gradients) -> None:
    for name, gradient in by_name(gradients, vector).items():
        if (expected := vector.arrays.get(f"expect_grad.{name}")) is not None:
            np.testing.assert_allclose(gradient, expected, atol=GRADIENT * np.abs(expected).max(), err_msg=name)


def by_name(decoder, vector: Vector) -> dict[str, np.ndarray]:
    """Return the decoder's tensors under the names and in the layout of a published checkpoint."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(decoder)[0]:
        names = ("decoder", *(key.key for key in path))
        stacked = names[1] == "layers"
        for layer in range(vector.config.num_hidden_layers) if stacked else [None]:
            value = np.asarray(leaf if layer is None else leaf[layer])
            tensors[tensor_name(names, layer)] = value.T if names[-1] == "kernel" else value
    return tensors


def logits(vector: Vector, hidden) -> np.ndarray:
    return np.asarray(Qwen2_5VL(vector.config).logits(vector.params()["decoder"], hidden))


def check_stage1(vector: Vector, row: int, columns, batch, vision, result, selection) -> None:
    """Compare one row of a batch with its file."""
    if vector.images():
        units = np.asarray(batch.images.unit_valid[row])
        np.testing.assert_allclose(np.asarray(vision)[row][units], vector["expect_vision"], atol=FEATURES)
    np.testing.assert_array_equal(np.asarray(batch.positions)[row][:, columns], vector["expect_position_ids"][:, 0])
    np.testing.assert_allclose(selection.user_query[row], vector["expect_u"][0], atol=FEATURES)
    filled = np.zeros(batch.tokens.shape[1], bool)
    picked = [np.zeros((0, vector.config.hidden_size))]
    for segment in range(len(vector.sample().slot_starts)):
        cosines, top = vector[f"expect_sim_{segment}"], vector[f"expect_top_{segment}"]
        np.testing.assert_allclose(selection.cosines[row, segment, : len(cosines)], cosines, atol=FEATURES)
        valid = np.asarray(selection.valid[row, segment])
        np.testing.assert_array_equal(np.asarray(selection.candidates[row, segment])[valid], top)
        picked.append(np.asarray(selection.targets[row, segment])[valid])
        filled[batch.layout.slot_columns[segment]] = valid
    np.testing.assert_allclose(np.concatenate(picked), vector["expect_latents"], atol=FEATURES)
    np.testing.assert_array_equal(filled[columns], vector["expect_mask"][0])
    np.testing.assert_allclose(logits(vector, result.hidden[row])[columns], vector["expect_logits"][0], atol=FEATURES)
    np.testing.assert_allclose(result.cross_entropy[row], vector["expect_ce"], atol=LOSS)
    np.testing.assert_allclose(result.loss[row], vector["expect_loss"], atol=LOSS)


def stage1(vector: Vector, batch, row: int = 0):
    """Return vision features, losses, selection, and the decoder's gradients of one row's loss."""
    model, params, teacher = Qwen2_5VL(vector.config), vector.params(), vector.params("teacher_weight_seed")

    def loss(decoder):
        result = alignment_loss(
            model, {**params, "decoder": decoder}, teacher, batch, settings(vector), jax.random.key(0)
        )
        return result.loss[row], (result, result.selection)

    gradients, (result, selection) = jax.jit(jax.grad(loss, has_aux=True))(params["decoder"])
    return model.encode_images(params["vision"], batch.images), result, selection, gradients


def stage2(vector: Vector, batch, row: int = 0):
    """Return losses, and the decoder's gradients of one row's loss."""
    model, params = Qwen2_5VL(vector.config), vector.params()

    def loss(decoder):
        result = autonomy_loss(model, {**params, "decoder": decoder}, None, batch, LatentsConfig(), jax.random.key(0))
        return result.loss[row], result

    gradients, result = jax.jit(jax.grad(loss, has_aux=True))(params["decoder"])
    return result, gradients


def check_stage2(vector: Vector, row: int, columns, result) -> None:
    np.testing.assert_allclose(np.asarray(result.hidden[row])[columns], vector["expect_hidden"][0], atol=FEATURES)
    np.testing.assert_allclose(logits(vector, result.hidden[row])[columns], vector["expect_logits"][0], atol=FEATURES)
    np.testing.assert_allclose(result.loss[row], vector["expect_loss"], atol=LOSS)


def decoded(vector: Vector, others: list[Vector] = ()) -> np.ndarray:
    """Return the tokens that are decoded for a file's prompt, in a batch with those of others."""
    meta = vector.meta
    requests = [make_request(each.sample(), meta["max_new_tokens"], meta["latent_size"]) for each in (vector, *others)]
    return np.array(generate(Qwen2_5VL(vector.config), vector.params(), requests, vector.special)[0].tokens)


def test_labels_and_positions_follow_from_the_tokens(request):
    vectors = [read(path) for path in sorted(request.config.getoption("vectors").glob("*.npz"))]
    labelled = [vector for vector in vectors if "labels" in vector.arrays]
    assert labelled
    for vector in labelled:
        np.testing.assert_array_equal(vector.sample().labels, vector["labels"][0], err_msg=vector.name)


def test_stage1(vector):
    batch, (columns,) = lay_out([vector])
    vision, result, selection, gradients = stage1(vector, batch)
    check_stage1(vector, 0, columns, batch, vision, result, selection)
    check_gradients(vector, gradients)


def test_stage2(vector):
    batch, (columns,) = lay_out([vector])
    result, gradients = stage2(vector, batch)
    check_stage2(vector, 0, columns, result)
    check_gradients(vector, gradients)


def test_generate(vector):
    expected = vector["expect_tokens"]
    np.testing.assert_array_equal(decoded(vector)[: len(expected)], expected)


def test_train(vector):
    batch, _ = lay_out([vector])
    check_train(vector, batch, 0)


def check_train(vector: Vector, batch, row: int) -> None:
    """Train on one row of a batch, the others beside it, and compare every step with its file."""
    meta, model, params = vector.meta, Qwen2_5VL(vector.config), vector.params()
    optimizer = optax.adamw(meta["learning_rate"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    state = create_state(params, optimizer, ("decoder",), with_teacher=True, key=jax.random.key(0))
    stage = StageConfig("alignment", batch_size=1)
    latents = dataclasses.replace(settings(vector), tau=meta["ema_decay"])
    step = make_train_step(model, stage, latents, optimizer)
    select_jitted = jax.jit(
        lambda params, teacher, batch: (
            alignment_loss(model, params, teacher, batch, settings(vector), jax.random.key(0)).selection
        )
    )
    own_row = jax.tree.map(lambda array: array[row : row + 1], batch)
    for number, tops in enumerate(json.loads(str(vector["expect_tops"]))):
        selection = select_jitted(state.params, state.teacher, batch)
        for segment, top in enumerate(tops):
            picked = np.asarray(selection.candidates[row, segment])[np.asarray(selection.valid[row, segment])]
            np.testing.assert_array_equal(picked, top)
        state, metrics = step(state, own_row)
        np.testing.assert_allclose(metrics["loss"], vector["expect_losses"][number], atol=TRAIN_LOSS)
        np.testing.assert_allclose(metrics["cross_entropy"], vector["expect_ces"][number], atol=TRAIN_LOSS)
    assert number == meta["steps"] - 1
    for prefix, decoder in (
        ("expect_student.", state.params["decoder"]),
        ("expect_teacher.", state.teacher["decoder"]),
    ):
        for name, value in by_name(decoder, vector).items():
            if prefix + name in vector.arrays:
                np.testing.assert_allclose(value, vector[prefix + name], atol=WEIGHT, err_msg=prefix + name)


@pytest.mark.parametrize("kind", ["stage1", "stage2", "generate", "train"])
def test_files_of_one_kind_in_one_batch(kind, request):
    """Each file has weights and settings of its own: the batch runs under each and that file's row is compared."""
    groups = {}
    for vector in of_kind(request.config.getoption("vectors"), kind):
        groups.setdefault(vector.config, []).append(vector)  # another shape of model is another program
    for group in groups.values():
        batch, columns = lay_out(group)
        for row, vector in enumerate(group):
            if kind == "generate":
                expected = vector["expect_tokens"]
                others = [other for other in group if other is not vector]
                np.testing.assert_array_equal(decoded(vector, others)[: len(expected)], expected)
            elif kind == "stage2":
                result, gradients = stage2(vector, batch, row)
                check_stage2(vector, row, columns[row], result)
                check_gradients(vector, gradients)
            elif kind == "train":
                check_train(vector, batch, row)
            else:
                vision, result, selection, gradients = stage1(vector, batch, row)
                check_stage1(vector, row, columns[row], batch, vision, result, selection)
                check_gradients(vector, gradients)
