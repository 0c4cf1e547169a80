"""Other derivatives for the same numbers: a table of rules, and the model that obeys it.

| row | "gradient" | otherwise, in the backward pass only |
| --- | --- | --- |
| `norm` | all of `(x - mean) / scale` | "frozen": the scale is a constant, in every norm |
| `act` | `act'(x)` | "identity": `act(x) / x`, a constant, so that `x` times it is what it made |
| `mul` | both factors of a gated MLP in full | "half": half to each, since each times its slope is the whole product |
| `attn` | queries, keys and values in full | "half": a half at each product: 1/4 to q and k, 1/2 to v; "frozen": the \
pattern is a constant |
| `softmax` | 1.0 | T: `s * (g - <g, s>)` with `s = softmax(x / T)`, without the factor 1/T |

`backward_rules(model, rules)` is a model of the same parameters and outputs: whatever differentiates a model obeys the
rules if it is given that one. Biases, soft-caps and the loss keep their gradients.

References: RELP: Rezaei Jafari et al. (2025), arXiv:2508.21258 (its rule that freezes attention is
`attn="frozen"`). ATTNLRP: Achtibat et al. (2024), arXiv:2402.05602, Eq. 7 (products), Eq. 9 (activations), Prop. 3.1
(its softmax rule is the gradient) and 3.4 (norms). GIM: Edin et al. (2025), arXiv:2505.17630, which found T = 2.
Differs from them: `act(x) / x` at |x| < 1e-6 is read at 1e-6, where they shift x by it; linear layers have the rule of
the gradient, which is LRP-0.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.models.attention import Attention
from mechjax.models.cache import Keys
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.marks import Mark
from mechjax.models.mlp import ACTIVATIONS, MLP
from mechjax.models.model_config import ModelConfig
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence, Varying
from mechjax.transform.context import wanting

CLOSEST = 1e-6  # no activation is divided by less

_CHOICES = {
    "norm": ("gradient", "frozen"),
    "mul": ("gradient", "half"),
    "act": ("gradient", "identity"),
    "attn": ("gradient", "half", "frozen"),
}
_SHARES = {"gradient": {}, "half": {"q": 0.25, "k": 0.25, "v": 0.5}, "frozen": {"q": 0.0, "k": 0.0}}


@dataclass(frozen=True)
class Rules:
    """One backward rule for each kind of operation; static and hashable. The rows are those of the module's table.

    Raises:
        ArgumentError: A rule that its row does not have.
    """

    __no_type_check__: ClassVar[bool] = True  # checks itself, with better messages

    norm: Literal["gradient", "frozen"] = "gradient"
    softmax: float = 1.0
    mul: Literal["gradient", "half"] = "gradient"
    act: Literal["gradient", "identity"] = "gradient"
    attn: Literal["gradient", "half", "frozen"] = "gradient"

    def __post_init__(self) -> None:
        for row, known in _CHOICES.items():
            if (given := getattr(self, row)) not in known:
                raise ArgumentError(
                    f"Rules({row}={given!r}): the row has {', '.join(map(repr, known))}. Presets are GRADIENT, RELP, "
                    "ATTNLRP and GIM."
                )
        if not self.softmax > 0:
            raise ArgumentError(
                f"Rules(softmax={self.softmax!r}): a temperature above zero; 1.0 is the gradient."
            )

    def __repr__(self) -> str:
        """The preset's name, or the rows that are not the gradient's."""
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        own = [f"{name}={rows[name]!r}" for name in rows if rows[name] != getattr(type(self), name)]
        return next((name for name, rules in PRESETS.items() if rules == self), f"Rules({', '.join(own)})")


GRADIENT = Rules()
RELP = Rules(norm="frozen", mul="half", act="identity")
ATTNLRP = replace(RELP, attn="half")
GIM = Rules(norm="frozen", mul="half", attn="half", softmax=2.0)
PRESETS = {"GRADIENT": GRADIENT, "RELP": RELP, "ATTNLRP": ATTNLRP, "GIM": GIM}

M = TypeVar("M", bound=eqx.Module)


def backward_rules(model: Decoder, rules: Rules) -> Decoder:
    """The model with other derivatives: the same parameters, sites and numbers.

    Args:
        model: The decoder.
        rules: GRADIENT, RELP, ATTNLRP, GIM, or rows of your own.

    Raises:
        UnsupportedModelError: A model in which a rule would be missed: experts or MLPs of another class (for `mul` and
            `act`), latent attention, or learned sinks (for `softmax`).
    """
    config = model.config
    if rules == GRADIENT:
        return model
    attn = model.blocks.attn
    if not isinstance(attn, Attention):
        raise _missed("latent attention, which", rules)
    if config.experts is not None and (rules.mul, rules.act) != ("gradient", "gradient"):
        raise _missed("experts, whose gate", rules)
    mlp = model.blocks.mlp
    if mlp is not None and type(mlp) is not MLP and (rules.mul, rules.act) != ("gradient", "gradient"):
        raise _missed(f"MLPs of class {type(mlp).__name__}, for which it", rules)
    if attn.sinks is not None and rules.softmax != 1.0:
        raise _missed("attention sinks, whose softmax", rules)

    def ruled(part: Any) -> Any:
        if isinstance(part, Norm) and rules.norm == "frozen":
            return _Frozen(part.w, part.b)
        return part

    found = jax.tree.map(ruled, model, is_leaf=lambda part: isinstance(part, Norm))
    attn, mlp = found.blocks.attn, found.blocks.mlp
    if (rules.attn, rules.softmax) != ("gradient", 1.0):
        found = eqx.tree_at(lambda m: m.blocks.attn, found, _with(_RuledAttention, attn, rules))
    if (rules.mul, rules.act) != ("gradient", "gradient") and mlp is not None:
        found = eqx.tree_at(lambda m: m.blocks.mlp, found, _with(_RuledMLP, mlp, rules))
    return found


def _missed(what: str, rules: Rules) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"backward_rules: the model has {what} has no rule here, and {rules} would be missed without a word. Use "
        "GRADIENT, or leave those rows at their default."
    )


def _with(cls: Callable[..., M], part: eqx.Module, rules: Rules) -> M:
    """`part` as a module of a class that also holds rules."""
    return cls(**{field.name: getattr(part, field.name) for field in fields(part)}, rules=rules)


@jax.custom_jvp
def instead(value: Float[Array, "..."], by: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value`, with the derivative of `by`."""
    del by
    return value


