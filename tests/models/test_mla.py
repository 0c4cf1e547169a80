"""Latent attention against transformers' own modules, and its sites."""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.catalogue import SITES
from mechjax.base.errors import ArgumentError
from mechjax.models import Config
from mechjax.models.latent import Latent
from mechjax.models.mla import MLA
from mechjax.models.norms import Norm
from mechjax.models.positions import arrange, varying
from mechjax.models.rope import Rope, Yarn
from mechjax.transform.site import site
from tests.tolerances import TOL

D, H, NOPE, ROPE, VALUE, KV, Q = 24, 3, 6, 4, 5, 8, 7
BATCH, POS = 2, 9
SHAPES = {
    "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": H, "kv_lora_rank": KV, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 0.7,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

CASES = {
    "v2": ("deepseek_v2", "DeepseekV2", {"q_lora_rank": Q, "rope_parameters": PLAIN}),
    "v2_lite": ("deepseek_v2", "DeepseekV2", {"q_lora_rank": None, "rope_parameters": PLAIN, "attention_bias": True}),
    "v3": ("deepseek_v3", "DeepseekV3", {"q_lora_rank": Q, "rope_parameters": YARN, "attention_bias": True}),
    "v3_halves": (
        "deepseek_v3", "DeepseekV3", {"q_lora_rank": Q, "rope_parameters": PLAIN, "rope_interleave": False},
    ),
}  # fmt: skip


def config_of(given):
    yarn = given["rope_parameters"] is YARN
    sharp = lambda scale: 0.1 * scale * math.log(YARN["factor"]) + 1
    stretch = Yarn(factor=4.0, trained=16, amplitude=sharp(1.0) / sharp(0.7)) if yarn else None
    return Config(
        d_vocab=5, n_ctx=64, d_model=D, n_layers=1, n_heads=H, d_head=NOPE + ROPE, norm="rms", positions="rotary",
        rope=Rope(base=100.0, stretch=stretch), rotary_dim=ROPE,
        rotary_layout="pairs" if given.get("rope_interleave", True) else "halves",
        qkv_bias=given.get("attention_bias", False), out_bias=given.get("attention_bias", False),
        attn_scale=(NOPE + ROPE) ** -0.5 * (sharp(0.7) ** 2 if yarn else 1),
        latent=Latent(q_rank=given["q_lora_rank"], kv_rank=KV, d_nope=NOPE, d_rope=ROPE, d_value=VALUE),
    )  # fmt: skip


def translated(module):
    """Our names and layouts of a transformers module's tensors."""
    state = {path: leaf.numpy() for path, leaf in module.state_dict().items()}
    ours = {
        "w_kv": state["kv_a_layernorm.weight"],
        "W_DKV": state["kv_a_proj_with_mqa.weight"].T[:, :KV], "W_KR": state["kv_a_proj_with_mqa.weight"].T[:, KV:],
        "W_UK": state["kv_b_proj.weight"].T.reshape(KV, H, NOPE + VALUE)[..., :NOPE],
        "W_UV": state["kv_b_proj.weight"].T.reshape(KV, H, NOPE + VALUE)[..., NOPE:],
        "W_O": state["o_proj.weight"].T.reshape(H, VALUE, D),
    }  # fmt: skip
    if "q_proj.weight" in state:
        ours["W_Q"] = state["q_proj.weight"].T.reshape(D, H, NOPE + ROPE)
    else:
        ours |= {"W_DQ": state["q_a_proj.weight"].T, "w_q": state["q_a_layernorm.weight"]}
        ours["W_Q"] = state["q_b_proj.weight"].T.reshape(Q, H, NOPE + ROPE)
    if "kv_a_proj_with_mqa.bias" in state:
        both = state["kv_a_proj_with_mqa.bias"]
        ours |= {"b_DKV": both[:KV], "b_KR": both[KV:]}
    biases = {"q_a_proj.bias": "b_DQ", "o_proj.bias": "b_O"}
    return ours | {name: state[path] for path, name in biases.items() if path in state}


@cache
def theirs_and_ours(name):
    """transformers' module with every parameter redrawn, the same module of ours, and what theirs computes."""
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    folder, prefix, given = CASES[name]
    theirs = getattr(transformers, f"{prefix}Config")(**SHAPES, **given)
    theirs._attn_implementation = "eager"
    modeling = getattr(getattr(transformers.models, folder), f"modeling_{folder}")
    module = getattr(modeling, f"{prefix}Attention")(theirs, 0).eval()
    rng = np.random.default_rng(list(name.encode()))
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(torch.from_numpy(rng.normal(0, 1 if leaf.ndim == 1 else 0.5, tuple(leaf.shape))))
    x = rng.normal(size=(BATCH, POS, D)).astype(np.float32)
    positions = np.arange(POS)[None].repeat(BATCH, 0)
    hidden = np.where(np.tri(POS, dtype=bool), 0, np.finfo(np.float32).min).astype(np.float32)[None, None]
    with torch.no_grad():
        turned = getattr(modeling, f"{prefix}RotaryEmbedding")(theirs)(
            torch.from_numpy(x), torch.from_numpy(positions)
        )
        out, pattern = module(
            torch.from_numpy(x), position_embeddings=turned, attention_mask=torch.from_numpy(hidden)
        )
    config = config_of(given)
    leaves = {path: jnp.asarray(leaf) for path, leaf in translated(module).items()}
    shapes = config.latent.shapes(D, H, biased=config.qkv_bias)
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    ours = MLA(**{path: leaves.get(path) for path in MLA.__dataclass_fields__})
    return SimpleNamespace(
        ours=ours, config=config, x=jnp.asarray(x), out=out.numpy(), pattern=pattern.numpy()
    )


NORM = Norm(w=jnp.linspace(0.5, 1.5, D), b=None)


def marked(x, name):
    return (
        site(x, name, axes=("pos", "d_latent"))
        if name.endswith("latent")
        else site(x, name, axes=SITES[name].axes)
    )


def run(case, x, *, norm=None):
    """Latent attention on `x`, or on `x` normalised."""
    sequence = arrange(case.config, POS, None, None)
    here = varying(case.config)
    normalized = x if norm is None else norm(x, case.config)
    return case.ours(x, normalized, norm, sequence, here, case.config, marked)[0]


@pytest.mark.parametrize("name", CASES)
def test_mla__every_variant__equals_transformers(name):
    case = theirs_and_ours(name)
    out, acts = mj.capture(lambda x: run(case, x), ["pattern"])(case.x)
    assert_allclose(out, case.out, **TOL["float32", "parity"])
    assert_allclose(acts["pattern"], case.pattern, **TOL["float32", "parity"])
    for change in (
        {"rotary_layout": "halves" if case.config.rotary_layout == "pairs" else "pairs"},
        {"attn_scale": 1.0},
    ):
        other = SimpleNamespace(**vars(case) | {"config": replace(case.config, **change)})
        assert jnp.abs(run(other, case.x) - out).max() > 1e-3


def test_mla__costly_sites__change_nothing_when_asked_for():
    case = theirs_and_ours("v3")
    plain = run(case, case.x, norm=NORM)
    sites = ["q_input", "k_input", "v_input", "result", "q_latent", "kv_latent"]
    out, acts = mj.capture(lambda x: run(case, x, norm=NORM), sites)(case.x)
    assert_allclose(out, plain, **TOL["float32", "parity"])
    assert acts["q_latent"].shape == (BATCH, POS, Q)
    assert acts["kv_latent"].shape == (BATCH, POS, KV)
    assert_allclose(acts["result"].sum(-2) + case.ours.b_O, out, **TOL["float32", "parity"])


@pytest.mark.parametrize(("asked", "letter", "axis"), [("q_input", "q", "head"), ("k_input", "k", "kv_head"), ("v_input", "v", "kv_head")])  # fmt: skip
def test_head_inputs__replaced_in_one_head__change_what_that_head_reads_alone(asked, letter, axis):
    case = theirs_and_ours("v3")
    f = lambda x: run(case, x, norm=NORM)
    other = jnp.flip(case.x, -1)
    _, here = mj.capture(f, ["q", "k", "v"])(case.x)
    _, there = mj.capture(f, ["q", "k", "v"])(other)
    edit = mj.replace(asked, other[..., None, :], **{axis: 1})
    _, edited = mj.capture(mj.intervene(f, [edit]), ["q", "k", "v"])(case.x)
    for name in "qkv":
        expected = here[name]
        if name == letter:
            expected = expected.at[..., 1, :].set(there[name][..., 1, :])
        assert_allclose(edited[name], expected, **TOL["float32", "parity"])


def test_latent__edited_while_heads_are_split__still_reaches_every_head():
    case = theirs_and_ours("v3")
    f = lambda x: run(case, x, norm=NORM)
    swaps = [mj.scale("kv_latent", 0.5), mj.scale("q_latent", 2.0)]
    nothing = [mj.add(f"{letter}_input", jnp.zeros(D)) for letter in "qkv"]
    assert_allclose(
        mj.intervene(f, swaps + nothing)(case.x), mj.intervene(f, swaps)(case.x), **TOL["float32", "parity"]
    )
    assert jnp.abs(mj.intervene(f, swaps)(case.x) - f(case.x)).max() > 1e-3


def test_mla__without_latent_in_the_config__is_refused():
    case = theirs_and_ours("v2")
    with pytest.raises(ArgumentError, match="the config's `latent` is None: pass Latent"):
        run(SimpleNamespace(**vars(case) | {"config": replace(case.config, latent=None)}), case.x)
