"""Matrices kept as a product of two thin ones, and the circuits of heads, which are such matrices.

A head reads and writes the residual stream through `W_Q W_K^T` (QK: where it looks) and `W_V W_O` (OV: what
it moves), matrices of d_model x d_model and rank d_head (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits", transformer-circuits.pub/2021/framework). Rows are inputs throughout: `x @ ov` is what
a head writes having seen `x`.

They are read off the weights: scales of norms are not in them (`mechjax.models.rewrite.fold_norm` puts them
in), nor biases (`refactor_qk_ov` says what becomes of those), and with rotary positions QK is that of a query
and a key at the same position only.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Complex, Float

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.config import Config
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.models.mla import MLA
from mechjax.models.needs import needs_decoder
from mechjax.models.norms import Norm
from mechjax.models.quantized import full


class FactoredMatrix(Record):
    """`A @ B`, never formed: matrices of `left x right` and rank at most `mid`, with any leading axes.

    Leading axes of the factors broadcast. Linear algebra is done in float32 at least, on matrices of `mid x
    mid` after a QR decomposition of each factor: `O((left + right) mid^2)`, where the product would cost
    `left right min(left, right)`.

    Attributes:
        A: Left factors. Shape (..., left, mid).
        B: Right factors. Shape (..., mid, right).
    """

    __array_ufunc__: ClassVar[None] = None  # has numpy leave `array @ factored` to us

    A: Float[Array, "... left mid"]
    B: Float[Array, "... mid right"]

    def __check_init__(self) -> None:
        if self.A.ndim >= 2 and self.B.ndim >= 2 and self.A.shape[-1] == self.B.shape[-2]:
            try:
                jnp.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
                return
            except ValueError:
                pass
        raise ShapeError(
            f"Factors of shapes {self.A.shape} and {self.B.shape} have no product: they need shapes (..., left, mid) "
            "and (..., mid, right), with leading axes that broadcast. Transpose one, or add axes of size 1."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product: (..., left, right)."""
        return (*self._lead, self.A.shape[-2], self.B.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return len(self.shape)

    @property
    def _lead(self) -> tuple[int, ...]:
        return jnp.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])

    @property
    @on_any_mesh
    def AB(self) -> Float[Array, "... left right"]:
        """The product itself."""
        return _times(self.A, self.B)

    @property
    def T(self) -> "FactoredMatrix":
        """Transposes of the matrices; leading axes stay."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @on_any_mesh
    def __matmul__(self, other: Any) -> Any:
        """Product with a factored matrix (at the smaller rank) or a matrix, factored again; or with a vector."""
        if isinstance(other, FactoredMatrix):
            middle = self._met(_times, self.B, other.A)
            if middle.shape[-2] <= middle.shape[-1]:
                return FactoredMatrix(self.A, _times(middle, other.B))
            return FactoredMatrix(_times(self.A, middle), other.B)
        other = jnp.asarray(other)
        if other.ndim == 1:
            return self._met(lambda B, x: _times(self.A, _times(B, x)[..., None])[..., 0], self.B, other)
        return FactoredMatrix(self.A, self._met(_times, self.B, other))

    @on_any_mesh
    def __rmatmul__(self, other: Any) -> Any:
        other = jnp.asarray(other)
        if other.ndim == 1:
            return self.T @ other
        return FactoredMatrix(self._met(_times, other, self.A), self.B)

    def _met(self, product: Any, x: Array, y: Array) -> Array:
        """A product, or an error that names the sizes that do not meet."""
        try:
            return product(x, y)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                f"Matrices of shape {self.shape} do not multiply with the other operand: {x.shape} meets "
                f"{y.shape}. Inner sizes must be equal and leading axes broadcast; transpose with `.T`, or index."
            ) from error

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Index the leading axes: `circuits[3, 2]` is the matrix of layer 3, head 2."""
        places = index if isinstance(index, tuple) else (index,)
        taken = sum(1 for place in places if place is not None and place is not Ellipsis)
        if taken > len(self._lead):
            raise ShapeError(
                f"{taken} indices for the {len(self._lead)} leading axes of shape {self.shape}: the matrices "
                "themselves are not indexed. `.AB[...]` indexes the product, an ordinary array."
            )
        if Ellipsis in [place for place in places if place is None or place is Ellipsis]:
            places = (*places, slice(None), slice(None))
        A, B = (jnp.broadcast_to(x, (*self._lead, *x.shape[-2:])) for x in (self.A, self.B))
        return FactoredMatrix(A[places], B[places])

    @property
    @on_any_mesh
    def norm(self) -> Float[Array, "..."]:
        """Frobenius norm."""
        left, right = _triangle(self.A), _triangle(self.B.mT)
        return jnp.linalg.norm(_times(left, right.mT), axis=(-2, -1))

    @property
    @on_any_mesh
    def trace(self) -> Float[Array, "..."]:
        """Sum of the diagonal, which is the sum of the eigenvalues."""
        self._square("trace")
        A, B = widened(self.A), widened(self.B)
        return (A * B.mT).sum((-2, -1))

    @on_any_mesh
    def svd(
        self,
    ) -> tuple[Float[Array, "... left rank"], Float[Array, "... rank"], Float[Array, "... rank right"]]:
        """U, S, Vh with `AB = U @ diag(S) @ Vh`, singular values falling; `rank` is at most `mid`."""
        Q_A, R_A = jnp.linalg.qr(widened(self.A))
        Q_B, R_B = jnp.linalg.qr(widened(self.B.mT))
        U, S, Vh = jnp.linalg.svd(_times(R_A, R_B.mT), full_matrices=False)
        return _times(Q_A, U), S, _times(Vh, Q_B.mT)

    @property
    @on_any_mesh
    def eigenvalues(self) -> Complex[Array, "... mid"]:
        """The eigenvalues that can differ from zero: those of the small product `B @ A`. In no order.

        Always computed on the host's CPU where values are concrete, because not every accelerator can.

        Raises:
            ShapeError: The matrices are not square.
        """
        self._square("eigenvalues")
        small = _times(widened(self.B), widened(self.A))
        if isinstance(small, Tracer):
            return jnp.linalg.eigvals(small)
        found = np.linalg.eigvals(whole(small))  # real where all of them are
        return jnp.asarray(found, np.result_type(found.dtype, np.complex64))

    def _square(self, what: str) -> None:
        if self.shape[-1] != self.shape[-2]:
            raise ShapeError(
                f"Only square matrices have `{what}`; these have shape {self.shape}. Singular values are `.svd()[1]`."
            )


