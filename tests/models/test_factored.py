"""Factored matrices against dense ones, circuits against what heads do, both against TransformerLens."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.models.factored import FactoredMatrix, composition, composition_scores, copying_score, ov, qk
from tests.models.rewrite.oracle import oracle
from tests.models.rewrite.subjects import TOKENS, assert_close, subject
from tests.tolerances import TOL

CLOSE = TOL["float32", "parity"]


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def dense(factored):
    return np.asarray(factored.A, np.float64) @ np.asarray(factored.B, np.float64)


@pytest.fixture(scope="module")
def thin():
    """2 x 3 matrices of 7 x 5 and rank 4, the left factor shared over the second axis."""
    return FactoredMatrix(draw(2, 1, 7, 4), draw(3, 4, 5))


@pytest.fixture(scope="module")
def square():
    return FactoredMatrix(draw(2, 3, 6, 4), draw(2, 3, 4, 6, seed=1))


def test_product__and_its_parts__are_those_of_the_dense_matrix(thin):
    assert (thin.shape, thin.ndim) == ((2, 3, 7, 5), 4)
    assert_allclose(thin.AB, dense(thin), **CLOSE)
    assert_allclose(thin.T.AB, dense(thin).swapaxes(-1, -2), **CLOSE)
    assert_allclose(thin.norm, np.linalg.norm(dense(thin), axis=(-2, -1)), **CLOSE)


def test_norm__of_factors_that_nearly_cancel__is_exact_to_the_factors():
    near = FactoredMatrix(jnp.array([[1.0, 1.0]]), jnp.array([[1.0], [-1.0 + 1 / 1024]]))
    assert_close(near.norm, 1 / 1024, "spectrum")


@pytest.mark.parametrize("mid", [4, 9])
def test_svd__of_wide_and_thin_factors__is_numpys(mid):
    factored = FactoredMatrix(draw(2, 7, mid), draw(2, mid, 6))
    U, S, Vh = factored.svd()
    rank = min(mid, 6)
    assert (U.shape, S.shape, Vh.shape) == ((2, 7, rank), (2, rank), (2, rank, 6))
    assert_close(S, np.linalg.svd(dense(factored), compute_uv=False)[:, :rank])
    assert_close((U * S[:, None]) @ Vh, dense(factored))
    for rows in (U.mT, Vh):
        assert_close(rows @ rows.mT, np.broadcast_to(np.eye(rank), (2, rank, rank)))


def sorted_by_size(values):
    values = np.asarray(values)
    return np.take_along_axis(values, np.lexsort((values.imag, -np.abs(values).round(4)), -1), -1)


def test_eigenvalues__and_trace__are_numpys(square):
    expected = sorted_by_size(np.linalg.eigvals(dense(square)))[..., :4]
    assert_close(sorted_by_size(square.eigenvalues), expected, "spectrum")
    assert_allclose(square.trace, np.trace(dense(square), axis1=-2, axis2=-1), **CLOSE)
    assert_close(square.eigenvalues.sum(-1).real, square.trace, "spectrum")


def test_matmul__with_factored_dense_and_vectors__is_dense(thin, square):
    narrower = FactoredMatrix(draw(6, 2), draw(2, 5))
    assert ((square @ narrower).shape, (square @ narrower).A.shape[-1]) == ((2, 3, 6, 5), 2)
    assert_close((square @ narrower).AB, dense(square) @ dense(narrower))
    wider = FactoredMatrix(draw(5, 8), draw(8, 3))
    assert (thin @ wider).A.shape[-1] == 4
    assert_close((thin @ wider).AB, dense(thin) @ dense(wider))
    assert_allclose((thin @ draw(5, 2)).AB, dense(thin) @ np.asarray(draw(5, 2)), **CLOSE)
    for left in (draw(2, 7), np.asarray(draw(2, 7))):
        assert_allclose((left @ thin).AB, np.asarray(left) @ dense(thin), **CLOSE)
    assert_allclose(thin @ draw(5), dense(thin) @ np.asarray(draw(5)), **CLOSE)
    assert_allclose(draw(7) @ thin, np.asarray(draw(7)) @ dense(thin), **CLOSE)


def test_index__leading_axes__indexes_the_matrices(thin):
    for index in (1, (0, 2), (slice(None), 1), (slice(None), [0, 2]), (None, 1), np.array([1, 0])):
        assert_allclose(thin[index].AB, dense(thin)[index], **CLOSE)
    assert_allclose(thin[..., 2].AB, dense(thin)[:, 2], **CLOSE)
    with pytest.raises(
        ShapeError, match=r"3 indices for the 2 leading axes .*`\.AB\[\.\.\.\]` indexes the product"
    ):
        thin[0, 0, 0]


def test_factored__compiled_mapped_and_narrow__works(square):
    assert_allclose(eqx.filter_jit(lambda m: m.norm)(square), square.norm, **CLOSE)
    assert_allclose(jax.vmap(lambda m: m.svd()[1])(square), square.svd()[1], **CLOSE)
    narrow = FactoredMatrix(square.A.astype(jnp.bfloat16), square.B.astype(jnp.bfloat16))
    assert narrow.norm.dtype == narrow.svd()[0].dtype == jnp.float32
    assert_allclose(narrow.norm, square.norm, **TOL["bfloat16", "parity"])
    assert "2, 3, 6, 4" in repr(narrow)


def test_factored__large_and_thin__never_forms_the_product():
    big = FactoredMatrix(draw(997, 2), draw(2, 997))
    for what in (lambda m: m.svd(), lambda m: m.norm, lambda m: m.trace, lambda m: composition_scores(m, m)):
        assert "997,997" not in str(jax.make_jaxpr(what)(big))
    assert "997,997" in str(jax.make_jaxpr(lambda m: m.AB)(big))


def test_errors__shapes_that_do_not_fit__say_which(thin, square, as_a_user):
    with pytest.raises(ShapeError, match=r"\(7, 4\) and \(5, 4\) have no product.*Transpose one"):
        FactoredMatrix(draw(7, 4), draw(5, 4))
    with pytest.raises(ShapeError, match=r"no product.*leading axes that broadcast"):
        FactoredMatrix(draw(2, 7, 4), draw(3, 4, 5))
    with pytest.raises(ShapeError, match=r"shape \(2, 3, 7, 5\) do not multiply .* meets \(7, 2\)"):
        thin @ draw(7, 2)
    for what in (lambda: thin.trace, lambda: thin.eigenvalues):
        with pytest.raises(ShapeError, match=r"Only square matrices .*\(2, 3, 7, 5\).*svd"):
            what()
    with pytest.raises(ShapeError, match=r"write 5 dimensions, those .* read 6: take circuits of one model"):
        composition_scores(thin, square)


def test_composition_scores__every_pair__are_those_of_dense_matrices(thin):
    right = FactoredMatrix(draw(4, 5, 3), draw(3, 8))
    scores = composition_scores(thin, right)
    assert scores.shape == (2, 3, 4)
    L, R = dense(thin)[:, :, None], dense(right)
    norm = lambda x: np.linalg.norm(x, axis=(-2, -1))
    assert_allclose(scores, norm(L @ R) / norm(L) / norm(R), **CLOSE)


def test_composition_scores__same_and_orthogonal_directions__are_one_and_zero():
    e = jnp.eye(3)
    writes = FactoredMatrix(e[:, :1], e[:1])
    reads = FactoredMatrix(jnp.stack([e[:, :1], e[:, 1:2]]), jnp.stack([e[2:], e[2:]]))
    assert_array_equal(composition_scores(writes, reads), [1.0, 0.0])


def test_composition__heads_that_are_not_earlier__are_nan(as_a_user):
    found = composition(subject("layer_norm"), "v")
    earlier = np.array([[False, True], [False, False]])[:, None, :, None]
    assert_array_equal(np.isfinite(found.scores), np.broadcast_to(earlier, (2, 4, 2, 4)))
    place, score = found.top(1)[0]
    assert place.startswith("L0.H") and ".L1.H" in place
    assert score == pytest.approx(float(np.nanmax(found.scores)))
    with pytest.raises(ArgumentError, match="`through` = 'z' is not one of 'q', 'k', 'v'"):
        composition(subject("layer_norm"), "z")


def test_circuits__of_a_model_without_biases__are_what_its_heads_do():
    model = subject("no_biases")
    _, acts = mj.capture(model, ["ln1.normalized", "attn_scores", "pattern", "result"])(TOKENS)
    read = acts["ln1.normalized"][:, :, None]  # layer, batch, head, pos, d_model
    scores = read @ qk(model).AB[:, None] @ read.mT * model.config.attn_scale
    seen = np.tri(7, dtype=bool)
    assert_close(np.where(seen, scores, 0), np.where(seen, acts["attn_scores"], 0))
    moved = acts["pattern"] @ (read @ ov(model).AB[:, None])
    assert_close(moved.swapaxes(2, 3), acts["result"])


def test_qk__queries_and_keys_with_rms_norms__has_their_scales():
    model = subject("both_norms")
    bare = jax.tree.map(jnp.zeros_like, (model.blocks.attn.b_Q, model.blocks.attn.b_K))
    model = eqx.tree_at(lambda m: (m.blocks.attn.b_Q, m.blocks.attn.b_K), model, bare)
    sites = ["ln1.normalized", "attn_scores", "q_norm.scale", "k_norm.scale"]
    _, acts = mj.capture(model, sites)(TOKENS)
    read = acts["ln1.normalized"][:, :, None]
    scores = read @ qk(model).AB[:, None] @ read.mT * model.config.attn_scale
    q, k = (acts[f"{letter}_norm.scale"].swapaxes(2, 3) for letter in "qk")
    seen = np.tri(7, dtype=bool)
    assert_close(np.where(seen, scores / q / k.mT, 0), np.where(seen, acts["attn_scores"], 0))
    with pytest.raises(
        UnsupportedModelError, match=r"`qk` cannot be read off .*`qk_norm` = 'per_head'.*Capture"
    ):
        qk(subject("layer_post_norms"))


@pytest.mark.parametrize("name", ["latent", "latent_without_rank"])
def test_circuits__of_latent_attention__are_what_its_heads_do_but_for_the_latents_scales(name):
    model = subject(name)
    latent = model.config.latent
    attn = model.blocks.attn
    biases = [b for b in ("b_DQ", "b_DKV", "b_O") if getattr(attn, b) is not None]
    for bias in biases:
        at = lambda m, bias=bias: getattr(m.blocks.attn, bias)
        model = eqx.tree_at(at, model, jnp.zeros_like(at(model)))
    _, acts = mj.capture(model, ["ln1.normalized", "q", "k", "pattern", "result"])(TOKENS)
    read = acts["ln1.normalized"]

    def scale(W):
        rows = jnp.einsum("lbpm,lmr->lbpr", read, W)
        return jnp.sqrt(jnp.square(rows).mean(-1, keepdims=True) + latent.norm_eps)[:, :, None]

    of_k = read[:, :, None] / scale(attn.W_DKV)
    of_q = read[:, :, None] / (1.0 if attn.W_DQ is None else scale(attn.W_DQ))
    q, k = (acts[site][..., : latent.d_nope].swapaxes(2, 3) for site in "qk")
    assert_close(of_q @ qk(model).AB[:, None] @ of_k.mT, np.asarray(q @ k.mT))
    moved = acts["pattern"] @ (of_k @ ov(model).AB[:, None])
    assert_close(moved.swapaxes(2, 3), np.asarray(acts["result"]))
    assert composition(model, "v").scores.shape == (2, 4, 2, 4)


def test_copying_score__heads_that_copy_and_that_shun__are_one_and_minus_one():
    model = subject("attention_only")
    half = jnp.concatenate([jnp.eye(4), jnp.zeros((8, 4))])
    sign = jnp.array([1.0, -1.0, 1.0, -1.0])
    attn = model.blocks.attn
    W_V = jnp.broadcast_to(half[:, None], attn.W_V.shape)
    W_O = jnp.broadcast_to(sign[:, None, None] * half.T, attn.W_O.shape)
    copier = eqx.tree_at(lambda m: (m.blocks.attn.W_V, m.blocks.attn.W_O), model, (W_V, W_O))
    assert_allclose(copying_score(copier), np.broadcast_to(sign, (2, 4)), **CLOSE)  # tied: W_U = W_E^T


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def theirs(request):
    """What TransformerLens computed, and the same checkpoint as mechjax loads it."""
    return oracle(request.param)


def test_circuits__against_transformerlens__are_equal(theirs):
    found, model = theirs
    for name, circuits in (("qk", qk(model)), ("ov", ov(model))):
        assert_close(circuits.norm, found[f"{name}/norm"])
        assert_close(circuits.svd()[1], found[f"{name}/S"])
        values, expected = (sorted_by_size(x) for x in (circuits.eigenvalues, found[f"{name}/eigenvalues"]))
        assert_close(values, expected, "spectrum")
    assert_close(copying_score(model), found["copying"], "spectrum")


@pytest.mark.parametrize("through", ["q", "k", "v"])
def test_composition__against_transformerlens__is_equal(theirs, through):
    found, model = theirs
    assert_close(np.nan_to_num(composition(model, through).scores), found[f"composition/{through}"])
