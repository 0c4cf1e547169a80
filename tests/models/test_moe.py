"""Mixtures of experts against transformers' own modules, and the two ways through the experts against each other."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models import Config
from mechjax.models.experts import Experts
from mechjax.models.mlp import MLP
from mechjax.models.moe import INSIDE, MoE
from mechjax.transform.site import site
from tests.tolerances import TOL

D, F, E, K = 12, 10, 8, 3
BATCH, POS = 3, 7
SIZES = {"n_experts": E, "top_k": K, "d_expert": F}
SHAPES = {"hidden_size": D, "num_attention_heads": 2, "hidden_act": "silu", "num_experts_per_tok": K}

CASES = {
    "mixtral": (
        "mixtral", "Mixtral", "SparseMoeBlock", {"num_local_experts": E, "intermediate_size": F},
        Experts(**SIZES, normalized=True),
    ),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3Moe", "SparseMoeBlock",
        {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": False}, Experts(**SIZES),
    ),
    "olmoe": (
        "olmoe", "Olmoe", "SparseMoeBlock", {"num_experts": E, "intermediate_size": F, "norm_topk_prob": True},
        Experts(**SIZES, normalized=True),
    ),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2Moe", "SparseMoeBlock",
        {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 14},
        Experts(**SIZES, d_shared=14, shared_gate=True),
    ),
    "gpt_oss": (
        "gpt_oss", "GptOss", "MLP", {"num_local_experts": E, "intermediate_size": F, "swiglu_limit": 0.7},
        Experts(
            **SIZES, scoring="softmax_chosen", router_bias=True, biases=True, swiglu_alpha=1.702, swiglu_limit=0.7,
            linear_offset=1.0,
        ),
    ),
    "deepseek_v2": (
        "deepseek_v2", "DeepseekV2", "Moe",
        {
            "n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
            "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7,
        },
        Experts(**SIZES, scale=1.7, n_groups=4, top_groups=2, d_shared=2 * F),
    ),
    "deepseek_v3": (
        "deepseek_v3", "DeepseekV3", "MoE",
        {
            "n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        },
        Experts(
            **SIZES, scoring="sigmoid", choice_bias=True, normalized=True, scale=2.5, n_groups=4, top_groups=2,
            group_score="top2", d_shared=F,
        ),
    ),
}  # fmt: skip
"""Name -> (file, prefix and suffix of transformers' module, what its config is given, the same as ours)."""


def config_of(experts):
    return Config(
        d_vocab=5, n_ctx=8, d_model=D, n_layers=1, n_heads=2, mlp="gated", activation="silu", mlp_bias=False,
        experts=experts,
    )  # fmt: skip


def drawn(experts, seed=0, std=0.5):
    """A mixture of experts with every parameter drawn."""
    rng = np.random.default_rng(seed)
    shapes = experts.shapes(D)
    given = {name: jnp.asarray(rng.normal(0, std, shape), jnp.float32) for name, shape in shapes.items()}
    return assembled(given)


def assembled(given):
    shared = {
        name.removeprefix("shared."): leaf for name, leaf in given.items() if name.startswith("shared.")
    }
    biases = dict.fromkeys(("b_in", "b_gate", "b_out"))
    names = [name for name in MoE.__dataclass_fields__ if name != "shared"]
    return MoE(
        **{name: given.get(name) for name in names}, shared=MLP(**shared, **biases) if shared else None
    )


@cache
def theirs_and_ours(name):
    """transformers' module with every parameter and buffer redrawn, the same module of ours, and both outputs."""
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    folder, prefix, suffix, given, experts = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**SHAPES, **given)
    config._experts_implementation = "eager"
    modeling = getattr(getattr(transformers.models, folder), f"modeling_{folder}")
    module = getattr(modeling, prefix + suffix)(config).eval()
    rng = np.random.default_rng(list(name.encode()))
    with torch.no_grad():
        for leaf in (*module.parameters(), *module.buffers()):
            leaf.copy_(torch.from_numpy(rng.normal(0, 0.6, tuple(leaf.shape))))
    x = rng.normal(size=(BATCH, POS, D)).astype(np.float32)
    with torch.no_grad():
        out = module(torch.from_numpy(x))
        router = module.router if name == "gpt_oss" else module.gate
        seen = [part.numpy() for part in router(torch.from_numpy(x).reshape(-1, D))]
    out = out[0] if isinstance(out, tuple) else out
    ours = assembled({path: jnp.asarray(leaf) for path, leaf in translated(module).items()})
    assert {path: leaf.shape for path, leaf in flat(ours).items()} == experts.shapes(D)
    return SimpleNamespace(
        ours=ours, config=config_of(experts), x=jnp.asarray(x), out=out.numpy(), router=seen
    )


