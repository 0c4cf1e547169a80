"""Weights between latents against derivatives of a run in which all else is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.attribution import transcoder_connections
from mechjax.base.errors import ArgumentError
from tests.attribution.transcoded import KINDS, F, Held, case
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

LAYER, FEATURE, HEAD = 2, 4, (1, 2)
SWEEP, DOUBLE = TOL["float32", "sweep"], TOL["float64", "gradient"]
NAMES = [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.slow) for n in KINDS if "latent" not in n]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=NAMES)
def given(request, small):
    """(case, its run)."""
    made = case(request.param, small)
    return made, Held.of(made)


def slopes(made, held, layer, at, head=None):
    """How a latent's pre-activation at the last tokens changes with activations of a layer at `at`."""
    W = jnp.asarray(made.encoder(LAYER, FEATURE)[0])
    f = made.encode(held.read)[layer]

    def z(moved):
        out = held.acts["mlp_out"]
        for to in range(layer, 3):
            if (W_dec := made.decoder(layer, to)) is not None:
                out = out.at[to, np.arange(3), at].add(moved @ W_dec)
        read = held.again(head=head, mlp_out=out)[LAYER]
        return (read[np.arange(3), made.last] @ W).sum()

    return np.asarray(jax.grad(z)(jnp.zeros((3, F), f.dtype)))


def test_connections__along_the_stream__are_slopes_over_the_scale(given):
    made, held = given
    found = transcoder_connections(made.model, made.transcoders, layer=LAYER, feature=FEATURE)
    scale = 1 if held.scale is None else np.asarray(held.acts[held.scale])[LAYER, np.arange(3), made.last]
    tight = DOUBLE if found.connections.dtype == np.float64 else SWEEP
    for row, layer in enumerate(found.layers):
        if layer >= LAYER:
            assert np.isnan(found.connections[row]).all()
            continue
        expected = slopes(made, held, layer, made.last) * scale
        np.testing.assert_allclose(np.broadcast_to(found.connections[row], (3, F)), expected, **tight)
        assert np.abs(expected).max() > 1e-2


def test_connections__through_a_head__are_slopes_over_scales_and_pattern(given):
    made, held = given
    found = transcoder_connections(made.model, made.transcoders, layer=LAYER, feature=FEATURE, head=HEAD)
    rows, source, at = np.arange(3), 2, made.last
    scale = 1 if held.scale is None else np.asarray(held.acts[held.scale])[LAYER, rows, at]
    for name, where in (("ln1.scale", source), ("ln1_post.scale", at)):
        if name in held.acts:
            scale = scale * np.asarray(held.acts[name])[HEAD[0], rows, where]
    scale = scale / np.asarray(held.acts["pattern"])[HEAD[0], rows, HEAD[1], at, source][:, None]
    tight = DOUBLE if found.connections.dtype == np.float64 else SWEEP
    expected = slopes(made, held, 0, source, HEAD) * scale
    np.testing.assert_allclose(np.broadcast_to(found.connections[0], (3, F)), expected, **tight)
    later = [i for i, layer in enumerate(found.layers) if layer >= HEAD[0]]
    assert np.isnan(np.asarray(found.connections)[later]).all() and np.abs(expected).max() > 1e-2


def test_connections__of_other_latents__compile_nothing_and_are_named(small, caplog):
    made = case("gpt2", small)
    ask = lambda layer, feature, head=None: transcoder_connections(
        made.model, made.transcoders, layer=layer, feature=feature, head=head
    )
    first, through = ask(2, 4), ask(2, 4, HEAD)
    with nothing_compiles(caplog):
        other, after = ask(1, 3), ask(2, 0, (0, 1))
    assert np.isnan(other.connections[1:]).all() and np.isnan(after.connections).all()
    name, value = first.top(1)[0]
    row, feature = np.unravel_index(np.nanargmax(np.abs(first.connections)), (3, F))
    assert (name, value) == (f"t{row}[{feature}] -> t2[4]", float(first.connections[row, feature]))
    assert through.top(1)[0][0].endswith("] -> L1.H2 -> t2[4]") and len(through.top(100)) == F
    assert "-&gt; L1.H2 -&gt;" in through._repr_html_()
    with pytest.raises(ArgumentError, match="feature=6: these transcoders have 6 latents"):
        ask(2, 6)
