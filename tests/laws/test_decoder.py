"""The laws on a transformer: its real sites, layers scanned, wrapped in what users wrap models in."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mechjax as mj
from mechjax.base.catalogue import SITES
from mechjax.transform.log import compile_log
from tests.tolerances import TOL

LAW, GRADIENT = TOL["float32", "layout"], TOL["float32", "gradient"]
WRAPPERS = {
    "plain": lambda model: model,
    "jit": lambda model: eqx.filter_jit(model),
    "closure": lambda model: lambda tokens: model(tokens),
    "vmap": lambda model: jax.vmap(model),
    "remat": lambda model: lambda tokens: jax.checkpoint(lambda m, t: m(t))(model, tokens),
    "scan": lambda model: lambda tokens: jax.lax.map(model, tokens[:, None])[:, 0],
}
WATCHED = ["resid_pre", "z", "result", "mlp_post", "resid_post"]
few = settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.fixture(scope="module")
def watched(tiny_model, tiny_tokens):
    return mj.capture(tiny_model, WATCHED)(tiny_tokens)


@pytest.mark.parametrize("wrapper", [w for w in WRAPPERS if w != "scan"])
def test_laws_3_and_5__every_wrapper__same_captures_and_edits(tiny_model, tiny_tokens, watched, wrapper):
    f = WRAPPERS[wrapper](tiny_model)
    logits, acts = mj.capture(f, WATCHED)(tiny_tokens)
    np.testing.assert_allclose(logits, watched[0], **LAW)
    for site in WATCHED:  # `result` is costly: the wish reaches a closure, a jitted and a mapped model
        np.testing.assert_allclose(acts[site], watched[1][site], **LAW)
    value = np.arange(16.0)
    edits = [
        mj.replace("result", value / 9, layer=1, head=2, pos=-1),
        mj.scale("mlp_post", 0.5, layer=[0, 2]),
    ]
    expected = mj.intervene(tiny_model, edits)(tiny_tokens)
    out, acts = mj.capture(mj.intervene(f, edits), ["result"])(tiny_tokens)
    np.testing.assert_allclose(out, expected, **LAW)
    np.testing.assert_allclose(acts["result"][1, :, -1, 2], np.broadcast_to(value / 9, (4, 16)), **LAW)
    assert np.abs(np.asarray(out - logits)).max() > 1e-3


def test_law_5__model_in_a_scan__layer_is_the_models(tiny_model, tiny_tokens):
    edits = [mj.add("resid_post", np.ones(16), layer=1)]
    out = mj.intervene(WRAPPERS["scan"](tiny_model), edits)(tiny_tokens)
    np.testing.assert_allclose(out, mj.intervene(tiny_model, edits)(tiny_tokens), **LAW)


@few
@given(st.data())
def test_law_2__nothing_upstream_or_in_other_examples_changes(tiny_model, tiny_tokens, data):
    names = ["resid_pre", "q", "z", "attn_out", "mlp_pre", "resid_post"]
    before_that = [list(SITES).index(n) for n in names]
    site, layer = data.draw(st.sampled_from(names)), data.draw(st.integers(0, 2))
    pos = data.draw(st.sampled_from([0, 3, -1]))
    _, before = mj.capture(tiny_model, names)(tiny_tokens)
    at = mj.per_example(np.array([pos, pos, 1, 1]))  # two positions, by example
    _, after = mj.capture(mj.intervene(tiny_model, [mj.add(site, 1.0, layer=layer, pos=at)]), names)(
        tiny_tokens
    )
    for other, order in zip(names, before_that, strict=True):
        for i in range(3):
            if (i, order) < (layer, list(SITES).index(site)):
                np.testing.assert_allclose(after[other][i], before[other][i], **LAW)
            first = pos % 6  # causal: positions before the edit do not change either
            np.testing.assert_allclose(after[other][i, :2, :first], before[other][i, :2, :first], **LAW)
    changed = after[site][layer] - before[site][layer]
    np.testing.assert_allclose(changed[2:, 1], np.ones_like(changed[2:, 1]), rtol=1e-5, atol=1e-5)


def test_law_4__order(tiny_model, tiny_tokens):
    e, g = mj.scale("z", 0.5, layer=1), mj.add("z", 1.0, head=2)
    h = mj.zero("mlp_out", layer=0)
    out = mj.intervene(tiny_model, [e, g, h])(tiny_tokens)
    np.testing.assert_allclose(mj.intervene(tiny_model, [h, e, g])(tiny_tokens), out, **LAW)
    np.testing.assert_allclose(mj.intervene(mj.intervene(tiny_model, [e, h]), [g])(tiny_tokens), out, **LAW)
    nested = mj.intervene(lambda t: mj.intervene(tiny_model, [e, h])(t), [g])
    np.testing.assert_allclose(nested(tiny_tokens), out, **LAW)
    assert np.abs(np.asarray(mj.intervene(tiny_model, [g, e, h])(tiny_tokens) - out)).max() > 1e-4


def test_law_5__grad_with_respect_to_an_edit_and_to_weights(tiny_model, tiny_tokens):
    def loss(value, model):
        return (mj.intervene(model, [mj.replace("z", value, layer=1, head=0)])(tiny_tokens) ** 2).mean()

    value = jnp.array([0.5, -0.2, 0.1, 0.3])
    grads, weights = eqx.filter_grad(lambda vm: loss(*vm))((value, tiny_model))
    eps = 1e-2
    numeric = [
        (loss(value.at[i].add(eps), tiny_model) - loss(value.at[i].add(-eps), tiny_model)) / (2 * eps)
        for i in range(4)
    ]
    np.testing.assert_allclose(grads, np.stack(numeric), rtol=2e-2, atol=1e-5)
    # The head is overwritten in layer 1, so its own weights there have no influence.
    np.testing.assert_array_equal(weights.blocks.attn.W_V[1][:, 0], 0)
    assert np.abs(weights.blocks.attn.W_V[0][:, 0]).max() > 0


def test_law_6__resumed__same_sites_for_layers_that_run(tiny_model, tiny_tokens, watched):
    resid = watched[1]["resid_pre"]
    run = eqx.filter_jit(lambda model, start: mj.capture(mj.resume(model, start), WATCHED)(resid[start]))
    for start in range(4 - 1):
        logits, acts = run(tiny_model, jnp.int32(start))
        np.testing.assert_allclose(logits, watched[0], **LAW)
        assert acts.ran["z"].tolist() == [i >= start for i in range(3)]
        for site in WATCHED:
            np.testing.assert_allclose(acts[site][start:], watched[1][site][start:], **LAW)
            assert np.isnan(acts[site][:start]).all()


def test_law_7__resumed_after_the_edit__is_nan(tiny_model, watched):
    resid = watched[1]["resid_pre"][2]
    assert np.isnan(mj.intervene(mj.resume(tiny_model, 2), [mj.zero("z", layer=1)])(resid)).all()
    assert np.isfinite(mj.intervene(mj.resume(tiny_model, 2), [mj.zero("z", layer=2)])(resid)).all()


def test_law_8__100_numbers__one_program(tiny_model, tiny_tokens):
    compile_log(clear=True)
    rng = np.random.default_rng(0)
    outs = []
    for i in range(100):
        vector, layer, head, pos = rng.normal(size=4).astype(np.float32), i % 3, i % 4, -1 - i % 6
        outs.append(
            mj.run(tiny_model, tiny_tokens, edits=[mj.replace("z", vector, layer=layer, head=head, pos=pos)])
        )
    assert len(compile_log()) == 1, compile_log()
    for _ in range(3):
        mj.capture(tiny_model, ["z", "resid_post"])(tiny_tokens)
    assert len(compile_log()) == 2, compile_log()
    assert "Decoder" in str(compile_log()[0]) and "replace z" in str(compile_log()[0])


@pytest.mark.slow
def test_gradients__every_site_at_once__equal_perturbations(tiny_model, tiny_tokens):
    sites = ["embed", "resid_pre", "q", "pattern", "z", "result", "mlp_post", "ln_final.normalized"]
    metric = mj.metrics.logit_diff(3, 4)
    value, grads = mj.value_and_grad_at(tiny_model, metric, sites)(tiny_tokens)
    np.testing.assert_allclose(value, metric(tiny_model(tiny_tokens)), **LAW)

    def perturbed(eps):
        edits = [mj.add(s, e, per_layer=SITES[s].layered) for s, e in eps.items()]
        return metric(mj.intervene(tiny_model, edits)(tiny_tokens)).sum()

    expected = jax.grad(perturbed)({s: jnp.zeros_like(grads[s]) for s in sites})
    for site in sites:
        np.testing.assert_allclose(grads[site], expected[site], **GRADIENT, err_msg=site)
