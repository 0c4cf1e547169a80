"""PyTorch modules as subjects: against torch's own forward, hooks and autograd."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import (
    ArgumentError,
    JitError,
    MissingExtraError,
    ShapeError,
    SiteError,
    UnsupportedModelError,
)
from mechjax.interop import from_torch
from mechjax.interop.pytorch.operations import OPERATIONS
from tests.interop.pytorch.networks import HIDDEN, LAYERS, POS, VOCAB, D, Holding, inside, net, tokens, torch
from tests.tolerances import TOL

TOKENS = tokens()


@pytest.fixture(scope="module")
def subject():
    return from_torch(net(), TOKENS)


def _torch(module, *args, **kwargs):
    with torch.no_grad():
        return module(*args, **kwargs)


def test_from_torch__one_export__serves_other_batches_and_lengths(subject):
    module = net()
    for batch, pos in ((2, POS), (1, 7), (5, 1)):
        x = tokens(batch, pos)
        out = subject(x.numpy())
        expected = _torch(module, x)
        assert set(out) == {"logits", "last", "nothing"} and out["nothing"] is None
        assert_allclose(out["logits"], expected.logits, **TOL["float32", "parity"])
        assert_allclose(out["last"][0], expected.last[0], **TOL["float32", "parity"])


def test_from_torch__sites__are_named_after_modules(subject):
    sites = mj.list_sites(subject, TOKENS.numpy())
    assert {
        "input", "embed.input", "embed.output", "blocks.input", "blocks.norm.output", "blocks.mlp.up.output",
        "blocks.output", "blocks.output.1", "unembed.output", "output.logits", "output.last.0",
    } <= set(sites)  # fmt: skip
    assert sites["blocks.mlp.up.output"].layers == LAYERS
    assert sites["blocks.mlp.up.output"].shape == (2, POS, HIDDEN)
    assert jnp.issubdtype(sites["embed.input"].dtype, jnp.integer)


def _hooked(module, path, change):
    """The logits with `change(out)` in place of a submodule's output."""
    handle = module.get_submodule(path).register_forward_hook(lambda _, args, out: change(out))
    try:
        return module(TOKENS).logits
    finally:
        handle.remove()


def test_from_torch__captures_edits_and_gradients__equal_hooks_and_autograd(subject):
    module, seen = net(), []
    logits = _hooked(module, "blocks.1.mlp", lambda out: seen.append(out) or out)
    (seen,) = seen
    out, acts = mj.capture(subject, "blocks.mlp.output")(TOKENS.numpy())
    assert_allclose(acts["blocks.mlp.output"][1], seen.detach(), **TOL["float32", "parity"])
    assert not np.allclose(
        acts["blocks.mlp.output"][0], seen.detach(), atol=1e-2
    )  # another layer is told apart

    (expected,) = torch.autograd.grad((logits**2).sum(), seen)
    _, grads = mj.value_and_grad_at(subject, lambda y: (y["logits"] ** 2).sum(), "blocks.mlp.output")(
        TOKENS.numpy()
    )
    assert_allclose(grads["blocks.mlp.output"][1], expected, **TOL["float32", "gradient"])

    edited = mj.intervene(subject, mj.scale("blocks.mlp.output", 3.0, layer=1))(TOKENS.numpy())
    tripled = _hooked(module, "blocks.1.mlp", lambda out: 3 * out).detach()
    assert_allclose(edited["logits"], tripled, **TOL["float32", "parity"])
    assert np.abs(tripled.numpy() - out["logits"]).max() > 0.1


