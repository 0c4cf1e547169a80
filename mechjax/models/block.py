"""One block: attention and MLP around the residual stream, serial or parallel (Wang and Komatsuzaki 2021, GPT-J).

What the two write is all that is added: `resid_post == resid_pre + attn_out + mlp_out`, in every family. Where norms
stand after attention and MLP (Liu et al. 2022, arXiv:2111.09883), or their output is scaled, what is written is what
comes out of that.
"""

import equinox as eqx
from jaxtyping import Array, Float, Int

from mechjax.models.attention import Attention
from mechjax.models.cache import Keys
from mechjax.models.config import Config
from mechjax.models.marks import Mark, marks_of, under, unmarked
from mechjax.models.mla import MLA
from mechjax.models.mlp import MLP
from mechjax.models.moe import MoE
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence, Varying
from mechjax.parallel.examples import over_examples
from mechjax.transform.context import wanted


class Block(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis; what the config leaves out is None.

    Where some layers have an MLP and others experts, `mlp` stacks the ones and `moe` the others, and of the two a
    single layer has one.
    """

    ln1: Norm | None
    attn: Attention | MLA
    ln1_post: Norm | None
    ln2: Norm | None
    mlp: MLP | None
    moe: MoE | None
    ln2_post: Norm | None

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        sequence: Sequence,
        varying: Varying,
        layer: Int[Array, ""] | int,
        config: Config,
        cache: Keys | None = None,
        mark: Mark | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], Keys | None]:
        """The residual after this block, and the cache; `self` holds one layer's weights, `layer` only says which.

        Another `mark` may look at what it names, and change it.
        """
        start = 0 if cache is None else cache.start
        mark = mark or marks_of(layer, config, start=start)
        resid = mark(over_examples(resid), "resid_pre")
        shares, serial = config.residual == "parallel_shared", config.residual == "serial"
        read = resid if shares and not wanted("attn_in") else mark(resid, "attn_in")
        first = resid if shares else read
        normalized = _normalized(first, self.ln1, "ln1", config, mark)
        own = _own(normalized, first, read, self.ln1, config)
        attn_out, cache = self.attn(read, own, self.ln1, sequence, varying, config, mark, layer, cache)
        attn_out = _written(attn_out, self.ln1_post, "attn_out", "ln1_post", config, mark)
        if (mlp := self.mlp if self.moe is None else self.moe) is None:
            return mark(resid + attn_out, "resid_post"), cache
        mid = mark(over_examples(resid + attn_out), "resid_mid") if serial else resid
        read = mid if shares and not wanted("mlp_in") else mark(mid, "mlp_in")
        if shares:
            own = _own(normalized, resid, read, self.ln1, config)
        else:
            own = _normalized(read, self.ln2, "ln2", config, mark)
        having = config.expert_layers if mlp is self.moe else config.mlp_layers
        inside = marks_of(layer, config, having, start) if config.mixed and mark is not unmarked else mark
        mlp_out = _written(mlp(own, config, inside), self.ln2_post, "mlp_out", "ln2_post", config, mark)
        last = mid + mlp_out if serial else resid + attn_out + mlp_out
        return mark(over_examples(last), "resid_post"), cache


def _normalized(read: Array, norm: Norm | None, place: str, config: Config, mark: Mark) -> Array:
    return read if norm is None else over_examples(norm(read, config, under(mark, place)))


def _own(shared: Array, resid: Array, read: Array, norm: Norm | None, config: Config) -> Array:
    """What one reader of a shared norm reads: `shared`, unless it reads something else than the residual.

    Added as a difference, so that edits of the norm's sites reach both readers, and edits of `read` only one.
    """
    if read is resid or norm is None:
        return shared
    return shared + (norm(read, config) - norm(resid, config))


def _written(out: Array, norm: Norm | None, site: str, place: str, config: Config, mark: Mark) -> Array:
    """What is added to the residual."""
    out = _normalized(out, norm, place, config, mark)
    return mark(out if config.residual_scale == 1.0 else config.residual_scale * out, site)