class Composition(Record):
    """How much heads read of what earlier heads write.

    Attributes:
        scores: Score of a writing head (`layer`, `head`) and a head that reads it. NaN where it does not come
        earlier. through: What the reader reads it with: "q", "k" or "v" (static).
    """

    scores: Float[Array, "layer head reader_layer reader_head"]
    through: Literal["q", "k", "v"] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Readers are labelled as heads are: `L0.H3.L2.H1` is layer 0, head 3, read by layer 2, head 1."""
        _, _, layers, heads = self.scores.shape
        return {
            "reader_layer": tuple(f"L{i}" for i in range(layers)),
            "reader_head": tuple(f"H{i}" for i in range(heads)),
        }


@needs_decoder("weights")
@on_any_mesh
def qk(model: Decoder) -> FactoredMatrix:
    """`W_Q @ W_K^T` of every head (leading axes layer, head): a query head with the keys that it reads.

    Where queries and keys, or the latents that they are made of, have RMSNorms, their scales are in it, and it is exact
    up to a positive factor for each query and each key. Of latent attention it is the part that does not rotate: the
    rest of a key is not normalised with it, so there is no one matrix for both.

    Raises:
        UnsupportedModelError: Queries and keys have LayerNorms, which are not of this form.
    """
    attn, config = model.blocks.attn, model.config
    weights: Any = full(attn)
    if isinstance(attn, MLA):
        nope = weights.W_UK.shape[-1]
        Q, K = (
            _up(_down(weights.W_DQ, weights.w_q), weights.W_Q[..., :nope]),
            _up(_down(weights.W_DKV, weights.w_kv), weights.W_UK),
        )
        return FactoredMatrix(Q, K.mT)
    if config.qk_norm != "none" and config.norm != "rms":
        raise UnsupportedModelError(
            f"`qk` cannot be read off this model, which has `qk_norm` = {config.qk_norm!r} with `norm` = "
            f"{config.norm!r}: LayerNorms of queries and keys subtract means and add biases. Capture `attn_scores`."
        )
    Q, K = (_scaled(W, norm, config) for W, norm in ((weights.W_Q, attn.q_norm), (weights.W_K, attn.k_norm)))
    return FactoredMatrix(Q.transpose(0, 2, 1, 3), _per_head(K, model).transpose(0, 2, 3, 1))


@needs_decoder("weights")
@on_any_mesh
def ov(model: Decoder) -> FactoredMatrix:
    """`W_V @ W_O` of every head (leading axes layer, head): a query head with the values that it moves.

    Of latent attention, `W_DKV @ W_UV @ W_O` with the scales of the latent's norm: exact up to a positive factor for
    each key.
    """
    attn = model.blocks.attn
    weights: Any = full(attn)
    if isinstance(attn, MLA):
        return FactoredMatrix(_up(_down(weights.W_DKV, weights.w_kv), weights.W_UV), weights.W_O)
    return FactoredMatrix(_per_head(weights.W_V, model).transpose(0, 2, 1, 3), weights.W_O)


@on_any_mesh
def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Array, "..."]:
    """`||L R|| / (||L|| ||R||)` of every matrix of `left` with every one of `right` (Frobenius norms).

    Between 0 and 1: how much of what `left` writes lies where `right` reads. Random matrices do not score 0:
    judge a score against those of the same shapes. Where a norm is 0 it is NaN.

    Args:
        left: Matrices that write, with leading axes such as (layer, head).
        right: Matrices that read, with leading axes of their own.

    Returns:
        Leading axes of `left`, then those of `right`.

    Raises:
        ShapeError: What one writes is not what the other reads.
    """
    if left.shape[-1] != right.shape[-2]:
        raise ShapeError(
            f"Matrices of shape {left.shape} write {left.shape[-1]} dimensions, those of shape {right.shape} read "
            f"{right.shape[-2]}: take circuits of one model, or transpose with `.T`."
        )
    writes = _times(_triangle(left.A), widened(left.B))  # same norm in any product from the right, `mid` rows
    reads = _times(widened(right.A), _triangle(right.B.mT).mT)
    writes, reads = (
        jnp.broadcast_to(x, (*f.shape[:-2], *x.shape[-2:])) for x, f in ((writes, left), (reads, right))
    )
    columns = jnp.moveaxis(reads.reshape(-1, *reads.shape[-2:]), 1, 0)  # one product with all that read

    def against_all(write: Array) -> Array:
        product = _times(write, columns.reshape(len(columns), -1)).reshape(-1, *columns.shape[1:])
        return jnp.linalg.norm(product, axis=(0, 2))

    both = lax.map(against_all, writes.reshape(-1, *writes.shape[-2:]))
    sizes = [jnp.linalg.norm(x, axis=(-2, -1)) for x in (writes, reads)]
    both = both.reshape(*sizes[0].shape, *sizes[1].shape)
    return both / jnp.expand_dims(sizes[0], tuple(range(-sizes[1].ndim, 0))) / sizes[1]


@needs_decoder("weights")
@on_any_mesh
def composition(model: Decoder, through: Literal["q", "k", "v"]) -> Composition:
    """How much each head's queries, keys or values are made of what each earlier head writes.

    Elhage et al. 2021, "Composition": `||W_OV^1 W_QK^2||`, `||W_OV^1 (W_QK^2)^T||`, `||W_OV^1 W_OV^2||` over
    the product of norms. Says what could be read, not what is: norms, patterns and everything between the
    heads are left out. Costs `(n_layers n_heads d_head)^2 d_model` multiplications.

    Args:
        model: The decoder; `fold_norm` it first, or the scales of its norms are left out.
        through: "q", "k" or "v".

    Raises:
        ArgumentError: Another `through`.
    """
    readers = {"q": lambda: qk(model), "k": lambda: qk(model).T, "v": lambda: ov(model)}
    if through not in readers:
        raise ArgumentError(f"`through` = {through!r} is not one of 'q', 'k', 'v'.")
    scores = composition_scores(ov(model), readers[through]())
    layer = jnp.arange(model.config.n_layers)
    earlier = layer[:, None, None, None] < layer[None, None, :, None]
    return Composition(jnp.where(earlier, scores, jnp.nan), through)


@needs_decoder("weights")
@on_any_mesh
def copying_score(model: Decoder) -> Float[Array, "layer head"]:
    """From -1 to 1: whether what a head moves makes the tokens that it moves likelier.

    Sum of the eigenvalues of `W_E W_V W_O W_U` over the sum of their sizes (Elhage et al. 2021, "Copying"), 1
    where all are positive. A matrix with positive eigenvalues may still lower some tokens' own logits, and
    what lies between embedding, head and unembedding is left out.

    Args:
        model: The decoder; `fold_norm` it first, or the scales of its norms are left out.
    """
    table = widened(model.W_E)
    unembedding = table.T if model.W_U is None else widened(model.W_U)
    around = _times(
        unembedding, table
    )  # d_model x d_model: the vocabulary is summed over once, not for each head
    circuits = ov(model)
    values = FactoredMatrix(circuits.A, _times(widened(circuits.B), around)).eigenvalues
    return values.real.sum(-1) / jnp.abs(values).sum(-1)


def _down(W: Array | None, w: Array | None) -> Array | None:
    """The matrix that makes a latent, with the scales of its norm; None where there is no latent."""
    return None if W is None or w is None else widened(W) * widened(w)[:, None]


def _up(down: Array | None, W: Array) -> Float[Array, "layer head d_model d"]:
    """What each head makes of the residual stream through a latent, or without one."""
    per_head = W.transpose(0, 2, 1, 3)
    return per_head if down is None else _times(down[:, None], widened(per_head))


def _per_head(W: Array, model: Decoder) -> Array:
    """Keys or values of each query head, repeated where heads share them."""
    config = model.config
    return jnp.repeat(W, config.n_heads // config.n_kv_heads, axis=-2)


def _scaled(W: Array, norm: Norm | None, config: Config) -> Array:
    """Queries or keys with the scales of their norm, one for all heads or one for each."""
    if norm is None or norm.w is None:
        return W
    scale = widened(norm.w) + config.norm_offset
    return widened(W) * (scale[:, None, None] if scale.ndim == 2 else scale[:, None])


def _times(x: Array, y: Array) -> Array:
    if x.dtype != y.dtype:
        x, y = widened(x), widened(y)
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _triangle(x: Array) -> Float[Array, "... rank mid"]:
    """R of the QR decomposition: as many rows as columns, and the norm of `R @ y` is that of `x @ y`."""
    return jnp.linalg.qr(widened(x), mode="r")