def test_from_torch__gradients_where_the_metric_does_not_look__are_zeros_of_autograd(subject):
    module, outs = net(), []
    for block in module.blocks:  # a copy, as the block itself uses what it returns beside the stream
        block.register_forward_hook(lambda _, args, out: outs.append(out[1].clone()) or (out[0], outs[-1]))
    last = module(TOKENS).last[0]
    expected = torch.autograd.grad((last**2).sum(), outs, allow_unused=True)
    assert [g is None for g in expected] == [True, True, False]  # only the last block's is read
    both = ["blocks.output.1", "output.logits"]
    _, grads = mj.value_and_grad_at(subject, lambda y: (y["last"][0] ** 2).sum(), both)(TOKENS.numpy())
    assert_allclose(grads["blocks.output.1"][2], expected[2], **TOL["float32", "gradient"])
    assert_array_equal(grads["blocks.output.1"][:2], jnp.zeros((2, 2, POS, D)))
    assert_array_equal(grads["output.logits"], jnp.zeros((2, POS, VOCAB)))
    assert grads.ran["blocks.output.1"].all()


def test_from_torch__edits_under_vmap__are_a_sweep(subject):
    value = jnp.asarray(np.random.default_rng(0).normal(size=D), jnp.float32)
    run = lambda layer: mj.intervene(subject, mj.replace("blocks.mlp.output", value, layer=layer))(
        TOKENS.numpy()
    )
    swept = eqx.filter_jit(jax.vmap(run))(jnp.arange(LAYERS))["logits"]
    module = net()
    for layer in range(LAYERS):
        expected = _hooked(
            module, f"blocks.{layer}.mlp", lambda out: torch.tensor(np.array(value)).expand(out.shape)
        )
        assert_allclose(swept[layer], expected.detach(), **TOL["float32", "parity"])


def test_from_torch__parameters__are_leaves_with_gradients_and_tied_once(subject):
    assert "embed.weight" in subject.parameters and "unembed.weight" not in subject.parameters
    loss = lambda s: (s(TOKENS.numpy())["logits"] ** 2).sum()
    grads = eqx.filter_jit(eqx.filter_grad(loss))(subject)
    module = net()
    (module(TOKENS).logits ** 2).sum().backward()
    for name, parameter in module.named_parameters():
        assert_allclose(grads.parameters[name], parameter.grad, **TOL["float32", "gradient"])


def test_from_torch__jitted__is_traced_once_and_asks_for_all_precision(subject, caplog):
    text = jax.jit(lambda f, x: f(x)["logits"]).lower(subject, TOKENS.numpy()).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST, HIGHEST" in line for line in dots)
    assert "custom_call" not in text and "callback" not in text
    with pytest.raises(JitError, match="would bake them in"):
        jax.jit(subject)(TOKENS.numpy())
    subject(TOKENS.numpy())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        subject(TOKENS.numpy())
    assert not caplog.records


def test_from_torch__a_dictionary__may_leave_out_what_is_no_array():
    module = net()
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    subject = from_torch(
        module, {"mask": mask, "tokens": TOKENS, "double": True}, output="logits", dynamic=False
    )
    expected = _torch(module, TOKENS, mask, double=True).logits
    for out in (
        subject(TOKENS.numpy(), mask.numpy()),
        subject(tokens=TOKENS.numpy(), mask=mask.numpy()),
        subject(TOKENS.numpy(), mask=mask.numpy(), double=True),
        mj.run(subject, TOKENS.numpy(), mask=mask.numpy()),
    ):
        assert_allclose(out, expected, **TOL["float32", "parity"])
    with pytest.raises(ArgumentError, match=r"`double` was True in the example"):
        subject(TOKENS.numpy(), mask.numpy(), double=False)
    with pytest.raises(ArgumentError, match=r"lacks `mask`"):
        subject(TOKENS.numpy())
    with pytest.raises(ArgumentError, match=r"`maks` was not in the example.*Did you mean `mask`"):
        subject(TOKENS.numpy(), maks=mask.numpy())
    with pytest.raises(ArgumentError, match=r"`tokens` is given twice"):
        subject(TOKENS.numpy(), tokens=TOKENS.numpy())
    with pytest.raises(ArgumentError, match=r"has 4 arguments"):
        subject(1, 2, 3, 4)
    with pytest.raises(ShapeError, match=r"`mask` is int32, but was float32"):
        subject(TOKENS.numpy(), mask.numpy().astype(np.int32))
    with pytest.raises(ShapeError, match=r"`tokens` has 1 axes, shape \(4,\)"):
        subject(TOKENS.numpy()[0], mask.numpy())
    with pytest.raises(ShapeError, match=r"axis 1 of `mask` is 3, but the exported graph holds for 4 only"):
        subject(TOKENS.numpy()[:, :3], mask.numpy()[:, :3])
    with pytest.raises(ArgumentError, match=r"`tokens` is a Tensor; a subject takes NumPy or JAX"):
        subject(TOKENS, mask.numpy())
    with pytest.raises(ArgumentError, match=r"whole numbers past int32"):
        subject(TOKENS.numpy() + 2**40, mask.numpy())
    with pytest.raises(ArgumentError, match=r"are built as"):
        subject((TOKENS.numpy(), TOKENS.numpy()), mask.numpy())