@instead.defjvp
def _of_by(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


class _Frozen(Norm):
    """A norm whose scale is a constant to derivatives."""

    def __call__(
        self, x: Float[Array, "... width"], config: ModelConfig, mark: Mark | None = None, over: int = 1
    ) -> Float[Array, "... width"]:
        named = mark or (lambda value, _: value)
        still = lambda value, name: named(lax.stop_gradient(value) if name == "scale" else value, name)
        return super().__call__(x, config, still, over)


class _RuledAttention(Attention):
    """Attention under the rules `attn` and `softmax`."""

    rules: Rules = eqx.field(static=True)

    def __call__(
        self,
        read: Float[Array, "*batch pos d_model"],
        normalized: Float[Array, "*batch pos d_model"],
        norm: Norm | None,
        sequence: Sequence,
        varying: Varying,
        config: Config,
        mark: Mark,
        layer: Int[Array, ""] | int = 0,
        cache: Keys | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], Keys | None]:
        share, heat, seen = _SHARES[self.rules.attn], self.rules.softmax, {}

        def tap(x: Array, name: str) -> Array:
            if name == "pattern":
                x = instead(x, (heat * jax.nn.softmax(seen["attn_scores"] / heat, -1)).astype(x.dtype))
            seen[name] = x = mark(x, name)
            return instead(x, share[name] * x) if name in share else x

        with wanting(frozenset(("attn_scores", "pattern") if heat != 1.0 else ())):
            return super().__call__(read, normalized, norm, sequence, varying, config, tap, layer, cache)


class _RuledMLP(MLP):
    """An MLP under the rules `mul` and `act`."""

    rules: Rules = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*batch pos d_model"], config: Config, mark: Mark
    ) -> Float[Array, "*batch pos d_model"]:
        act, seen = ACTIVATIONS[config.activation], {}

        def made() -> Array:
            """What stands for `mlp_post` in derivatives."""
            pre = seen["mlp_pre"]
            if self.rules.act == "identity":
                safe = jnp.where(
                    jnp.abs(pre) < CLOSEST, jnp.where(pre < 0, -CLOSEST, CLOSEST).astype(pre.dtype), pre
                )
                post = pre * lax.stop_gradient(act(safe) / safe)
            else:
                post = act(pre)
            if self.W_gate is None:
                return post
            return post * seen["mlp_pre_linear"] * (0.5 if self.rules.mul == "half" else 1.0)

        def tap(y: Array, name: str) -> Array:
            seen[name] = mark(instead(y, made()) if name == "mlp_post" else y, name)
            return seen[name]

        return super().__call__(x, config, tap)
