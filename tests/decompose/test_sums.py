"""What components write sums to the stream, through every norm, in every shape of model; and to its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.decompose import (
    accumulated_resid,
    apply_norm,
    decompose_resid,
    full_decomposition,
    head_results,
    logit_attribution,
    neuron_results,
    project,
    sites,
)
from mechjax.models import Config, init
from mechjax.models.experts import Experts
from tests.decompose.conftest import decoder
from tests.tolerances import TOL

CLOSE = TOL["float32", "layout"]
READERS = [{}, {"layer": 0}, {"layer": 1}, {"layer": 0, "mlp_input": True}, {"layer": 1, "mlp_input": True}]


def _readable(model, reader) -> bool:
    return not reader.get("mlp_input") or model.config.mlp != "none"


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_components__of_any_reader__sum_to_what_it_reads(run, reader):
    model, _, acts = run
    if not _readable(model, reader):
        with pytest.raises(ArgumentError, match="this model is attention only"):
            decompose_resid(model, acts, **reader)
        return
    for stack in (
        decompose_resid(model, acts, **reader),
        full_decomposition(model, acts, **reader),
        full_decomposition(model, acts, neurons=False, **reader),
    ):
        assert_allclose(stack.values.sum(0), stack.total, **CLOSE)
        assert float(stack.error) < 1e-5


def test_units__of_a_layer__sum_with_its_bias_to_what_it_wrote(run):
    model, _, acts = run
    heads, before = head_results(model, acts), decompose_resid(model, acts)
    bias = full_decomposition(model, acts, neurons=False)["bias"]
    attn = sum(before[f"attn {i}"] for i in range(2))
    assert_allclose(heads.values.sum(0) + bias, attn, **CLOSE)
    if model.config.mlp == "none":
        return
    bias = full_decomposition(model, acts)["bias"] - bias
    mlp = sum(before[f"mlp {i}"] for i in range(2))
    assert_allclose(neuron_results(model, acts).values.sum(0) + bias, mlp, **CLOSE)


def test_accumulated_resid__of_any_model__grows_by_what_was_written(run):
    model, _, acts = run
    streams, parts = accumulated_resid(model, acts), decompose_resid(model, acts)
    assert streams.labels == ("resid_pre 0", "resid_pre 1", "resid_post 1")
    written = [
        parts[f"attn {i}"] + (parts[f"mlp {i}"] if f"mlp {i}" in parts.labels else 0.0) for i in range(2)
    ]
    assert_allclose(jnp.diff(streams.values, axis=0), jnp.stack(written), **CLOSE)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_apply_norm__of_all_components__is_what_the_norm_gave_less_its_bias(run, prompts, reader):
    model, _, acts = run
    if not _readable(model, reader):
        with pytest.raises(ArgumentError, match="this model is attention only"):
            apply_norm(model, acts, decompose_resid(model, acts, **reader))
        return
    if reader and model.config.norms == "post":
        with pytest.raises(ArgumentError, match="reads the stream as it is"):
            apply_norm(model, acts, decompose_resid(model, acts, **reader))
        return
    name = "ln_final" if not reader else "ln2" if reader.get("mlp_input") else "ln1"
    name = "ln1" if name == "ln2" and model.config.residual == "parallel_shared" else name
    gave = mj.capture(model, f"{name}.normalized")(prompts)[1][f"{name}.normalized"]
    norm = model.ln_final if not reader else getattr(model.blocks, name)
    bias = 0.0 if norm.b is None else norm.b
    if reader:
        gave, bias = gave[reader["layer"]], 0.0 if norm.b is None else norm.b[reader["layer"]]
    normed = apply_norm(model, acts, decompose_resid(model, acts, **reader))
    assert_allclose(normed.values.sum(0) + bias, gave, **CLOSE)
    assert float(normed.error) < 1e-5


@pytest.mark.parametrize("of", ["layers", "everything"])
def test_logit_attribution__of_all_components__is_the_models_logit_difference(run, of):
    model, logits, acts = run
    found = logit_attribution(model, acts, 3, 17, of=of)
    if (cap := model.config.final_softcap) is not None:  # logits are before it
        logits = cap * jnp.arctanh(logits / cap)
    real = logits[..., 3] - logits[..., 17]
    assert_allclose(found.values.sum(0) + found.bias, real, rtol=1e-4, atol=1e-4)
    assert_allclose(found.total, real, rtol=1e-4, atol=1e-4)
    assert float(found.error) < 1e-5


def test_logit_attribution__of_every_next_token__is_its_logit(run, prompts):
    model, logits, acts = run
    following = jnp.roll(prompts.tokens, -1, -1)
    found = logit_attribution(model, acts, following)
    real = jnp.take_along_axis(logits, following[..., None], -1)[..., 0]
    if (cap := model.config.final_softcap) is not None:
        real = cap * jnp.arctanh(real / cap)
    assert_allclose(found.values.sum(0) + found.bias, real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", ["layers", "heads", "neurons", "everything"])
def test_project__without_vectors__is_the_stacks_inner_product(run, of):
    model, _, acts = run
    makes = {"layers": decompose_resid, "heads": head_results, "neurons": neuron_results}
    stack = makes.get(of, full_decomposition)(model, acts)
    everywhere = jax.random.normal(jax.random.key(2), stack.total.shape)
    for onto in (everywhere[0, 0, 0], everywhere):
        ours = project(model, acts, onto, of=of)
        assert ours.labels == stack.labels
        assert_allclose(ours.values, (stack.values * onto).sum(-1), rtol=1e-5, atol=3e-5)
        assert_allclose(stack.project(onto).values, ours.values, rtol=1e-5, atol=3e-5)
        assert_allclose(ours.total, (stack.total * onto).sum(-1), **CLOSE)


def test_heads__from_z__are_the_costly_site(serial, prompts):
    model, _, acts = serial
    result = mj.capture(model, "result")(prompts)[1]["result"]
    heads = head_results(model, acts).values.reshape(2, 4, *result.shape[1:4], 12)
    assert_allclose(heads, jnp.moveaxis(result, -2, 1), **CLOSE)


def test_one_position__captured_alone__gives_that_positions_rows(serial, prompts):
    model, _, acts = serial
    at_end = mj.capture(model, sites(model), pos=-1)(prompts)[1]
    whole, alone = full_decomposition(model, acts), full_decomposition(model, at_end)
    assert alone.place == ("batch", "batch")
    assert_allclose(alone.values, whole.values[..., -1, :], **CLOSE)
    right, wrong = jnp.array([[1, 2], [3, 4]]), jnp.array([[5, 6], [7, 8]])
    ours = logit_attribution(model, at_end, right, wrong)
    assert_allclose(ours.values, logit_attribution(model, acts, right, wrong).values[..., -1], **CLOSE)


def test_batch_axes__none__change_nothing(serial, prompts):
    model, _, acts = serial
    single = mj.capture(model, sites(model))(prompts.tokens[0, 0])[1]
    assert_allclose(
        full_decomposition(model, single).values, full_decomposition(model, acts).values[:, 0, 0], **CLOSE
    )
    ours = logit_attribution(model, single, 3, of="heads")
    assert ours.place == ("pos",)
    assert_allclose(ours.values, logit_attribution(model, acts, 3, of="heads").values[:, 0, 0], **CLOSE)


def test_edit__at_a_stream__is_the_gap(serial, prompts):
    model = serial[0]
    edited = mj.intervene(model, mj.add("resid_pre", jnp.ones(12), layer=1))
    parts = decompose_resid(model, mj.capture(edited, sites(model))(prompts)[1])
    assert_allclose(parts.gap, jnp.ones_like(parts.gap), **CLOSE)
    assert parts.with_remainder().labels[-1] == "remainder"
    assert_allclose(parts.with_remainder().values.sum(0), parts.total, **CLOSE)


def test_bfloat16__model__sums_to_its_precision(prompts):
    model = decoder("rms", jnp.bfloat16)
    acts = mj.capture(model, sites(model))(prompts)[1]
    for stack in (decompose_resid(model, acts), full_decomposition(model, acts)):
        assert float(stack.error) < TOL["bfloat16", "parity"]["rtol"]
    assert logit_attribution(model, acts, 3, of="neurons").values.dtype == np.float32


@pytest.mark.parametrize("layers", [None, (1,)])
def test_experts__in_all_or_some_layers__are_taken_apart_into_layers_and_heads(prompts, layers):
    experts = Experts(n_experts=3, top_k=2, d_expert=5, layers=layers)
    config = Config(d_vocab=23, n_ctx=8, d_model=12, n_layers=2, n_heads=4, mlp="gated", experts=experts)
    model = init(config, key=jax.random.key(0))
    acts = mj.capture(model, sites(model))(prompts)[1]
    assert float(decompose_resid(model, acts).error) < 1e-5
    assert float(full_decomposition(model, acts, neurons=False).error) < 1e-5
    with pytest.raises(
        ArgumentError, match="`neuron_results` asks for neurons, which in this model belong to experts"
    ):
        neuron_results(model, acts)


def test_under_jit__the_same_numbers(serial):
    model, _, acts = serial
    jitted = jax.jit(lambda acts: logit_attribution(model, acts, 3, 5, of="everything").values)
    assert_allclose(jitted(acts), logit_attribution(model, acts, 3, 5, of="everything").values, **CLOSE)