def test_from_torch__sizes_that_the_module_branches_on__are_named():
    module = Holding(lambda x: x + (2 if x.shape[0] == 1 else 3)).eval()
    subject = from_torch(module, torch.zeros(3, 4))
    assert_array_equal(subject(np.zeros((5, 2), np.float32)), np.full((5, 2), 3.0))
    with pytest.raises(
        ShapeError, match=r"does not hold for axis 0 of `x` = 1.*unless Ne\(x.shape\[0\], 1\)"
    ):
        subject(np.zeros((1, 2), np.float32))
    twins = from_torch(Pair().eval(), (torch.zeros(3, 4), torch.ones(3, 4)))
    assert twins(np.zeros((2, 5), np.float32), np.ones((2, 5), np.float32)).shape == (2, 5)
    with pytest.raises(ShapeError, match=r"axis 1 of `y` is 4, where 5 would go"):
        twins(np.zeros((2, 5), np.float32), np.ones((2, 4), np.float32))


class Pair(torch.nn.Module):
    def forward(self, x, y):
        return torch.cat([x[None], y[None]]).sum(0)


def test_from_torch__gradients_that_torch_stops__are_stopped():
    linear = torch.nn.Linear(D, D)

    def stops(inner, x):
        with torch.no_grad():
            y = inner(x)
        return y * inner(x.detach()) + x

    module = Holding(stops, linear).eval()
    x = torch.randn(2, D, requires_grad=True)
    subject = from_torch(module, x, dynamic=False)
    grads = eqx.filter_grad(lambda f, x: (f(x) ** 2).sum())(subject, x.detach().numpy())
    (module(x) ** 2).sum().backward()
    assert_allclose(grads.parameters["inner.weight"], linear.weight.grad, **TOL["float32", "gradient"])
    to_input = jax.grad(lambda x: (subject(x) ** 2).sum())(jnp.asarray(x.detach().numpy()))
    assert_allclose(to_input, x.grad, **TOL["float32", "gradient"])


def test_from_torch__a_module_called_twice_and_one_that_nobody_reads__have_sites():
    def twice(inner, x):
        inner(x + 1)
        return inner(inner(x))

    module = Holding(twice, torch.nn.Linear(D, D)).eval()
    x = torch.randn(2, D)
    subject = from_torch(module, x, dynamic=False)
    _, acts = mj.capture(subject, [f"inner.call_{i}.output" for i in range(3)])(x.numpy())
    inner = module.inner
    expected = [inner(x + 1), inner(x), inner(inner(x))]
    for i, value in enumerate(expected):
        assert_allclose(acts[f"inner.call_{i}.output"], value.detach(), **TOL["float32", "parity"])


