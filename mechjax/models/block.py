"""One block: attention and MLP around the residual stream, serial or parallel (Wang and Komatsuzaki 2021, GPT-J).

What the two write is all that is added: `resid_post == resid_pre + attn_out + mlp_out`, in every family.
"""

import equinox as eqx
from jaxtyping import Array, Float, Int

from mechjax.models.attention import Attention
from mechjax.models.config import Config
from mechjax.models.marks import marks_of
from mechjax.models.mlp import MLP
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence


class Block(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    ln1: Norm
    attn: Attention
    ln2: Norm | None
    mlp: MLP | None

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        sequence: Sequence,
        window: Int[Array, ""] | None,
        layer: Int[Array, ""] | int,
        config: Config,
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual after this block; `self` holds one layer's weights, `layer` only says which."""
        mark = marks_of(layer, config.n_layers)
        resid = mark(resid, "resid_pre")
        attn_out = mark(
            self.attn(mark(resid, "attn_in"), self.ln1, sequence, window, config, mark), "attn_out"
        )
        if self.ln2 is None or self.mlp is None:
            return mark(resid + attn_out, "resid_post")
        serial = config.residual == "serial"
        mid = mark(resid + attn_out, "resid_mid") if serial else resid
        normalized = self.ln2(mark(mid, "mlp_in"), config, lambda x, name: mark(x, f"ln2.{name}"))
        mlp_out = mark(self.mlp(normalized, config, mark), "mlp_out")
        return mark(mid + mlp_out if serial else resid + attn_out + mlp_out, "resid_post")
