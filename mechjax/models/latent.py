"""What multi-head latent attention is made of (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1)."""

from dataclasses import dataclass
from typing import ClassVar

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_count, check_positive


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Widths of latent attention; static and hashable. A head's queries and keys are `d_nope + d_rope` wide.

    Attributes:
        q_rank: Width of the latent that queries are made of; None where they are made of the residual stream.
        kv_rank: Width of the latent that keys and values are made of.
        d_nope: Dimensions of a query or key that do not rotate.
        d_rope: Dimensions that rotate; in keys, all heads share them. Even.
        d_value: Width of a value.
        norm_eps: What the latents' RMSNorms add to the variance.

    Raises:
        ArgumentError: A number that is absurd; the message names the field.
    """

    __no_type_check__: ClassVar[bool] = True  # checks itself, with better messages, for users too

    q_rank: int | None
    kv_rank: int
    d_nope: int
    d_rope: int
    d_value: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_rank", "d_nope", "d_rope", "d_value"):
            check_count(name, getattr(self, name))
        if self.q_rank is not None:
            check_count("q_rank", self.q_rank)
        check_positive("norm_eps", self.norm_eps)
        if self.d_rope % 2:
            raise ArgumentError(f"`d_rope` = {self.d_rope} must be even: dimensions rotate two by two.")

    def shapes(self, d_model: int, n_heads: int, *, biased: bool) -> dict[str, tuple[int, ...]]:
        """Name in `MLA` and shape, without layer axis, of every parameter. Where `biased`, projections have biases."""
        m, h, q, kv = d_model, n_heads, self.q_rank, self.kv_rank
        d = self.d_nope + self.d_rope
        down = {"W_DQ": (m, q), "b_DQ": (q,), "w_q": (q,)} if q else {}
        shapes = down | {
            "W_Q": (q or m, h, d), "W_DKV": (m, kv), "b_DKV": (kv,), "w_kv": (kv,), "W_UK": (kv, h, self.d_nope),
            "W_UV": (kv, h, self.d_value), "W_KR": (m, self.d_rope), "b_KR": (self.d_rope,),
            "W_O": (h, self.d_value, m), "b_O": (m,),
        }  # fmt: skip
        return {name: shape for name, shape in shapes.items() if biased or not name.startswith("b_")}
