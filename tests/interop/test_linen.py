"""Linen: against `capture_intermediates`, a forward edited by Linen's own interceptors, and `jax.grad`."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, SiteError
from mechjax.interop import from_linen
from tests.interop.networks import LAYERS, TOKENS, D, LinenMLP, linen
from tests.tolerances import TOL

LAYOUTS = [{"layout": "loop"}, {"layout": "scan"}, {"layout": "loop", "remat": True}, {"layout": "scan", "remat": True}, {"layout": "jit"}]  # fmt: skip
KEY = jax.random.key(7)


def _ids(how):
    return "-".join(map(str, how.values()))


@pytest.fixture(scope="module")
def by_linen():
    """Every module's output, by Linen's own means, in a loop over blocks."""
    net, variables = linen()
    _, state = net.apply(variables, TOKENS, capture_intermediates=True)
    return state["intermediates"]


def _edited_by_linen(path, change):
    """Logits of the network in a loop, the output at `path` changed by an interceptor."""
    net, variables = linen()

    def intercept(run, args, kwargs, context):
        out = run(*args, **kwargs)
        if context.module.path != path or context.method_name != "__call__":
            return out
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    with nn.intercept_methods(intercept):
        return net.apply(variables, TOKENS)


@pytest.mark.parametrize("how", LAYOUTS, ids=_ids)
def test_from_linen__untransformed__is_the_model(how):
    net, variables = linen(**how)
    subject = from_linen(net, variables)
    assert_array_equal(subject(TOKENS), net.apply(variables, TOKENS))
    assert "mechjax" not in str(jax.make_jaxpr(subject)(TOKENS))
    wrapped, own = (
        jax.make_jaxpr(lambda s: s(TOKENS))(subject),
        jax.make_jaxpr(lambda v: net.apply(v, TOKENS))(variables),
    )
    assert str(wrapped) == str(own)


@pytest.mark.parametrize("how", LAYOUTS, ids=_ids)
def test_from_linen__capture__equals_capture_intermediates(how, by_linen):
    net, variables = linen(**how)
    logits, acts = mj.capture(
        from_linen(net, variables),
        ["blocks.attn.output", "blocks.mlp.Dense_0.output", "blocks.output", "norm.output"],
    )(TOKENS)
    tol = TOL["float32", "layout"]
    assert_allclose(logits, net.apply(variables, TOKENS), **tol)
    assert acts["blocks.output"].shape == (LAYERS, *TOKENS.shape, D)
    for i in range(LAYERS):
        block = by_linen[f"blocks_{i}"]
        assert_allclose(acts["blocks.attn.output"][i], block["attn"]["__call__"][0], **tol)
        assert_allclose(acts["blocks.mlp.Dense_0.output"][i], block["mlp"]["Dense_0"]["__call__"][0], **tol)
        assert_allclose(acts["blocks.output"][i], block["__call__"][0][0], **tol)
    assert_allclose(acts["norm.output"], by_linen["norm"]["__call__"][0], **tol)


def test_from_linen__sites__have_the_same_names_in_every_layout():
    tables = [mj.list_sites(from_linen(*linen(**how)), TOKENS) for how in LAYOUTS]
    for table in tables:
        assert {n: (i.layers, i.shape) for n, i in table.items()} == {
            n: (i.layers, i.shape) for n, i in tables[0].items()
        }
    assert tables[0]["blocks.attn.query.input"].layers == LAYERS
    assert tables[0]["embed.attend.output"].layers is None


@pytest.mark.parametrize("how", LAYOUTS, ids=_ids)
def test_from_linen__edit_of_one_layer__equals_linens_own(how):
    value = jax.random.normal(KEY, (*TOKENS.shape, D))
    edited = mj.intervene(from_linen(*linen(**how)), mj.replace("blocks.attn.output", value, layer=1))
    expected = _edited_by_linen(("blocks_1", "attn"), lambda out: value)
    assert_allclose(edited(TOKENS), expected, **TOL["float32", "layout"])


@pytest.mark.parametrize("how", LAYOUTS[:2], ids=_ids)
def test_from_linen__named_positions__are_addressed(how):
    sites = {"resid_post": ("blocks.output", ("pos", "d_model"))}
    vector = jax.random.normal(KEY, (D,))
    edited = mj.intervene(
        from_linen(*linen(**how), sites=sites), mj.add("resid_post", vector, layer=0, pos=2)
    )
    expected = _edited_by_linen(("blocks_0",), lambda out: out.at[:, 2].add(vector))
    assert_allclose(edited(TOKENS), expected, **TOL["float32", "layout"])


@pytest.mark.parametrize("how", LAYOUTS[:4], ids=_ids)
def test_from_linen__gradient_at_a_site__equals_jax_grad_of_a_perturbed_forward(how):
    def perturbed(delta):
        return (_edited_by_linen(("blocks_1", "mlp"), lambda out: out + delta) ** 2).sum()

    _, grads = mj.value_and_grad_at(from_linen(*linen(**how)), lambda y: (y**2).sum(), ["blocks.mlp.output"])(
        TOKENS
    )
    expected = jax.grad(perturbed)(jnp.zeros((*TOKENS.shape, D)))
    assert_allclose(grads["blocks.mlp.output"][1], expected, **TOL["float32", "gradient"])


@pytest.mark.parametrize("how", LAYOUTS[:2], ids=_ids)
@pytest.mark.slow
def test_from_linen__grad_jit_and_vmap__go_through(how):
    net, variables = linen(**how)
    subject = from_linen(net, variables)
    zeroed = mj.intervene(subject, mj.zero("blocks.mlp.output", layer=2))
    mapped = jax.vmap(lambda t: zeroed(t))(TOKENS)
    assert_allclose(mapped, eqx.filter_jit(zeroed)(TOKENS), **TOL["float32", "layout"])
    grads = eqx.filter_grad(
        lambda s: (mj.intervene(s, mj.zero("blocks.mlp.output", layer=2))(TOKENS) ** 2).sum()
    )(subject)
    params = grads.variables["params"]
    last = params["blocks_2"] if how["layout"] == "loop" else jax.tree.map(lambda x: x[2], params["blocks"])
    first = params["blocks_0"] if how["layout"] == "loop" else jax.tree.map(lambda x: x[0], params["blocks"])
    assert not any(x.any() for x in jax.tree.leaves(last["mlp"]))
    assert all(x.any() for x in jax.tree.leaves(first["mlp"]))


def test_from_linen__new_variables__do_not_recompile():
    net, variables = linen(layout="scan")
    mj.compile_log(clear=True)
    for factor in (1.0, 2.0, 3.0):
        subject = from_linen(net, jax.tree.map(lambda x, f=factor: f * x, variables))
        mj.run(subject, TOKENS, capture="blocks.norm1.output")
    assert len(mj.compile_log()) == 1


class _Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        mlp = LinenMLP(name="mlp")
        return mlp(mlp(x))


class _MethodRemat(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(x)


def test_from_linen__module_called_twice__numbers_its_calls():
    x = jax.random.normal(KEY, (2, D))
    net = _Shared()
    variables = net.init(KEY, x)
    out, acts = mj.capture(
        from_linen(net, variables), ["mlp.call_0.output", "mlp.call_1.input", "mlp.call_1.output"]
    )(x)
    assert_array_equal(acts["mlp.call_0.output"], acts["mlp.call_1.input"])
    assert_array_equal(acts["mlp.call_1.output"], out)
    assert not jnp.array_equal(acts["mlp.call_0.output"], out)


def test_from_linen__method_under_remat__has_each_site_once():
    x = jax.random.normal(KEY, (2, D))
    net = _MethodRemat()
    subject = from_linen(net, net.init(KEY, x))
    assert set(mj.list_sites(subject, x)) == {"input", "Dense_0.input", "Dense_0.output", "output"}


class _Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5)(x, deterministic=deterministic), {"norm": (x**2).sum()}


def test_from_linen__fixed_keywords__reach_every_call():
    x = jnp.ones((2, D))
    rngs = {"dropout": KEY}
    subject = from_linen(_Dropping(), {}, deterministic=False, rngs=rngs)
    (out, aux), acts = mj.capture(subject, ["Dropout_0.output", "output.1.norm"])(x)
    expected = _Dropping().apply({}, x, deterministic=False, rngs=rngs)[0]
    assert_array_equal(out, expected)
    assert_array_equal(acts["Dropout_0.output"], expected)
    assert_array_equal(acts["output.1.norm"], aux["norm"])


def test_from_linen__unknown_path__says_what_there_is():
    subject = from_linen(*linen(layout="scan"))
    with pytest.raises(SiteError, match=r"no site is named `blocks.atn.output`.*`blocks.attn.output`"):
        mj.capture(subject, "blocks.atn.output")(TOKENS)
    renamed = from_linen(*linen(layout="scan"), sites={"z": "blocks.attn.ouput"})
    with pytest.raises(SiteError, match=r"`z` after `blocks.attn.ouput`.*Did you mean `blocks.attn.output`"):
        mj.capture(renamed, "z")(TOKENS)


def test_from_linen__sites_that_contradict__are_refused():
    net, variables = linen(layout="scan")
    with pytest.raises(ArgumentError, match=r"names `blocks.output` twice, `a` and `b`"):
        from_linen(net, variables, sites={"a": "blocks.output", "b": "blocks.output"})
    taken = from_linen(net, variables, sites={"blocks.input": "blocks.output"})
    with pytest.raises(SiteError, match="another activation has that name already"):
        mj.capture(taken, "blocks.input")(TOKENS)


def test_from_linen__wrong_or_bound_module__is_refused(as_a_user):
    net, variables = linen()
    with pytest.raises(ArgumentError, match=r"takes a flax.linen.Module and its variables, got function"):
        from_linen(lambda x: x, variables)
    with pytest.raises(ArgumentError, match=r"bound LinenNet. Unbind it"):
        from_linen(net.bind(variables), variables)
    with pytest.raises(ArgumentError, match="or the path and the names of its last axes"):
        from_linen(net, variables, sites={"z": ("blocks.output", "pos")})


def test_from_linen__handed_to_jax_jit__says_how():
    with pytest.raises(JitError, match=r"equinox.filter_jit"):
        jax.jit(from_linen(*linen()))(TOKENS)