def flat(module):
    leaves = jax.tree_util.tree_flatten_with_path(module)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def translated(module):
    """Our names and layouts of a transformers module's tensors."""
    state = {path: leaf.numpy() for path, leaf in module.state_dict().items()}
    names = {
        "gate.weight": "W_router", "router.weight": "W_router", "gate.e_score_correction_bias": "b_choice",
        "router.bias": "b_router", "shared_expert_gate.weight": "W_shared_gate", "experts.down_proj_bias": "b_out",
    }  # fmt: skip
    ours = {ours: state[path].T.squeeze() for path, ours in names.items() if path in state}
    if "b_out" in ours:  # gpt-oss: (in, out), gate and linear interleaved
        ours["b_out"] = state["experts.down_proj_bias"]
        fused, bias = state["experts.gate_up_proj"], state["experts.gate_up_proj_bias"]
        parts = {"W_gate": fused[..., ::2], "W_in": fused[..., 1::2], "W_out": state["experts.down_proj"]}
        return ours | parts | {"b_gate": bias[..., ::2], "b_in": bias[..., 1::2]}
    gate, linear = np.split(state["experts.gate_up_proj"].swapaxes(-1, -2), 2, -1)
    ours |= {"W_gate": gate, "W_in": linear, "W_out": state["experts.down_proj"].swapaxes(-1, -2)}
    for path, leaf in state.items():
        for theirs, name in (("gate_proj", "W_gate"), ("up_proj", "W_in"), ("down_proj", "W_out")):
            if path.startswith("shared_expert") and f".{theirs}." in path:
                ours[f"shared.{name}"] = leaf.T
    return ours


AXES = {
    "router_scores": ("pos", "expert"),
    "expert_weights": ("pos", "choice"),
    "expert_indices": ("pos", "choice"),
}
AXES |= {name: ("pos", "expert", "d_mlp") for name in INSIDE}


def marked(x, name):
    return site(x, name, axes=AXES.get(name, ("pos", "d_model")))


def run(case, x):
    return case.ours(x, case.config, marked)


@pytest.mark.parametrize("name", CASES)
def test_moe__every_routing__equals_transformers(name):
    case = theirs_and_ours(name)
    sites = ["router_scores", "expert_weights", "expert_indices"]
    out, acts = mj.capture(lambda x: run(case, x), sites)(case.x)
    assert_allclose(out, case.out, **TOL["float32", "parity"])
    scores, weights, indices = case.router
    assert_allclose(acts["router_scores"].reshape(-1, E), scores, **TOL["float32", "parity"])
    order = np.argsort(indices, -1), np.argsort(np.asarray(acts["expert_indices"]).reshape(-1, K), -1)
    ours = (
        np.asarray(acts["expert_indices"]).reshape(-1, K),
        np.asarray(acts["expert_weights"]).reshape(-1, K),
    )
    assert_array_equal(np.take_along_axis(ours[0], order[1], -1), np.take_along_axis(indices, order[0], -1))
    sorted_weights = np.take_along_axis(ours[1], order[1], -1), np.take_along_axis(weights, order[0], -1)
    assert_allclose(*sorted_weights, **TOL["float32", "parity"])


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_moe__every_token_through_every_expert__gives_the_same(name):
    case = theirs_and_ours(name)
    out, acts = mj.capture(lambda x: run(case, x), ["expert_out"])(case.x)
    assert_allclose(out, case.out, **TOL["float32", "parity"])
    assert acts["expert_out"].shape == (BATCH, POS, E, D)
    assert ((np.abs(acts["expert_out"]).max(-1) > 0).sum(-1) == K).all()


@pytest.mark.parametrize("change", [{"normalized": False}, {"scale": 1.0}, {"scoring": "softmax"}, {"top_groups": 4}, {"group_score": "max"}, {"choice_bias": False}, {"d_shared": 0}])  # fmt: skip
def test_control__a_choice_turned_off__changes_the_output(change):
    case = theirs_and_ours("deepseek_v3")
    experts = replace(case.config.experts, **change)
    kept = {name: leaf for name, leaf in flat(case.ours).items() if name in experts.shapes(D)}
    out = assembled(kept)(case.x, config_of(experts), marked)
    assert np.abs(out - case.out).max() > 1e-3