@pytest.mark.parametrize("wide", [D, 2 * D])
def test_from_torch__lists_in_lists__have_sites_that_can_be_asked_for(wide):
    linear = torch.nn.Linear
    stages = [[linear(D, D), linear(D, wide)], [linear(wide, wide)]]
    blocks = torch.nn.ModuleList(torch.nn.ModuleList(stage) for stage in stages)
    module = Holding(
        lambda inner, x: [x := block(x) for stage in inner for block in stage][-1], blocks
    ).eval()
    x = torch.randn(2, D)
    subject = from_torch(module, x, dynamic=False)
    if wide == D:  # stages that are alike are layers, of which the second has no second block
        names = {"inner_0.output": (0, 1), "inner_1.output": (0,)}
        at = [("inner_0.output", 0), ("inner_1.output", 0), ("inner_0.output", 1)]
    else:
        names = {f"inner_{name}.output": None for name in ("0_0", "0_1", "1_0")}
        at = [(name, ...) for name in names]
    _, acts = mj.capture(subject, list(names))(x.numpy())
    assert acts.layers == names
    for (name, row), block in zip(at, [*stages[0], *stages[1]], strict=True):
        x = _torch(block, x)
        assert_allclose(acts[name][row], x, **TOL["float32", "parity"])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_from_torch__half_precision__stays(dtype):
    module, tol = net().to(getattr(torch, dtype)), TOL["bfloat16", "parity"]
    subject = from_torch(module, TOKENS, output="logits", dynamic=False)
    assert subject.parameters["embed.weight"].dtype == dtype
    site, seen = "blocks.mlp.output", []
    out, acts = mj.capture(subject, site)(TOKENS.numpy())
    assert out.dtype == dtype and acts[site].dtype == dtype
    logits = _hooked(module, "blocks.1.mlp", lambda out: seen.append(out) or out)
    assert_allclose(out.astype(jnp.float32), logits.detach().float(), **tol)
    assert_allclose(acts[site][1].astype(jnp.float32), seen[0].detach().float(), **tol)
    (expected,) = torch.autograd.grad(logits.sum(), seen)
    _, grads = mj.value_and_grad_at(subject, lambda y: y.sum(), site)(TOKENS.numpy())
    assert grads[site].dtype == dtype
    assert_allclose(grads[site][1].astype(jnp.float32), expected.float(), **tol)
    edited = mj.intervene(subject, mj.scale(site, 3.0, layer=1))(TOKENS.numpy())
    tripled = _hooked(module, "blocks.1.mlp", lambda out: 3 * out).detach().float()
    assert edited.dtype == dtype
    assert_allclose(edited.astype(jnp.float32), tripled, **tol)


def test_save__what_a_subject_gave__says_which_numbers_it_came_from(subject, tmp_path):
    site, ids = "blocks.mlp.output", TOKENS.numpy()
    _, acts = mj.capture(subject, site)(ids)
    again = from_torch(net(), TOKENS, dynamic=False)
    other = eqx.tree_at(lambda s: s.parameters["embed.weight"], again, 2 * again.parameters["embed.weight"])
    told = {}
    for name, model in {"own": subject, "again": again, "other": other}.items():
        folder = mj.save(acts, tmp_path / name, model=model, tokens=ids)
        assert mj.verify(folder).ok
        made_from = {source.name: source for source in mj.provenance(folder).made_from}
        assert set(made_from) == {"model", "tokens"}
        told[name] = made_from["model"].arrays
    assert told["own"] == told["again"] != told["other"]
    assert_array_equal(mj.restore(tmp_path / "own")[site], acts[site])


def test_from_torch__chosen_names__address_positions(subject):
    named = from_torch(
        net(),
        TOKENS,
        sites={"resid_post": ("blocks.output", ("pos", "d_model"))},
        output="logits",
        dynamic=False,
    )
    zeroed = mj.intervene(named, mj.zero("resid_post", layer=LAYERS - 1, pos=[0, 2]))(TOKENS.numpy())
    assert_array_equal(zeroed[:, [0, 2]], jnp.zeros((2, 2, VOCAB)))
    assert_allclose(zeroed[:, 1], subject(TOKENS.numpy())["logits"][:, 1], **TOL["float32", "layout"])
    with pytest.raises(SiteError, match=r"Did you mean `resid_post`"):
        mj.capture(named, "resid_pots")(TOKENS.numpy())


