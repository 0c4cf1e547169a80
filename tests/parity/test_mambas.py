"""Mamba, Mamba-2 and Falcon Mamba against transformers: logits, every site, states, padding; every parameter redrawn."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.models import Mamba, parameters
from mechjax.models.structures import build
from mechjax.studies.check import check
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import assert_spelled, in_mechjax, module_values, quick, redraw, torch, transformers
from tests.parity.rounding import assert_rounds_alike
from tests.tolerances import TOL

N_BATCH, N_LAYERS = 2, 2
_SMALL = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": N_LAYERS, "state_size": 5}
_HEADS = {"num_heads": 6, "head_dim": 8, "chunk_size": 4}
CASES = {
    "mamba": ("Mamba", _SMALL | {"time_step_rank": 3}),
    "mamba_biases": (
        "Mamba",
        _SMALL
        | {
            "use_bias": True, "use_conv_bias": False, "hidden_act": "gelu", "tie_word_embeddings": False,
            "intermediate_size": 36, "conv_kernel": 3, "layer_norm_epsilon": 1e-2, "residual_in_fp32": False,
        },
    ),
    "falcon": ("FalconMamba", _SMALL | {"mixer_rms_eps": 1e-2}),
    "mamba2": ("Mamba2", _SMALL | _HEADS | {"n_groups": 2}),
    "mamba2_limits": (
        "Mamba2",
        _SMALL
        | _HEADS
        | {
            "n_groups": 3, "use_bias": True, "use_conv_bias": False, "time_step_limit": (0.2, 0.9),
            "tie_word_embeddings": True, "conv_kernel": 2,
        },
    ),
}  # fmt: skip
every_case = partial(pytest.mark.parametrize, "name")
both = pytest.mark.parametrize("name", ["mamba", "mamba2"])


@cache
def pair(name):
    """(in transformers, in mechjax, tokens): more tokens than a chunk has, in transformers and here."""
    kind, given = CASES[name]
    hf = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**given)).eval()
    rng = np.random.default_rng(list(name.encode()))
    redraw(hf, rng)
    return hf, in_mechjax(hf), rng.integers(0, 31, (N_BATCH, 70 if kind == "Mamba2" else 19))


def theirs(name, **more):
    hf, _, tokens = pair(name)
    given = {key: torch.from_numpy(value) for key, value in more.items()}
    with torch.no_grad():
        return hf(torch.from_numpy(tokens), **given).logits.numpy()


def assert_close(ours, right, tolerance="parity"):
    """Equal, relative to the largest number, channels merged as theirs are."""
    unit = np.abs(right).max()
    assert_allclose(np.asarray(ours).reshape(right.shape) / unit, right / unit, **TOL["float32", tolerance])


@every_case(quick(("mamba", "mamba2"), tuple(CASES)))
def test_logits_and_sites__of_every_module__equal_transformers(name):
    hf, model, tokens = pair(name)
    assert isinstance(model, Mamba)
    assert_close(model(tokens), theirs(name))
    out, acts = mj.capture(model, list(mj.list_sites(model, tokens)))(tokens)
    assert_close(out, theirs(name))  # with its states formed, token by token
    found = hf_sites(hf, model.config, tokens)
    for (site, layer), value in found.items():
        assert_close(acts[site] if layer is None else acts[site][layer], value)
    exposed = {
        "embed",
        "resid_pre",
        "mixer_in",
        "ln1.normalized",
        "gate",
        "conv_in",
        "mixer_out",
        "resid_post",
    }
    exposed |= {"ln_final.normalized", "logits"}
    exposed |= (
        {"B_in", "C_in", "ssm_out", "gated_norm.normalized"}
        if model.config.in_heads
        else {"ssm_in", "delta_latent", "B", "C", "gated"}
    )
    assert {site for site, _ in found} == exposed
    assert {layer for _, layer in found} == {None, *range(N_LAYERS)}
    assert_spelled(model, acts, module_values(hf, tokens))
    assert_close(acts["resid_pre"] + acts["mixer_out"], np.asarray(acts["resid_post"]), "decomposition")
    assert_close(acts["resid_pre"][1:], np.asarray(acts["resid_post"][:-1]), "decomposition")


@every_case(quick(("falcon",), tuple(CASES)))
def test_state__after_the_last_token__is_what_transformers_caches(name):
    hf, model, tokens = pair(name)
    with torch.no_grad():
        kept = hf(torch.from_numpy(tokens), use_cache=True).cache
    acts = mj.capture(model, ["state", "conv_in"], pos=-1)(tokens)[1]
    for layer in range(N_LAYERS):
        assert_close(acts["state"][layer], kept.get_recurrent_state(layer, state_idx=0).numpy())
        window = kept.get_conv_state(layer, state_idx=0).numpy()[:, : model.config.d_inner, -1]
        assert_close(acts["conv_in"][layer], window)


@every_case(quick(("mamba2",), ("mamba", "mamba2")))
def test_padding__left_and_right__equals_transformers_at_real_positions(name):
    _, model, tokens = pair(name)
    n = tokens.shape[1]
    for mask in (np.arange(n) >= np.array([[0], [3]]), np.arange(n) < np.array([[n], [4]])):
        right = theirs(name, attention_mask=mask.astype(np.int64))
        assert_close(np.asarray(model(tokens, mask=jnp.asarray(mask)))[mask], right[mask])


@every_case(quick(("mamba", "mamba2"), tuple(CASES)))
def test_generate__greedy_with_left_padding__equals_transformers(name):
    hf, model, tokens = pair(name)
    tokens, n_tokens = tokens[:, :7], 6
    n_padding = 0 if model.config.proj_bias else 3  # biases of padding reach transformers' convolutions
    mask = np.arange(7) >= np.array([[n_padding], [0]])
    ours = mj.generate(model, tokens, n_tokens, mask=jnp.asarray(mask))
    with torch.no_grad():
        right = hf.generate(
            torch.from_numpy(np.where(mask, tokens, 0)), attention_mask=torch.from_numpy(mask.astype(int)),
            max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=0, eos_token_id=32,
            return_dict_in_generate=True, output_logits=True,
            use_cache=name != "mamba2_limits",  # its step from a cache differs from its whole run there
        )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens, right.sequences[:, 7:])
    log_probs = torch.stack(right.logits, 1).log_softmax(-1).gather(-1, right.sequences[:, 7:, None])
    assert_close(ours.log_probs, log_probs[..., 0].numpy())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("mamba", {"norm_eps": 0.1}, marks=pytest.mark.slow),
        pytest.param("mamba", {"activation": "relu"}, marks=pytest.mark.slow),
        pytest.param("falcon", {"mixer_norm_eps": 0.5}, marks=pytest.mark.slow),
        ("falcon", {"mixer_norm_eps": None}),
        ("mamba2", {"dt_limit": (0.0, 0.5)}),
    ],
)
def test_control__a_choice_changed__changes_the_logits(name, changes):
    _, model, tokens = pair(name)
    changed = build(replace(model.config, **changes), parameters(model))
    assert np.abs(changed(tokens[:1, :9]) - theirs(name)[:1, :9]).max() > 1e-3


def written_out(mixer, layer, change, hidden, **_):
    """The mixers of transformers with their recurrence as a loop, whose every state `change(h, layer, t)` may change."""
    F, n = torch.nn.functional, hidden.shape[1]
    heads, d_state = getattr(mixer, "num_heads", None), mixer.ssm_state_size
    convolved = lambda x: mixer.act(mixer.conv1d(x.transpose(1, 2))[..., :n]).transpose(1, 2)
    if heads is None:
        x, gate = mixer.in_proj(hidden).chunk(2, -1)
        x = convolved(x)
        delta, B, C = mixer.x_proj(x).split([mixer.time_step_rank, d_state, d_state], -1)
        delta, A = F.softplus(mixer.dt_proj(delta)), -torch.exp(mixer.A_log)
        B, C, D = B[:, :, None], C[:, :, None], mixer.D
    else:
        shared = mixer.n_groups * d_state
        gate, inner, delta = mixer.in_proj(hidden).split([mixer.intermediate_size, mixer.conv_dim, heads], -1)
        x, B, C = convolved(inner).split([mixer.intermediate_size, shared, shared], -1)
        x = x.unflatten(-1, (heads, -1))
        B, C = (v.unflatten(-1, (mixer.n_groups, d_state)).repeat_interleave(heads // mixer.n_groups, 2)[:, :, :, None] for v in (B, C))  # fmt: skip
        delta = F.softplus(delta + mixer.dt_bias).clamp(*mixer.time_step_limit)[..., None]
        A, D = -torch.exp(mixer.A_log)[:, None, None], mixer.D[:, None]
    h, read = 0.0, []
    for t in range(n):
        h = torch.exp(delta[:, t, ..., None] * A) * h + (delta * x)[:, t, ..., None] * B[:, t]
        h = change(h, layer, t)
        read.append((h * C[:, t]).sum(-1))
    y = torch.stack(read, 1) + D * x
    if heads is None:
        return mixer.out_proj(y * F.silu(gate))
    return mixer.out_proj(mixer.norm(y.flatten(2), gate))


def loops(name, tokens, change, monkeypatch):
    """Logits of transformers with every recurrence written out."""
    hf = pair(name)[0]
    with monkeypatch.context() as patched:
        for layer, block in enumerate(hf.backbone.layers):
            mixer = block.mixer
            patched.setattr(mixer, "forward", partial(written_out, mixer, layer, change))
        return hf(torch.from_numpy(tokens), use_cache=False).logits


@both
def test_edits__of_states__flow_on_as_in_loops_of_torch(name, monkeypatch):
    _, model, tokens = pair(name)
    tokens = tokens[:, :12]
    unedited = loops(name, tokens, lambda h, layer, t: h, monkeypatch).detach().numpy()
    assert_close(unedited, theirs(name)[:, :12])  # causal, and the loops are right
    rng = np.random.default_rng(3)
    shape = mj.list_sites(model, tokens)["state"].local[2:]
    value, row = rng.standard_normal((N_BATCH, *shape)), rng.standard_normal(shape[-1])
    value, row = value.astype(np.float32), row.astype(np.float32)
    where = "head" if model.config.in_heads else "d_inner"
    edits = [
        mj.replace("state", value[:, None], layer=0, pos=2),
        mj.add("state", row, layer=0, pos=[4, 7]),
        mj.scale("state", 0.5, layer=1, pos=mj.per_example(np.array([1, 5]))),
        mj.zero("state", layer=1, pos=6, **{where: 3}),
        mj.clamp("state", high=0.5, layer=1, d_state=1),
        mj.apply("state", _tanh, layer=0, pos=9),
    ]

    def change(h, layer, t):
        h = h.clone()
        if (layer, t) == (0, 2):
            h = torch.from_numpy(value).clone()
        if layer == 0 and t in (4, 7):
            h = h + torch.from_numpy(row)
        if layer == 1 and t in (1, 5):
            h[(1, 5).index(t)] *= 0.5
        if (layer, t) == (1, 6):
            h[:, 3] = 0
        if layer == 1:
            h[..., 1] = h[..., 1].clamp(max=0.5)
        return torch.tanh(h) if (layer, t) == (0, 9) else h

    with torch.no_grad():
        right = loops(name, tokens, change, monkeypatch).numpy()
    out, acts = mj.capture(mj.intervene(model, edits), ["state"], layers=[0], pos=2)(tokens)
    assert_close(out, right)
    assert_allclose(acts["state"][0], value, **TOL["float32", "law"])
    assert np.abs(right - unedited).max() > 1e-2
    one = mj.intervene(model, [mj.zero("state", layer=0, pos=5)])(tokens)
    assert_close(one[:, :5], unedited[:, :5])
    assert (np.abs(one - unedited)[:, 5:].max(-1) > 1e-3).all()  # every later position hears of it


def _tanh(x, info):
    return jnp.tanh(x)


@pytest.mark.parametrize("name", quick((), ("mamba", "mamba2")))
def test_gradients__at_states_and_of_parameters__equal_autograd(name, monkeypatch):
    hf, model, tokens = pair(name)
    tokens = tokens[:, :8]
    _, grads = mj.value_and_grad_at(model, lambda logits: (logits[:, -1] ** 2).sum(), ["state", "ssm_in"])(
        tokens
    )
    states = {}

    def keep(h, layer, t):
        states[layer, t] = h
        h.retain_grad()
        return h

    hf.zero_grad()
    (loops(name, tokens, keep, monkeypatch)[:, -1] ** 2).sum().backward()
    for layer in range(N_LAYERS):
        right = np.stack([states[layer, t].grad.numpy() for t in range(8)], 1)
        assert_close(grads["state"][layer], right, "gradient")
    ours = jax.grad(lambda m: (m(tokens)[:, -1] ** 2).sum())(model)
    for path, layer in (("A_log", 0), ("D", 1)):
        right = getattr(hf.backbone.layers[layer].mixer, path).grad.numpy()
        assert_close(getattr(ours.blocks.mixer, path)[layer], right, "gradient")
    assert_close(ours.W_E, hf.backbone.embeddings.weight.grad.numpy(), "gradient")


@pytest.mark.parametrize("name", quick(("mamba", "mamba2"), tuple(CASES)))
def test_export__comes_back_bit_for_bit_and_opens_in_transformers(name, tmp_path):
    hf, model, tokens = pair(name)
    folder = mj.export(model, tmp_path / "m", family=model.config.source)
    back, _ = mj.load(folder)
    assert back.config == model.config
    for path, leaf in parameters(back).items():
        np.testing.assert_array_equal(leaf, parameters(model)[path])
    opened = type(hf).from_pretrained(folder).eval()
    with torch.no_grad():  # a Mamba-2 in chunks of another size, which is no choice of the model
        assert_close(opened(torch.from_numpy(tokens)).logits.numpy(), theirs(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_bfloat16__rounds_as_transformers_does(name, tmp_path):
    hf, _, tokens = pair(name)
    hf.save_pretrained(tmp_path)
    model, _ = mj.load(tmp_path, dtype="bfloat16")
    assert mj.list_sites(model, tokens)["resid_post"].dtype == jnp.float32  # the stream is kept wide
    opened = type(hf).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact, theirs = (of(torch.from_numpy(tokens)).logits.float().numpy() for of in (hf, opened))
    assert_rounds_alike(model(tokens), theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "falcon", "mamba2"])
def test_check__of_a_state_space_model__supports_every_row(name, tmp_path):
    pair(name)[0].save_pretrained(tmp_path)
    found = check(tmp_path)
    assert set(found.verdicts) == {"supported"}, found
    assert {"logits", "mixer_out", "sum of writes", "cache against full forward"} <= set(found.checks)
