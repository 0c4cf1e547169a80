"""De-embeddings against streams that hold one token's embedding, put through norm, head and encoder in numpy."""

import jax
import numpy as np
import pytest

from mechjax.attribution import de_embedding
from mechjax.base.errors import ArgumentError, ShapeError
from tests.attribution.transcoded import KINDS, case
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

SWEEP, DOUBLE = TOL["float32", "sweep"], TOL["float64", "gradient"]
NAMES = [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.slow) for n in KINDS if "latent" not in n]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=NAMES)
def made(request, small):
    return case(request.param, small)


def normed(made, norm, layer, x, scale=None, biased=True):
    """A norm of a layer in numpy."""
    norm, config = getattr(made.model.blocks, norm), made.model.config
    if norm is None:
        return x
    x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
    y = x / (np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) if scale is None else scale)
    y = y * (1 if norm.w is None else np.asarray(norm.w[layer]) + config.norm_offset)
    return y + np.asarray(norm.b[layer]) if biased and norm.b is not None else y


def embeddings(made):
    """Each token's embedding."""
    rows = np.asarray(made.model.W_E)
    if made.model.ln_embed is None:
        return rows
    norm = made.model.ln_embed
    rows = rows - rows.mean(-1, keepdims=True)
    return rows / np.sqrt(rows.var(-1, keepdims=True) + 1e-5) * np.asarray(norm.w) + np.asarray(norm.b)


def read_by(made, layer, x, scale=None):
    """What transcoders of a layer are given of a stream."""
    shared = made.model.config.residual == "parallel_shared"
    through = made.transcoders.reads == "ln2.normalized"
    return normed(made, "ln1" if shared else "ln2", layer, x, scale) if through else x


@pytest.mark.parametrize("scale", [None, 2.0], ids=["own scales", "one scale"])
def test_de_embedding__of_each_token__is_its_embedding_plugged_in_alone(made, scale):
    found = de_embedding(made.model, made.transcoders, layer=2, feature=3, scale=scale)
    W, b = made.encoder(2, 3)
    tight = DOUBLE if found.scores.dtype == np.float64 else SWEEP
    expected = read_by(made, 2, embeddings(made), scale) @ W + b
    np.testing.assert_allclose(found.preactivations, expected, **tight)
    nothing = read_by(made, 2, np.zeros(8, expected.dtype), scale) @ W + b
    np.testing.assert_allclose(found.biases, np.broadcast_to(nothing, 20), **tight)
    assert np.ptp(found.scores) > 0.1


def test_de_embedding__through_a_head__is_what_it_writes_of_each_token_plugged_in(made):
    layer, head = 1, 2
    found = de_embedding(made.model, made.transcoders, layer=2, feature=4, head=(layer, head))
    attn, config, W, b = made.model.blocks.attn, made.model.config, *made.encoder(2, 4)

    def written(x, biased):
        shared = head // (config.n_heads // config.n_kv_heads)
        v = normed(made, "ln1", layer, x, biased=biased) @ np.asarray(attn.W_V[layer, :, shared])
        v = v + np.asarray(attn.b_V[layer, shared]) if biased and attn.b_V is not None else v
        return v @ np.asarray(attn.W_O[layer, head])

    tight = DOUBLE if found.scores.dtype == np.float64 else SWEEP
    whole = config.residual_scale * normed(
        made, "ln1_post", layer, written(embeddings(made), True), biased=False
    )
    np.testing.assert_allclose(found.preactivations, read_by(made, 2, whole) @ W + b, **tight)
    fixed = de_embedding(made.model, made.transcoders, layer=2, feature=4, head=(layer, head), scale=1.0)
    x = normed(made, "ln1", layer, embeddings(made), 1.0, False) @ np.asarray(
        attn.W_V[layer, :, head // (config.n_heads // config.n_kv_heads)]
    )
    x = config.residual_scale * normed(
        made, "ln1_post", layer, x @ np.asarray(attn.W_O[layer, head]), 1.0, False
    )
    through = read_by(made, 2, x, 1.0) - read_by(made, 2, np.zeros_like(x), 1.0)
    np.testing.assert_allclose(fixed.scores, through @ W, **tight)  # the weights alone, as in the paper
    assert np.ptp(fixed.scores) > 0.1


def test_de_embedding__of_other_latents__compiles_nothing_and_names_tokens(small, caplog):
    made = case("gpt2", small)
    ask = lambda layer, feature, head=None: de_embedding(
        made.model, made.transcoders, layer=layer, feature=feature, head=head
    )
    first, through = ask(1, 3), ask(2, 4, (1, 2))
    with nothing_compiles(caplog):
        other, after = ask(0, 5), ask(1, 0, (0, 1))
    assert (
        np.abs(other.scores - first.scores).max() > 0.01
        and np.abs(after.scores - through.scores).max() > 0.01
    )
    best = int(np.argmax(first.scores))
    assert first.top(2)[0] == (f"token {best}", float(first.scores[best]))

    class Spelling:
        def decode(self, ids):
            return f"<{ids[0]}>"

    assert first.top(1, Spelling())[0][0] == f"<{best}>"
    assert f"token {best}" in first._repr_html_() and len(first.top(100)) == 20


def test_de_embedding__bad_input__is_explained(small, as_a_user):
    made = case("gpt2", small)
    ask = lambda **more: de_embedding(made.model, made.transcoders, **{"layer": 1, "feature": 3} | more)
    with pytest.raises(ArgumentError, match=r"scale=0\.0: norms divide by positive numbers"):
        ask(scale=0.0)
    with pytest.raises(ShapeError, match=r"scale= has shape \(2,\): one number for all norms"):
        ask(scale=np.ones(2))
    with pytest.raises(ArgumentError, match="layer=3: there is no transcoder of that layer"):
        ask(layer=3)
    with pytest.raises(ArgumentError, match=r"head=\(2, 0\) writes after"):
        ask(head=(2, 0))