def test_from_torch__the_module__is_left_as_it_was():
    module = net()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    subject = from_torch(module, TOKENS, output="logits", dynamic=False)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    first = subject(TOKENS.numpy())
    with torch.no_grad():
        module.embed.weight.zero_()
    assert_array_equal(subject(TOKENS.numpy()), first)


def test_from_torch__checks_of_numbers__are_left_out():
    def checks(x):
        torch._check(x.sum().item() > -(10.0**9))
        return 2 * x

    x = torch.randn(2, D)
    assert_array_equal(from_torch(inside(checks), x, dynamic=False)(x.numpy()), 2 * x.numpy())


REFUSED = {
    "an if on numbers": (lambda x: x + 1 if x.sum() > 0 else x, r"cannot carry `inner` \(Holding\).*depends on the numbers.*x.sum"),
    "a number taken out": (lambda x: x * x.sum().item(), r"aten\.(item|_local_scalar_dense).* in `inner`.*depends on the numbers"),
    "a shape from numbers": (lambda x: x[x > 0].sum() + x, r"in `inner`.*depends on the numbers in a tensor"),
    "random numbers": (lambda x: x + torch.rand_like(x), r"aten\.rand.* in `inner` draws random numbers"),
    "an operation without a counterpart": (torch.special.airy_ai, r"aten.special_airy_ai.default in `inner` has no counterpart"),
    "a write into what is read again": (lambda x: (x.mul_(2), x)[1], r"aten\.mul_\.Tensor writes in place into the input of `inner`.*aten.add.Tensor in the module itself reads it again"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_from_torch__what_export_cannot_carry__names_operation_and_module(what):
    do, message = REFUSED[what]
    module = inside(do)
    if "write" in what:
        module.do = lambda inner, x: inner(x) + x
    with pytest.raises(UnsupportedModelError, match=message):
        from_torch(module, torch.randn(2, D), dynamic=False)


def test_from_torch__other_hooks_of_a_module__see_what_an_edit_puts_there():
    noted = []

    def reads_notes(inner, x):
        noted.clear()
        return inner(x) + noted[0] ** 2

    module, x = Holding(reads_notes, torch.nn.Linear(D, D)).eval(), torch.randn(2, D)
    module.inner.register_forward_hook(lambda _, args, out: noted.append(out))
    module.inner.register_forward_hook(lambda _, args, out: 3 * out)
    subject = from_torch(module, x, dynamic=False)
    _, acts = mj.capture(subject, "inner.output")(x.numpy())
    assert_allclose(acts["inner.output"], module.inner.forward(x).detach(), **TOL["float32", "parity"])
    edited = mj.intervene(subject, mj.add("inner.output", 1.0))(x.numpy())
    module.inner.register_forward_hook(lambda _, args, out: out + 1, prepend=True)
    assert_allclose(edited, _torch(module, x), **TOL["float32", "parity"])


@pytest.mark.parametrize("before", [pytest.param(False, marks=pytest.mark.slow), True])
def test_from_torch__hidden_states_that_transformers_notes__are_edited(before):
    """It notes them by hooks, from the first call that asks for them on."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": POS}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).eval()
    fixed = {"use_cache": False, "output_hidden_states": True}
    if before:
        model(TOKENS, **fixed)
    subject = from_torch(model, {"input_ids": TOKENS}, output="hidden_states", dynamic=False, **fixed)
    edited = mj.intervene(subject, mj.zero("transformer.h.output", layer=0))(TOKENS.numpy())
    assert_array_equal(edited[1], jnp.zeros((2, POS, 8)))
    assert np.abs(edited[0]).max() > 0.01


class _Otherwise(torch.nn.Module):
    def forward(self, x):
        return 2 * x if torch.compiler.is_exporting() else 3 * x


class _Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_from_torch__a_program_of_other_numbers__is_refused_by_its_first_operation(monkeypatch):
    with pytest.raises(UnsupportedModelError, match=r"what _Otherwise gives on the example.*is_exporting"):
        from_torch(_Otherwise().eval(), torch.ones(2), dynamic=False)
    monkeypatch.setitem(OPERATIONS, "aten.linear.default", lambda x, w, b=None: jnp.matmul(x, w.T))
    with pytest.raises(
        UnsupportedModelError, match=r"aten.linear.default in `blocks.0.mlp.up` is the first op"
    ):
        from_torch(net(), tokens(), dynamic=False)


def test_from_torch__a_module_that_counts_its_calls__is_left_as_it_was():
    module = _Counts().eval()
    subject = from_torch(module, torch.ones(2), dynamic=False)
    assert float(module.calls) == 0
    np.testing.assert_array_equal(subject(np.ones(2, np.float32)), 2)


def test_from_torch__wrong_examples_and_outputs__are_refused(as_a_user):
    x = torch.randn(2, D)
    with pytest.raises(ArgumentError, match="got function"):
        from_torch(lambda x: x, x)
    module = net()
    module.blocks[1].training = True
    with pytest.raises(ArgumentError, match=r"`blocks.1` would train.*module.eval\(\)"):
        from_torch(module, TOKENS)
    with pytest.raises(ArgumentError, match="cannot be called with this example: RuntimeError"):
        from_torch(Holding(lambda inner, x: inner(x), torch.nn.Linear(3, 3)).eval(), x, dynamic=False)
    with pytest.raises(ArgumentError, match="cannot be called with this example: TypeError"):
        from_torch(net(), {"tokens": TOKENS, "msak": TOKENS}, dynamic=False)
    with pytest.raises(ArgumentError, match="holds no tensor or array"):
        from_torch(net(), {"double": True})
    with pytest.raises(ArgumentError, match="the example holds a object"):
        from_torch(net(), object())
    with pytest.raises(ArgumentError, match=r"`output.1` of what the module returns is a object"):
        from_torch(Holding(lambda x: (x, object())).eval(), x, dynamic=False)
    with pytest.raises(ArgumentError, match="the module returns no tensor"):
        from_torch(Holding(lambda x: None).eval(), x, dynamic=False)
    with pytest.raises(ArgumentError, match=r"output has no 'logit'; it has 'logits', 'last', 'nothing'"):
        from_torch(net(), TOKENS, output="logit", dynamic=False)
    with pytest.raises(UnsupportedModelError, match=r"`inner.weight` lies on torch's meta device"):
        from_torch(
            Holding(lambda inner, x: inner(x), torch.nn.Linear(D, D, device="meta")).eval(), x.to("meta")
        )


def test_from_torch__without_torch__says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mechjax\[torch\]'"):
        from_torch(None, None)


def test_from_torch__after_it__jax_and_torch_are_as_they_were():
    code = """
import os, jax, torch
attention = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()
state = lambda: (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision, jax.config.jax_numpy_dtype_promotion,
                 torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(),
                 "ENABLE_RUNTIME_UPTIME_TELEMETRY" in os.environ, torch._ops.OpOverloadPacket.__getattr__)
before, x = state(), torch.ones(1, 3, 4)
own = attention(x, x, x)[0]
import mechjax as mj
assert "torchax" not in __import__("sys").modules
module = torch.nn.Linear(4, 2).eval()
subject = mj.interop.from_torch(module, torch.ones(3, 4), dynamic=False)
subject(x[0].numpy())
assert state() == before, (state(), before)
assert torch.equal(attention(x, x, x)[0], own)
assert type(module(x)) is torch.Tensor and module(x).requires_grad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
