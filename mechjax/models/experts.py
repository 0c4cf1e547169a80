"""What a mixture of experts is made of: how scores choose experts and become weights, and what an expert computes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_choices, check_count, check_positive


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of a decoder's blocks; static and hashable. Every expert is a gated MLP.

    Attributes:
        n_experts: Number of routed experts.
        top_k: How many of them each token goes to.
        d_expert: Number of neurons of one expert.
        scoring: What scores the experts, and what weighs the chosen ones: "softmax" or "sigmoid" of the router's
            output, or "softmax_chosen", a softmax over the chosen ones alone.
        choice_bias: Whether a learned bias is added to the scores for the choice alone, not for the weights.
        normalized: Whether the weights of the chosen experts are divided by their sum.
        scale: Factor on the weights.
        n_groups: Number of groups of experts, of which each token sees only `top_groups`.
        top_groups: How many groups.
        group_score: What a group is chosen by: "max" of its scores, or "top2", the sum of its two best.
        router_bias: Whether the router has a bias.
        biases: Whether the experts' projections have biases.
        swiglu_alpha: With a number a, the gate is x * sigmoid(a * x) in place of the config's activation.
        swiglu_limit: With a number c, the gate is cut at c and the linear branch at -c and c.
        linear_offset: Added to the linear branch before its gate multiplies it.
        d_shared: Number of neurons of the shared experts, together one MLP that every token goes through; 0 for none.
        shared_gate: Whether the shared experts' output is multiplied by a sigmoid of the input.
        layers: Layers that have experts; None for all. The others have an ordinary MLP.

    Raises:
        ArgumentError: A number that is absurd or contradicts another; the message names the field.
    """

    __no_type_check__: ClassVar[bool] = True  # checks itself, with better messages, for users too

    n_experts: int
    top_k: int
    d_expert: int
    scoring: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"
    choice_bias: bool = False
    normalized: bool = False
    scale: float = 1.0
    n_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    router_bias: bool = False
    biases: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    linear_offset: float = 0.0
    d_shared: int = 0
    shared_gate: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("n_experts", "top_k", "d_expert", "n_groups", "top_groups"):
            check_count(name, getattr(self, name))
        if self.d_shared != 0:
            check_count("d_shared", self.d_shared)
        for name in ("scale", "swiglu_alpha", "swiglu_limit"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)
        check_choices(self)
        self._check_groups()
        if self.shared_gate and not self.d_shared:
            raise ArgumentError(
                "`shared_gate` = True gates shared experts, but `d_shared` = 0: there are none."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def _check_groups(self) -> None:
        if self.n_experts % self.n_groups or self.top_groups > self.n_groups:
            raise ArgumentError(
                f"`n_experts` = {self.n_experts} experts cannot be routed by `top_groups` = {self.top_groups} of "
                f"`n_groups` = {self.n_groups} groups: groups must be equal, and no more chosen than there are."
            )
        size = self.n_experts // self.n_groups
        if self.top_k > self.top_groups * size:
            raise ArgumentError(
                f"`top_k` = {self.top_k} experts cannot be chosen from `top_groups` = {self.top_groups} groups of "
                f"{size}: choose fewer experts or more groups."
            )
        if self.group_score == "top2" and size < 2:
            raise ArgumentError(
                '`group_score` = "top2" needs groups of at least two experts; these have one.'
            )

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Name in `MoE` and shape, without layer axis, of every parameter."""
        e, m, f, s = self.n_experts, d_model, self.d_expert, self.d_shared
        shapes = {
            "W_router": (m, e), "b_router": (e,), "b_choice": (e,),
            "W_in": (e, m, f), "W_gate": (e, m, f), "W_out": (e, f, m),
            "b_in": (e, f), "b_gate": (e, f), "b_out": (e, m),
            "shared.W_in": (m, s), "shared.W_gate": (m, s), "shared.W_out": (s, m), "W_shared_gate": (m,),
        }  # fmt: skip
        has = {
            "b_router": self.router_bias, "b_choice": self.choice_bias, "b_in": self.biases, "b_gate": self.biases,
            "b_out": self.biases, "shared.W_in": s > 0, "shared.W_gate": s > 0, "shared.W_out": s > 0,
            "W_shared_gate": self.shared_gate,
        }  # fmt: skip
        return {name: shape for name, shape in shapes.items() if has.get(name, True)}
