"""Hold the matrices of a model's blocks in 8 or 4 bits, or in full again."""

from typing import Any, TypeVar

import equinox as eqx
import jax

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.models.needs import needs_decoder
from mechjax.models.quantized import full, holds_quantized
from mechjax.models.rounding import Scheme, is_matrix, rounded, scheme
from mechjax.models.structures import Model

M = TypeVar("M")


@needs_decoder("weights", also=Model)
@on_any_mesh
def quantize(model: M, bits: int = 8, *, group: int | None = None) -> M:
    """Round the matrices of blocks to 8 or 4 bits, which products multiply as they are; activations stay floats.

    Symmetric, to the nearest: `q = round(W / scale)` with `scale = max |W| / 127` (8 bits) or `/ 7` (4 bits) over what
    an output sums over, or over `group` neighbours in that. Embeddings (of patches too), the unembedding and other
    heads, norms, biases and routers are kept, as LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) and GPTQ (Frantar
    et al. 2022, arXiv:2210.17323) keep them, and so are a Mamba's convolutions, decays and `W_dt`.
    `models/rounding.py` has the table. No data is needed.

    Changes the function, within bounds: no weight is off by more than half its scale, so no result of a product by more
    than the sum of `|x| * scale / 2`. Measured on `tasks-4l`, 256 prompts of indirect objects: a KL divergence of 5e-5
    per position (0.003 at most) in 8 bits, 0.02 in 4 bits, 0.006 in groups of 8. Small models lose more in 4 bits than
    large ones: compare what you find with the model in full. `dequantize` gives the same function in ordinary arrays,
    to rounding.

    Blocks take 1/4 of float32 in 8 bits and 1/8 in 4, and beside that a scale of the model's dtype for each group: in 4
    bits and groups of 32 that is 4.5 bits a weight in bfloat16, 5 in float32. A forward makes one matrix of one layer
    in full at a time. It is no faster where it waits for arithmetic, as on a CPU.

    Args:
        model: A decoder, an encoder, a T5, a ViT or a Mamba.
        bits: 8 or 4.
        group: How many neighbouring weights share a scale; None for all that an output sums over (8 bits) or 32 (4
            bits). Of attention's `W_O`, which sums over all heads, a group that is neither whole heads nor a part of
            one becomes the largest part that divides both.

    Raises:
        ArgumentError: Other bits, a group that does not divide, or a model that is quantised.
        NeedsDecoderError: What is no model of mechjax.
    """
    if holds_quantized(model):
        raise ArgumentError(
            "`quantize`: this model's matrices are in few bits already, and rounded twice they would be further off. "
            "Load it again, or round what it stands for: `quantize(dequantize(model), bits)`."
        )
    return _rounded(model, scheme(bits, group))


@needs_decoder("weights", also=Model)
@on_any_mesh
def dequantize(model: M) -> M:
    """The model with ordinary arrays in place of matrices in few bits: the same function, but for the order of sums.

    What reads weights or rewrites them needs no more than this. Takes the memory of the model in full; the digits that
    rounding lost stay lost. A model without such matrices comes back as it is.

    Raises:
        NeedsDecoderError: What is no model of mechjax.
    """
    return _full(model) if holds_quantized(model) else model


@eqx.filter_jit
def _rounded(model: M, how: Scheme) -> M:
    def held(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return rounded(leaf, name, how) if is_matrix(name) else leaf

    return jax.tree_util.tree_map_with_path(held, model)


_full = eqx.filter_jit(full)
