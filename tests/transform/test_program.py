"""What the compiled programs hold and do not hold."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import JitError
from mechjax.models import Config, init
from mechjax.transform import context
from mechjax.transform.log import compile_log


@pytest.fixture(scope="module")
def deep():
    """48 layers, wide enough that its weights are recognised in a program."""
    config = Config(
        d_vocab=40, n_ctx=8, d_model=24, n_layers=48, n_heads=2, n_kv_heads=2, d_head=12, d_mlp=32
    )
    return init(config, key=jax.random.key(0))


def program(fn, *args):
    return eqx.filter_jit(fn).lower(*args).compile().compiled.as_text()


def test_capture__one_layer_of_48__leaves_no_buffer_of_all(deep):
    tokens = jnp.zeros((3, 5), jnp.int32)
    buffer = re.compile(r"f32\[48,3,5,24\]")
    one = program(lambda m, t: mj.capture(m, "resid_post", layers=[7])(t)[1]["resid_post"], deep, tokens)
    every = program(lambda m, t: mj.capture(m, "resid_post")(t)[1]["resid_post"], deep, tokens)
    assert buffer.search(every)
    assert not buffer.search(one)
    assert "f32[1,3,5,24]" in one


def test_capture__one_position__buffer_of_that_size(deep):
    text = program(
        lambda m, t: mj.capture(m, "resid_post", pos=-1)(t)[1]["resid_post"],
        deep,
        jnp.zeros((3, 5), jnp.int32),
    )
    assert not re.search(r"f32\[48,3,5,24\]", text) and "f32[48,3,24]" in text


@pytest.mark.parametrize(
    "wrap", [lambda m: m, jax.vmap, lambda m: lambda t: m(t)], ids=["model", "vmap", "closure"]
)
def test_parameters__are_never_constants(tiny_model, tiny_tokens, wrap, monkeypatch):
    """The program that an eager call compiles takes weights as arguments, closed over or not."""
    from mechjax.transform import transforms

    texts = []
    evaluated = transforms._evaluated

    def spied(*args):
        texts.append(evaluated.lower(*args).as_text())
        return evaluated(*args)

    monkeypatch.setattr(transforms, "_evaluated", spied)
    mj.capture(mj.intervene(wrap(tiny_model), [mj.add("z", np.ones(4), layer=1)]), "z")(tiny_tokens)
    arguments, body = texts[-1].split("{", 2)[2].split(") ->", 1)
    constants = re.findall(r"dense<([^>]*)> : tensor<(\d+(?:x\d+)+)xf32>", body)
    assert "tensor<50x16xf32>" in arguments
    assert [shape for value, shape in constants if len(value) > 20] == []  # only splats, such as zeros


@pytest.mark.parametrize("job", ["forward", "capture", "sweep"])
def test_program__three_times_the_layers__is_as_long(job):
    """Compile time does not grow with depth, as far as that can be told without a clock."""
    tokens = jnp.zeros((2, 5), jnp.int32)
    metric = mj.metrics.logit_diff(1, 2)
    jobs = {
        "forward": lambda m, t: m(t),
        "capture": lambda m, t: mj.capture(m, ["z", "resid_post"])(t)[1]["z"],
        "sweep": lambda m, t: (
            mj.patching.activation_patch(m, t, t, metric, site="z", over=("layer", "head")).scores
        ),
    }

    def length(n_layers):
        config = Config(
            d_vocab=40, n_ctx=8, d_model=24, n_layers=n_layers, n_heads=2, n_kv_heads=2, d_head=12, d_mlp=32
        )
        shapes = eqx.filter_eval_shape(init, config, key=jax.random.key(0))
        model = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return eqx.filter_jit(jobs[job]).lower(model, tokens).as_text().count("\n")

    assert length(2) == length(6)


def test_jit__of_a_transformed_model__is_refused_with_the_right_spelling(tiny_model, tiny_tokens):
    with pytest.raises(JitError, match=r"equinox.filter_jit"):
        jax.jit(mj.capture(tiny_model, "z"))(tiny_tokens)
    with pytest.raises(JitError, match=r"equinox.filter_jit"):
        jax.jit(tiny_model)(tiny_tokens)


def test_costly_site__after_it_was_asked_for__no_stale_program(tiny_model, tiny_tokens):
    jitted = eqx.filter_jit(tiny_model)
    plain = jitted(tiny_tokens)
    logits, acts = mj.capture(jitted, "result")(tiny_tokens)
    assert acts["result"].shape == (3, 4, 6, 4, 16)
    assert not context.tracing()
    np.testing.assert_array_equal(jitted(tiny_tokens), plain)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)


def test_model__traced_under_precision_context__is_traced_again(tiny_tokens):
    seen = []

    def f(x):
        seen.append(1)
        return mj.site(x @ x.T, "h")

    x = jnp.ones((3, 3))
    mj.capture(f, "h")(x)
    mj.capture(f, "h")(x)
    assert len(seen) == 1
    with jax.default_matmul_precision("float32"):
        mj.capture(f, "h")(x)
    assert len(seen) == 2  # a stale trace would have kept the other precision


def test_compile_log__reasons():
    compile_log(clear=True)

    def tower(x):
        return mj.site(mj.site(x * 2, "a") + 1, "b")

    mj.capture(tower, "a")(jnp.ones(2))
    mj.capture(tower, "a")(jnp.zeros(2))
    mj.capture(tower, "a")(jnp.ones(3))
    mj.capture(tower, "b")(jnp.ones(2))
    mj.run(tower, jnp.ones(2), edits=mj.zero("a"))
    assert [entry.reason for entry in compile_log()] == [
        "new function",
        "new shape",
        "new sites",
        "new edits",
    ]
    assert str(compile_log()[1]) == "new shape: tower [a] on float32[3]"
    assert len(repr(compile_log()).splitlines()) == 4


def test_apply__fresh_lambdas__warn_once_with_the_fix():
    def tower(x):
        return mj.site(x * 2, "a")

    def run(i):
        return mj.run(tower, jnp.ones(2), edits=mj.apply("a", lambda x, info: x + i))

    for i in range(3):
        run(i)
    with pytest.warns(UserWarning, match=r"pass what changes as data: apply\(site, fn, \*data\)"):
        run(3)
    run(4)  # once is enough

    def plus(x, info, n):
        return x + n

    compile_log(clear=True)
    for i in range(4):
        np.testing.assert_array_equal(mj.run(tower, jnp.ones(2), edits=mj.apply("a", plus, float(i))), 2 + i)
    assert len(compile_log()) == 1


def test_apply__costly_function__runs_under_a_branch(deep):
    def dictionary(x, info, W):
        return jnp.maximum(x @ W, 0) @ W.T

    W = jnp.ones((24, 500))
    edits = [mj.apply("resid_post", dictionary, W, layer=3)]
    text = program(lambda m, e, t: mj.intervene(m, e)(t), deep, edits, jnp.zeros((3, 5), jnp.int32))
    assert "conditional" in text
