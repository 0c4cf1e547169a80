"""Paths against a search written out in numpy, whose sums are checked at each step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import circuit_paths, feature_attribution, head_attribution
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from tests.attribution.transcoded import LLAMA, MLA, Held, bare, case
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

LAYER, FEATURE, N_STEPS, N_PATHS = 2, 4, 3, 7
SWEEP, DOUBLE = TOL["float32", "sweep"], TOL["float64", "gradient"]


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def made(small):
    return case("gpt2", small)


@pytest.fixture(scope="module")
def held(made):
    return Held.of(made)


class ByHand:
    """One example of a decoder with LayerNorms before attention and MLP, serial, its transcoders skipping."""

    def __init__(self, made, held, example):
        self.made, self.b = made, jax.tree.map(np.asarray, made.model.blocks)
        acts = {n: np.asarray(held.acts[n]) for n in held.acts}
        layered = {n: x[:, example] for n, x in acts.items() if held.acts.layers[n] is not None}
        self.acts = layered | {n: x[example] for n, x in acts.items() if n not in layered}
        self.f = {i: np.asarray(f)[example] for i, f in made.encode(held.read).items()}
        self.tcs = {i: jax.tree.map(np.asarray, d) for i, d in made.given.items()}

    def back(self, norm, layer, at, reader):
        """What of the stream is read by what reads a norm's output, and what its bias adds."""
        weights, scale = getattr(self.b, norm), self.acts[f"{norm}.scale"][layer, at, 0]
        u = weights.w[layer] * reader
        return (u - u.mean()) / scale, weights.b[layer] @ reader

    def mlp(self, layer, at, reader, bias=0.0):
        u, own = self.back("ln2", layer, at, reader)
        return u, at, layer + 1, layer, bias + own

    def latent(self, layer, feature, at, weight=1.0):
        d = self.tcs[layer]
        return self.mlp(layer, at, weight * d.W_enc[:, feature], weight * d.b_enc[feature])

    def parts(self, reading):
        """Name -> (contribution, what it reads in turn), and the sum of what is bias."""
        u, at, n_attn, n_mlp, bias = reading
        a, b, found = self.acts, self.b, {}
        for l in range(n_mlp):
            d = self.tcs[l]
            for i in range(d.W_dec.shape[0]):
                w = d.W_dec[i] @ u
                found[f"t{l}[{i}] @ {at}"] = self.f[l][at, i] * w, self.latent(l, i, at, w)
            x = a["ln2.normalized"][l, at]
            found[f"skip {l} @ {at}"] = x @ d.W_skip @ u, self.mlp(l, at, d.W_skip @ u)
            error = a["mlp_out"][l, at] - self.f[l][at] @ d.W_dec - d.b_dec - x @ d.W_skip
            found[f"error {l} @ {at}"] = error @ u, None
            bias = bias + d.b_dec @ u
        for l in range(n_attn):
            for h in range(4):
                out = b.attn.W_O[l, h] @ u
                for s in range(6):
                    looks = a["pattern"][l, h, at, s]
                    vector = looks * b.attn.W_V[l, :, h // 2] @ out
                    back, own = self.back("ln1", l, s, vector)
                    own = own + looks * b.attn.b_V[l, h // 2] @ out
                    found[f"L{l}.H{h} @ {s}"] = looks * a["v"][l, s, h // 2] @ out, (back, s, l, l, own)
            bias = bias + b.attn.b_O[l] @ u
        found[f"embed @ {at}"], found[f"pos_embed @ {at}"] = (
            (a["embed"][at] @ u, None),
            (a["pos_embed"][at] @ u, None),
        )
        return found, bias

    def search(self, at, by_size):
        """The paths of each step, as (label, contribution), and the largest gap between a path and what goes on."""
        root = self.latent(LAYER, FEATURE, at)
        z = (
            self.acts["ln2.normalized"][LAYER, at] @ self.tcs[LAYER].W_enc[:, FEATURE]
            + self.tcs[LAYER].b_enc[FEATURE]
        )
        kept, steps, gap = [((f"t{LAYER}[{FEATURE}] @ {at}",), z, root)], [], 0.0
        for _ in range(N_STEPS):
            grown = []
            for names, value, reading in kept:
                if reading is None:
                    continue
                found, bias = self.parts(reading)
                gap = max(gap, abs(value - bias - sum(x for x, _ in found.values())))
                grown += [((*names, name), x, end) for name, (x, end) in found.items() if x != 0]
            kept = sorted(grown, key=lambda path: -(abs(path[1]) if by_size else path[1]))[:N_PATHS]
            steps.append([(self.spelled(names), value) for names, value, _ in kept])
        return steps, gap

    @staticmethod
    def spelled(names):
        """A head's source stands where what it reads begins, if that is no head."""
        upstream = (*names[1:], None)
        told = [
            name.split(" @ ")[0] if name[0] == "L" and after is not None and after[0] != "L" else name
            for name, after in zip(names, upstream, strict=True)
        ]
        return " -> ".join(reversed(told))


@pytest.mark.parametrize("rank", ["value", "size"])
def test_circuit_paths__of_each_step__are_those_of_a_search_by_hand(made, held, rank):
    found = circuit_paths(
        made.model, made.transcoders, made.prompts, layer=LAYER, feature=FEATURE, n_steps=N_STEPS, n_paths=N_PATHS,
        rank=rank,
    )  # fmt: skip
    for example in range(3):
        steps, gap = ByHand(made, held, example).search(int(made.last[example]), rank == "size")
        assert (
            gap < 1e-12
        )  # what goes on from a path, with biases, is the path: contributions multiply and sum
        for step, expected in enumerate(steps):
            labels = [found.label(example, step, i) for i in range(len(expected))]
            assert labels == [name for name, _ in expected]
            values = [value for _, value in expected] + [0] * (N_PATHS - len(expected))
            np.testing.assert_allclose(found.contributions[example, step], values, **DOUBLE)
    places = (np.arange(3), made.last)
    W, b = made.encoder(LAYER, FEATURE)
    np.testing.assert_allclose(found.total, np.asarray(held.read[LAYER])[places] @ W + b, **DOUBLE)
    np.testing.assert_allclose(found.activation, made.encode(held.read)[LAYER][*places, FEATURE], **DOUBLE)
    assert any(value < 0 for _, value in found.top(63)) == (rank == "size")


def test_circuit_paths__of_one_step_and_through_a_head__are_the_parts_that_others_give(made):
    options = {"layer": LAYER, "feature": FEATURE}
    parts = feature_attribution(made.model, made.transcoders, made.prompts, **options)
    found = circuit_paths(
        made.model, made.transcoders, made.prompts, n_steps=N_STEPS, n_paths=N_PATHS, rank="size", **options
    )
    named = dict(parts.top(10**4))
    first = {
        f"example {row['example']}: {row['path']}": row["contribution"]
        for row in found.rows()
        if not row["step"]
    }
    assert len(first) == 3 * N_PATHS
    for name, value in first.items():
        np.testing.assert_allclose(value, named[name], **DOUBLE)
    parents, example = np.asarray(found.parents), 0
    child = next(i for i in range(N_PATHS) if found.parts[example, 0, parents[example, 1, i]] == 1)
    head = tuple(found.index[example, 0, parents[example, 1, child]].tolist())
    through = head_attribution(made.model, made.transcoders, made.prompts, head=head, **options)
    name = f"example {example}: {found.label(example, 1, child)}"
    np.testing.assert_allclose(
        found.contributions[example, 1, child], dict(through.top(10**5))[name], **DOUBLE
    )


def test_prompts_latents_and_positions__others__compile_nothing(made, caplog):
    ask = lambda prompts=made.prompts, layer=LAYER, feature=FEATURE, **more: circuit_paths(
        made.model, made.transcoders, prompts, layer=layer, feature=feature, n_steps=N_STEPS, n_paths=N_PATHS,
        rank="size", **more,
    )  # fmt: skip
    first, order = ask(), jnp.array([2, 0, 1])
    turned = mj.Prompts(made.prompts.tokens[order], made.prompts.mask[order])
    with nothing_compiles(caplog):
        other, before, again, beside = ask(layer=0, feature=1), ask(pos=-2), ask(turned), ask(skip_first=True)
    np.testing.assert_allclose(again.contributions, np.asarray(first.contributions)[order], **DOUBLE)
    assert (np.asarray(other.parts) != 0).all() and np.abs(before.total - first.total).max() > 1e-3
    starts, heads = np.array([0, 2, 0])[:, None, None], np.asarray(beside.parts) == 1
    assert (np.asarray(first.at)[np.asarray(first.parts) == 1] == 0).any()
    assert not (heads & (np.asarray(beside.at) == starts)).any() and heads.any()
    assert not (np.asarray(first.at)[1] < 2).any()  # nothing comes from padding


def test_paths__fewer_than_asked_for__leave_gaps_that_are_told(made):
    found = circuit_paths(
        made.model, made.transcoders, made.prompts, layer=0, feature=1, pos=np.array([0, 2, 0]), n_steps=N_STEPS,
        n_paths=N_PATHS,
    )  # fmt: skip
    there = np.asarray(found.parts) >= 0
    assert there[:, 0].sum() == 3 * 6 and not np.asarray(found.contributions)[~there].any()
    assert len(found.rows()) == there.sum() == len(found.top(100))
    assert {found.label(1, 0, i) for i in range(6)} == {
        "embed @ 2 -> t0[1] @ 2", "pos_embed @ 2 -> t0[1] @ 2", *(f"L0.H{h} @ 2 -> t0[1] @ 2" for h in range(4))
    }  # fmt: skip
    assert "embed @ 0 -&gt; L0.H" in found._repr_html_()
    with pytest.raises(ArgumentError, match=r"no path 6 of step 0 in example 0: .* of step 0 6 paths"):
        found.nodes(0, 0, 6)


def test_circuit_paths__bad_input__is_explained(made, small, as_a_user):
    ask = lambda model=made.model, **more: circuit_paths(
        model, made.transcoders, made.prompts, layer=LAYER, feature=FEATURE, **more
    )
    for wrong in ({"n_steps": 0}, {"n_paths": 0}, {"rank": "top"}):
        with pytest.raises(
            ArgumentError, match="search for at least one step and one path, by 'value' or 'size'"
        ):
            ask(**wrong)
    latent = bare(
        small, **LLAMA | {"latent": MLA, "n_kv_heads": 4, "d_head": 5, "rotary_dim": 2, "n_layers": 3}
    )
    with pytest.raises(UnsupportedModelError, match="nothing can be traced through the heads of this model"):
        ask(latent)