@pytest.mark.parametrize("change", [{"swiglu_alpha": None}, {"swiglu_limit": None}, {"linear_offset": 0.0}])
def test_control__clamped_swiglu_turned_off__changes_the_output(change):
    case = theirs_and_ours("gpt_oss")
    out = case.ours(case.x, config_of(replace(case.config.experts, **change)), marked)
    assert np.abs(out - case.out).max() > 1e-3


@pytest.mark.parametrize(
    "shape", [(2, 1, 40, D), *(pytest.param(s, marks=pytest.mark.slow) for s in ((0, 4, D), (D,), (1, D)))]
)
def test_moe__any_leading_axes__go_token_by_token(shape):
    experts = Experts(**SIZES, normalized=True)
    moe, config = drawn(experts), config_of(experts)
    x = jax.random.normal(jax.random.key(0), (1, D) if shape == (D,) else shape)
    out = moe(x, config, marked)
    assert out.shape == x.shape
    each = jax.vmap(lambda row: moe(row[None], config, marked)[0])(x.reshape(-1, D))
    assert_allclose(out.reshape(-1, D), each, **TOL["float32", "parity"])


def test_moe__all_tokens_to_one_expert__drops_none():
    experts = Experts(n_experts=E, top_k=1, d_expert=F)
    moe, config = drawn(experts), config_of(experts)
    moe = eqx.tree_at(lambda m: m.W_router, moe, moe.W_router.at[:, 5].set(0).at[0, 5].set(100))
    x = jax.random.normal(jax.random.key(0), (300, D)).at[:, 0].set(1.0)
    only = jax.nn.silu(x @ moe.W_gate[5]) * (x @ moe.W_in[5]) @ moe.W_out[5]
    assert_allclose(moe(x, config, marked), only, **TOL["float32", "gradient"])


def test_moe__gradients_of_inputs_and_weights__equal_those_through_every_expert():
    experts = Experts(**SIZES, normalized=True, biases=True)
    moe, config = drawn(experts), config_of(experts)
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    target = jax.random.normal(jax.random.key(2), x.shape)
    loss = lambda args: (args[0](args[1], config, marked) * target).sum()
    chosen = jax.jit(jax.grad(loss))((moe, x))
    seen = mj.intervene(loss, [mj.add("expert_out", jnp.zeros(D))])  # asks for a site inside the experts
    through_all = jax.jit(jax.grad(seen))((moe, x))
    for ours, dense in zip(jax.tree.leaves(chosen), jax.tree.leaves(through_all), strict=True):
        assert jnp.abs(dense).max() > 1e-3
        assert_allclose(ours, dense, **TOL["float32", "gradient"])


def test_moe__expert_taken_away__is_never_chosen_and_equals_its_outputs_silenced_in_weight():
    experts = Experts(**SIZES)
    moe, config = drawn(experts), config_of(experts)
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    f = lambda x: moe(x, config, marked)
    _, acts = mj.capture(
        mj.intervene(f, [mj.replace("router_scores", -jnp.inf, expert=2)]), ["expert_indices"]
    )(x)
    _, before = mj.capture(f, ["expert_indices", "expert_weights"])(x)
    assert (before["expert_indices"] == 2).any()
    assert not (acts["expert_indices"] == 2).any()
    silent = mj.intervene(f, [mj.zero("expert_out", expert=2)])(x)
    weights = jnp.where(before["expert_indices"] == 2, 0, before["expert_weights"])
    assert_allclose(
        silent, mj.intervene(f, [mj.replace("expert_weights", weights)])(x), **TOL["float32", "parity"]
    )
    assert jnp.abs(silent - f(x)).max() > 1e-3


def test_moe__index_of_no_expert__gives_nan_at_that_token_alone():
    experts = Experts(**SIZES)
    moe, config = drawn(experts), config_of(experts)
    x = jax.random.normal(jax.random.key(1), (4, D))
    edit = mj.replace("expert_indices", jnp.int32(E), pos=1, choice=0)
    out = mj.intervene(lambda x: moe(x, config, marked), [edit])(x)
    assert jnp.isnan(out[1]).all()
    assert not jnp.isnan(out[jnp.array([0, 2, 3])]).any()


def test_moe__without_experts_in_the_config__is_refused():
    with pytest.raises(ArgumentError, match="the config's `experts` is None: pass Experts"):
        drawn(Experts(**SIZES))(jnp.ones((1, D)), config_of(None), marked)
