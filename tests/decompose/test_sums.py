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
    expert_results,
    full_decomposition,
    head_results,
    logit_attribution,
    neuron_results,
    project,
    sites,
)
from tests.decompose.conftest import decoder
from tests.tolerances import TOL

CLOSE = TOL["float32", "layout"]
SUM = TOL["float32", "decomposition"]["rtol"]
READERS = [{}, {"layer": 0}, {"layer": 1}, {"layer": 0, "mlp_input": True}, {"layer": 1, "mlp_input": True}]


def _readable(model, reader) -> bool:
    return not reader.get("mlp_input") or model.config.mlp != "none"


def _has_neurons(model) -> bool:
    """Whether neurons can be told from what gates them."""
    return model.config.experts is None or not model.config.experts.shared_gate


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_components__of_any_reader__sum_to_what_it_reads(run, reader):
    model, _, acts = run
    if not _readable(model, reader):
        with pytest.raises(ArgumentError, match="this model is attention only"):
            decompose_resid(model, acts, **reader)
        return
    stacks = [
        decompose_resid(model, acts, **reader),
        full_decomposition(model, acts, neurons=False, **reader),
    ]
    stacks += [full_decomposition(model, acts, **reader)] if _has_neurons(model) else []
    for stack in stacks:
        assert_allclose(stack.values.sum(0), stack.total, **CLOSE)
        assert float(stack.error) < SUM


def test_units__of_a_layer__sum_with_its_bias_to_what_it_wrote(run):
    model, _, acts = run
    heads, before = head_results(model, acts), decompose_resid(model, acts)
    bias = full_decomposition(model, acts, neurons=False)["bias"]
    attn = sum(before[f"attn {i}"] for i in range(2))
    assert_allclose(heads.values.sum(0) + bias, attn, **CLOSE)
    if model.config.mlp == "none" or not _has_neurons(model):
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
    if model.config.norms == "none":
        with pytest.raises(ArgumentError, match=r"reads the stream as it is .* This model has no norms"):
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
    assert float(normed.error) < SUM


@pytest.mark.parametrize("of", ["layers", "everything"])
def test_logit_attribution__of_all_components__is_the_models_logit_difference(run, of):
    model, logits, acts = run
    if of == "everything" and not _has_neurons(model):
        return
    found = logit_attribution(model, acts, 3, 17, of=of)
    if (cap := model.config.final_softcap) is not None:  # logits are before it
        logits = cap * jnp.arctanh(logits / cap)
    real = logits[..., 3] - logits[..., 17]
    assert_allclose(found.values.sum(0) + found.bias, real, **TOL["float32", "attribution"])
    assert_allclose(found.total, real, **TOL["float32", "attribution"])
    assert float(found.error) < SUM


def test_logit_attribution__of_every_next_token__is_its_logit(run, prompts):
    model, logits, acts = run
    following = jnp.roll(prompts.tokens, -1, -1)
    found = logit_attribution(model, acts, following)
    real = jnp.take_along_axis(logits, following[..., None], -1)[..., 0]
    if (cap := model.config.final_softcap) is not None:
        real = cap * jnp.arctanh(real / cap)
    assert_allclose(found.values.sum(0) + found.bias, real, **TOL["float32", "attribution"])


@pytest.mark.parametrize("of", ["layers", "heads", "neurons", "everything"])
def test_project__without_vectors__is_the_stacks_inner_product(run, of):
    model, _, acts = run
    if of in ("neurons", "everything") and not _has_neurons(model):
        return
    makes = {"layers": decompose_resid, "heads": head_results, "neurons": neuron_results}
    stack = makes.get(of, full_decomposition)(model, acts)
    everywhere = jax.random.normal(jax.random.key(2), stack.total.shape)
    for onto in (everywhere[0, 0, 0], everywhere):
        ours = project(model, acts, onto, of=of)
        assert ours.labels == stack.labels
        size = jnp.abs(stack.values * onto).sum(-1)  # of what is added up: sums round in proportion to it
        assert_allclose(ours.values / size, (stack.values * onto).sum(-1) / size, **TOL["float32", "law"])
        assert_allclose(stack.project(onto).values / size, ours.values / size, **TOL["float32", "law"])
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


def test_experts__of_a_layer__sum_to_what_it_wrote(routed):
    model, _, acts = routed
    experts, layers = expert_results(model, acts), decompose_resid(model, acts)
    last = model.config.expert_layers[-1]
    mine = [label for label in experts.labels if label.startswith(f"L{last}.")]
    has_shared = bool(model.config.experts.d_shared)
    assert mine == [f"L{last}.E{e}" for e in range(4)] + [f"L{last}.shared"] * has_shared
    bias = model.blocks.ln2_post.b[last] if model.blocks.ln2_post is not None else 0.0
    wrote = sum(experts[label] for label in mine) + model.config.residual_scale * bias
    assert_allclose(wrote, layers[f"mlp {last}"], **CLOSE)
    onto = jax.random.normal(jax.random.key(2), (12,))
    assert_allclose(
        project(model, acts, onto, of="experts").values,
        experts.project(onto).values,
        **TOL["float32", "projection"],
    )
    wrote_at_all = sum(experts[label].any(-1).astype(int) for label in mine[:4])
    assert (wrote_at_all == 2).all()  # each token goes to two


def test_neurons__of_an_expert__sum_to_what_it_wrote(routed):
    model, _, acts = routed
    if model.config.experts.shared_gate:
        with pytest.raises(
            ArgumentError, match="the gate of this model's shared experts lets through is no site"
        ):
            neuron_results(model, acts)
        return
    if model.blocks.ln2_post is not None or model.blocks.moe.b_out is not None:
        return  # what a norm or a bias adds is no neuron's: the sums of all components have it
    neurons, experts = neuron_results(model, acts), expert_results(model, acts)
    for label in experts.labels:
        of_it = [i for i, name in enumerate(neurons.labels) if name.startswith(f"{label}.N")]
        assert_allclose(neurons.values[jnp.array(of_it)].sum(0), experts[label], **CLOSE)


def test_sites__without_neurons__send_no_token_through_every_expert(routed):
    names = sites(routed[0], neurons=False)
    assert not {"expert_post", "expert_out", "mlp_post"} & set(names)
    assert {"mlp_out", "z"} <= set(names)


def test_experts__where_there_are_none__are_refused(serial):
    model, _, acts = serial
    with pytest.raises(ArgumentError, match="`expert_results` asks for experts; this model has none"):
        expert_results(model, acts)


def test_under_jit__the_same_numbers(serial):
    model, _, acts = serial
    jitted = jax.jit(lambda acts: logit_attribution(model, acts, 3, 5, of="everything").values)
    assert_allclose(jitted(acts), logit_attribution(model, acts, 3, 5, of="everything").values, **CLOSE)
