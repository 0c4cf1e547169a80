"""Models whose layers differ in kind: some have an MLP, others experts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.models import Config, init
from mechjax.models.experts import Experts
from mechjax.models.segments import Segment, segments
from tests.tolerances import TOL

SIZES = {"n_experts": 4, "top_k": 2, "d_expert": 6, "d_shared": 10, "normalized": True}
LAYOUTS = {"dense_first": (2, 3), "every_other": (1, 3), "one_dense": (0, 1, 3)}


_EACH = [pytest.param(name, marks=() if name == "every_other" else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module", params=_EACH)
def mixed(request):
    config = Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=4, n_heads=4, mlp="gated", activation="silu", mlp_bias=False,
        d_mlp=12, experts=Experts(**SIZES, layers=LAYOUTS[request.param]),
    )  # fmt: skip
    model = init(config, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 2 else leaf, model)


def by_hand(model, tokens):
    """Logits and every layer's residual, one layer after the other."""
    config, resid = model.config, model.embed(tokens)
    sequence, seen = model.arrange(tokens.shape[-1]), []
    for layer in range(config.n_layers):
        seen.append(resid)
        block, here = model.of_kind(layer, int(layer in config.expert_layers))
        resid = block(resid, sequence, here, layer, config)[0]
    return model.unembed(resid), jnp.stack([*seen, resid])


@pytest.mark.slow
def test_mixed__scanned_in_segments__equals_one_layer_after_the_other(mixed, tiny_tokens):
    logits, resid = by_hand(mixed, tiny_tokens)
    assert_allclose(mixed(tiny_tokens), logits, **TOL["float32", "layout"])
    for leaf, other in zip(
        jax.tree.leaves(mixed.blocks.moe), jax.tree.leaves(mixed.blocks.attn), strict=False
    ):
        assert leaf.shape[0] == len(mixed.config.expert_layers)
        assert other.shape[0] == mixed.config.n_layers
    assert jnp.abs(resid[-1] - resid[0]).max() > 1e-2


def test_mixed__captures__stack_over_the_layers_that_have_the_site(mixed, tiny_tokens):
    _, resid = by_hand(mixed, tiny_tokens)
    sites = [
        "resid_pre",
        "mlp_out",
        "attn_out",
        "mlp_post",
        "expert_indices",
        "expert_out",
        "shared_out",
        "resid_post",
    ]
    _, acts = mj.capture(mixed, sites)(tiny_tokens)
    have = mixed.config.expert_layers
    assert acts.layers["mlp_post"] == tuple(i for i in range(4) if i not in have)
    for name in ("expert_indices", "expert_out", "shared_out"):
        assert acts.layers[name] == have
    assert_allclose(acts["resid_pre"], resid[:-1], **TOL["float32", "layout"])
    assert_allclose(
        acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"], acts["resid_post"], **TOL["float32", "layout"]
    )
    written = acts["expert_out"].sum(-2) + acts["shared_out"]
    assert_allclose(written, acts["mlp_out"][jnp.array(have)], **TOL["float32", "layout"])
    with pytest.raises(SiteError, match=rf"layer {have[0]} has no site `mlp_post`"):
        mj.capture(mixed, ["mlp_post"], layers=[have[0]])(tiny_tokens)


def test_mixed__resumed__equals_the_whole_run_and_keeps_its_sites(mixed, tiny_tokens):
    logits, resid = by_hand(mixed, tiny_tokens)
    rest = eqx.filter_jit(lambda model, layer, x: mj.resume(model, layer)(x))
    for layer in range(5):
        assert_allclose(rest(mixed, jnp.int32(layer), resid[layer]), logits, **TOL["float32", "layout"])
    _, whole = mj.capture(mixed, ["shared_out"])(tiny_tokens)
    _, acts = mj.capture(mj.resume(mixed, 2), ["shared_out"])(resid[2])
    for row, layer in enumerate(acts.layers["shared_out"]):
        if layer >= 2:
            assert_allclose(acts["shared_out"][row], whole["shared_out"][row], **TOL["float32", "layout"])
        else:
            assert jnp.isnan(acts["shared_out"][row]).all()


@pytest.mark.slow
def test_mixed__gradients__reach_every_weight_and_equal_those_layer_by_layer(mixed, tiny_tokens):
    ours = eqx.filter_grad(lambda model: model(tiny_tokens).var())(mixed)
    theirs = eqx.filter_jit(eqx.filter_grad(lambda model: by_hand(model, tiny_tokens)[0].var()))(mixed)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_allclose(mine, other, **TOL["float32", "gradient"])
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours.blocks.moe.W_in))


def test_mixed__edits_in_some_layers__take_hold(mixed, tiny_tokens):
    have = mixed.config.expert_layers
    logits = mixed(tiny_tokens)
    edited = mj.run(mixed, tiny_tokens, edits=[mj.zero("expert_out", layer=have[0], expert=[0, 1])])
    assert not jnp.isnan(edited).any()
    assert jnp.abs(edited - logits).max() > 1e-3


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((1, 1, 1), [((1,), 3)]),
        ((0, 1, 1, 1), [((0,), 1), ((1,), 3)]),
        ((0, 1) * 6, [((0, 1), 6)]),
        ((0, 0, 1) * 4 + (1,), [((0, 0, 1), 4), ((1,), 1)]),
    ],
)
def test_segments__patterns__are_found_and_cover_every_layer_in_order(kinds, expected):
    found = segments(kinds)
    assert [(segment.kinds, segment.repeats) for segment in found] == expected
    assert sum((segment.kinds * segment.repeats for segment in found), ()) == kinds
    assert found[0].start == 0
    assert isinstance(found[0], Segment)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp": "plain"}, "Experts are gated MLPs, but `mlp` = 'plain'"),
        ({"experts": Experts(**SIZES, layers=(1, 0))}, r"must be layers from 0 to 3 in order"),
        ({"experts": Experts(**SIZES, layers=(4,))}, r"must be layers from 0 to 3 in order"),
    ],
)
def test_config__experts_that_do_not_fit__are_refused(given, message):
    base = {
        "d_vocab": 5,
        "n_ctx": 8,
        "d_model": 8,
        "n_layers": 4,
        "n_heads": 2,
        "mlp": "gated",
        "experts": Experts(**SIZES),
    }
    with pytest.raises(ArgumentError, match=message):
        Config(**base | given)


def test_experts__in_all_layers__are_scanned_with_their_weights():
    config = Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, mlp="gated", experts=Experts(**SIZES)
    )
    model = init(config, key=jax.random.key(0))
    assert model.blocks.mlp is None
    _, acts = mj.capture(model, ["router_scores"])(jnp.arange(6))
    assert_array_equal(acts.layers["router_scores"], (0, 1, 2))
