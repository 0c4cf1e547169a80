"""Records of components: labels, extremes, files; and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, SiteError, TokenError
from mechjax.decompose import (
    accumulated_resid,
    apply_norm,
    decompose_resid,
    full_decomposition,
    head_results,
    logit_attribution,
    neuron_results,
    project,
)
from tests.decompose.conftest import decoder
from tests.tolerances import TOL


def test_labels__of_everything__are_the_fields_own(serial):
    model, _, acts = serial
    labels = full_decomposition(model, acts).labels
    assert labels[:5] == ("L0.H0", "L0.H1", "L0.H2", "L0.H3", "L1.H0")
    assert labels[8:10] == ("L0.N0", "L0.N1")
    assert labels[-3:] == ("embed", "pos_embed", "bias")
    assert decompose_resid(model, acts, embeds=False).labels == ("attn 0", "mlp 0", "attn 1", "mlp 1")


def test_top__of_an_attribution__names_component_and_place(serial):
    model, _, acts = serial
    found = logit_attribution(model, acts, 3, 5)
    label, value = found.top(1)[0]
    i, a, b, pos = np.unravel_index(np.abs(found.values).argmax(), found.values.shape)
    assert label == f"{found.labels[i]}.batch={a}.batch={b} @ {pos}"
    assert value == pytest.approx(float(found.values[i, a, b, pos]))
    assert len(found.rows()) == found.values.size
    assert found.rows()[0]["component"] == "embed"


def test_top__of_a_stack__names_the_longest_vectors(serial):
    model, _, acts = serial
    stack = decompose_resid(model, acts)
    lengths = np.linalg.norm(stack.values, axis=-1)
    assert stack.top(1)[0][1] == pytest.approx(float(lengths.max()), rel=1e-6)
    assert stack.rows()[0]["values"] == pytest.approx(float(lengths[0, 0, 0, 0]), rel=1e-6)
    assert "Stack" in repr(stack)


def test_record__saved_and_restored__is_the_same(serial, tmp_path):
    model, _, acts = serial
    for record in (head_results(model, acts), logit_attribution(model, acts, 3)):
        again = mj.restore(mj.save(record, tmp_path / type(record).__name__))
        assert again.labels == record.labels
        assert_allclose(again.values, record.values, **TOL["any", "exact"])


def test_component__that_is_not_there__is_refused_with_those_that_are(serial):
    model, _, acts = serial
    assert_allclose(decompose_resid(model, acts)["embed"], acts["embed"], **TOL["any", "exact"])
    with pytest.raises(
        SiteError, match=r"no component `attn1`; there are embed, pos_embed, attn 0.*Did you mean `attn 1`"
    ):
        decompose_resid(model, acts)["attn1"]
    with pytest.raises(SiteError, match=r"no component `L9\.H0`"):
        logit_attribution(model, acts, 3, of="heads")["L9.H0"]


def test_missing_sites__are_named_with_the_call_that_captures_them(serial, prompts):
    model = serial[0]
    acts = mj.capture(model, ["embed", "blocks.0.hook_mlp_out"])(prompts)[1]
    with pytest.raises(
        SiteError,
        match=r"`decompose_resid` reads .*lacks `pos_embed`, `attn_out`, `mlp_out` of layer 1, `resid_post`; it holds "
        r"embed, mlp_out\. Capture all of them: mj\.capture\(model, \['embed', 'pos_embed', 'attn_out', 'mlp_out', "
        r"'resid_post'\]\)\(tokens\)",
    ):
        decompose_resid(model, acts)
    with pytest.raises(SiteError, match=r"`logit_attribution` reads ln_final\.scale"):
        logit_attribution(model, acts, 3)


def test_sites__of_a_part_of_the_layers__serve_what_reads_no_more(serial, prompts):
    model, _, acts = serial
    first = mj.capture(
        model,
        ["embed", "pos_embed", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre"],
    )(prompts)[1]
    assert_allclose(
        decompose_resid(model, first, layer=1).values,
        decompose_resid(model, acts, layer=1).values,
        **TOL["float32", "law"],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, a: decompose_resid(m, a, layer=3), r"layer=3: the model has 2 layers, so 0 to 1 name a layer's input"),
        (lambda m, a: decompose_resid(m, a, mlp_input=True), "mlp_input=True asks for what an MLP reads.*no layer"),
        (lambda m, a: decompose_resid(m, a, mode="mlps"), "mode='mlps': the writers are 'all', 'attn' or 'mlp'"),
        (lambda m, a: project(m, a, jnp.ones(12), of="blocks"), "'blocks': a stream is taken apart into 'layers'"),
        (lambda m, a: accumulated_resid(m, a).gap, "These rows are not parts of one sum"),
        (
            lambda m, a: logit_attribution(m, a, 3, of=decompose_resid(m, a, layer=1)),
            "takes apart what layer 1's attention reads; logits are read from the last stream",
        ),
    ],
)  # fmt: skip
def test_arguments__that_mean_nothing__are_refused(serial, as_a_user, make, message):
    model, _, acts = serial
    with pytest.raises(ArgumentError, match=message):
        make(model, acts)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("attention_only", lambda m, a: decompose_resid(m, a, layer=1, mlp_input=True), "this model is attention only"),
        ("parallel", lambda m, a: accumulated_resid(m, a, incl_mid=True), "nothing stands between attention and MLP"),
        (
            "post_norms", lambda m, a: apply_norm(m, a, decompose_resid(m, a, layer=1)),
            "layer 1's attention, which reads the stream as it is",
        ),
    ],
)  # fmt: skip
def test_models__that_lack_what_is_asked__say_so(prompts, name, make, message):
    from mechjax.decompose import sites

    model = decoder(name)
    with pytest.raises(ArgumentError, match=message):
        make(model, mj.capture(model, sites(model))(prompts)[1])


def test_tokens__that_are_none_or_fit_no_example__are_refused(serial):
    model, _, acts = serial
    with pytest.raises(TokenError, match="`wrong` has the id 23; the model's tokens are 0 to 22"):
        logit_attribution(model, acts, 3, 23)
    with pytest.raises(TokenError, match="`tokens` must be token ids"):
        logit_attribution(model, acts, 3.0)
    with pytest.raises(
        ShapeError, match=r"`tokens` has the shape \(3,\); the stream was recorded at \(2, 2, 5\)"
    ):
        logit_attribution(model, acts, jnp.array([1, 2, 3]))


def test_site__captured_in_part__is_refused(serial, prompts):
    model, _, acts = serial
    part = mj.capture(model, ["z", "resid_post"])(prompts)[1]
    part = type(part)(part.arrays | {"z": part["z"][..., :2, :]}, part.ran, part.sites)
    with pytest.raises(
        ShapeError, match=r"`z` was captured with the sizes \(2, 5\), where the model's weights have \(4, 5\)"
    ):
        head_results(model, part)
    assert neuron_results(model, acts, layer=0).labels == ()
    assert neuron_results(model, acts, layer=0).values.shape == (0, 2, 2, 5, 12)
