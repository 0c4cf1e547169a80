"""Gates: two-layer decoders built by hand, on which methods that look for circuits are known to go wrong.

Tokens 1 and 0 are bits, the last token (2) is where the answer stands: the logit of 1 less that of 0. Head i of layer 0
brings bit i there; layer 1 makes of their sum x, with n bits,

    or              min(x, 1)                                   by the MLP
    and             max(x - (n - 1), 0)                         by the MLP
    adder           x                                           by the MLP
    saturated       1 if x = n else 0                           AND, by a head whose query is x, which sees one key
    saturated_or    1 if x > 0 else 0                           OR, by such a head
    cancelling      x - max(x - n + 1/4, 0)                     straight to the logits, less what the MLP takes away
    cancelling_and  x - min(x, n - 1) - max(x - n + 1/4, 0)     AND, so: 0, and 3/4 where all are on
    cancelling_or   x - max(x - 1, 0) + max(1/4 - x, 0)         OR, so: 1/4 where all are off, and 1

Resampling one edge at a time on the clean prompt (noising) misses an OR, of which each bit alone does nothing where all
are on; restoring one at a time on the corrupt prompt (denoising: `clean` and `corrupt` exchanged) misses an AND.
Gradients are zero on both prompts of the saturated gates, where queries have to be patched through the softmax, and on
the cancelling ones, on the clean prompt (`cancelling_or`: on the corrupt one too), where the direct and the indirect
effect cancel to first order: AtP* (Kramár et al. 2024, arXiv:2403.00745) is made for these two. Noising and denoising
AND and OR: Heimersheim and Nanda 2024, arXiv:2404.15255.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.graph.build import build
from mechjax.graph.truth import Truth, whole
from mechjax.metrics.answers import logit_diff
from mechjax.models.config import Config
from mechjax.models.params import assemble

GATES = (
    "or", "and", "adder", "saturated", "saturated_or", "cancelling", "cancelling_and", "cancelling_or",
)  # fmt: skip
"""The names of all gates."""

_SHARP = 400.0
"""Score of the key that a head attends to, others having 0: what strays, and its gradient, is zero in float64 too."""
_NEURONS: dict[str, Callable[[int], Sequence[tuple[float, float, float]]]] = {
    "or": lambda n: ((1, 0, 1), (1, -1, -1)),
    "and": lambda n: ((1, 1 - n, 1),),
    "adder": lambda n: ((1, 0, 1),),
    "cancelling": lambda n: ((1, 0.25 - n, -1),),
    "cancelling_and": lambda n: ((1, 0, -1), (1, 1 - n, 1), (1, 0.25 - n, -1)),
    "cancelling_or": lambda n: ((1, -1, -1), (-1, 0.25, 1)),
}
"""What the neurons of the MLP are: slope on the sum of the bits, bias, and what is written of it."""
_BIT, _OUT, _FIRST = 0, 1, 2  # directions of the stream; then one per position, then one per copied bit


def gate(name: str, n_inputs: int = 2) -> Truth:
    """A gate of `n_inputs` bits: all of them 1 on the clean prompt, 0 on the corrupt one.

    The circuit is exact: every edge outside it has weight zero. All gates of as many bits have the same shapes.

    Args:
        name: One of `mj.graph.GATES`.
        n_inputs: How many bits.

    Raises:
        ArgumentError: An unknown gate, or no bit.
    """
    if name not in GATES:
        raise ArgumentError(
            f"there is no gate {name!r}: there are {', '.join(GATES)}.{did_you_mean(str(name), GATES)}"
        )
    n = whole("n_inputs", n_inputs, 1)
    config = Config(
        d_vocab=3, n_ctx=n + 1, d_model=_FIRST + 2 * n + 1, n_layers=2, n_heads=n, d_head=1, d_mlp=4, norms="none",
        activation="relu", tied=False, attn_scale=1.0,
    )  # fmt: skip
    params = {path: np.zeros(shape, np.float32) for path, shape in config.shapes.items()}
    _copy_bits(params, n)
    by_head, straight = name.startswith("saturated"), name.startswith("cancelling")
    if by_head:
        _add_head(params, n, least=1 if name == "saturated_or" else n)
    else:
        _add_neurons(params, np.array(_NEURONS[name](n), np.float64), n)
    if straight:
        params["W_U"][_copied(n), 1] = 1
    via = "a1.h0<q>" if by_head else "m1"
    model = assemble(config, {path: jnp.asarray(W) for path, W in params.items()})
    graph, heads = build(model), [f"a0.h{i}" for i in range(n)]
    varying = {f"input->{h}<v>" for h in heads} | {f"{h}->{via}" for h in heads}
    varying |= {f"{via.partition('<')[0]}->logits"}
    varying |= {f"{h}->logits" for h in heads if straight}
    constant = {f"input->{h}<k>" for h in heads}
    constant |= {"input->a1.h0<k>", "input->a1.h0<v>"} if by_head else set()
    chosen = lambda names: jnp.asarray([edge in names for edge in graph.edges])
    prompt = lambda bit: jnp.asarray([[bit] * n + [2]], jnp.int32)
    return Truth(
        chosen(varying | constant), chosen(constant), prompt(1), prompt(0), logit_diff(1, 0), model, graph
    )


def _copy_bits(params: dict[str, np.ndarray], n: int) -> None:
    """Head i of layer 0 brings the bit at position i to every later one."""
    params["W_E"][1, _BIT] = 1
    params["W_pos"][:, _FIRST : _FIRST + n + 1] = np.eye(n + 1)
    params["W_U"][_OUT, 1] = 1
    params["blocks.attn.b_Q"][0] = _SHARP
    for i in range(n):
        params["blocks.attn.W_K"][0, _FIRST + i, i] = 1
        params["blocks.attn.W_V"][0, _BIT, i] = 1
        params["blocks.attn.W_O"][0, i, 0, _copied(n)][i] = 1


def _add_neurons(params: dict[str, np.ndarray], neurons: Float[np.ndarray, "neuron 3"], n: int) -> None:
    """The MLP of layer 1, of the sum of the bits."""
    own, (slope, bias, written) = slice(len(neurons)), neurons.T
    params["blocks.mlp.W_in"][1, _copied(n), own] = slope
    params["blocks.mlp.b_in"][1, own] = bias
    params["blocks.mlp.W_out"][1, own, _OUT] = written


def _add_head(params: dict[str, np.ndarray], n: int, *, least: int) -> None:
    """Head 0 of layer 1, which attends to the first position if `least` bits are on, else to the second."""
    params["blocks.attn.W_Q"][1, _copied(n), 0] = 2 * _SHARP
    params["blocks.attn.b_Q"][1, 0] = -_SHARP * (2 * least - 1)
    params["blocks.attn.W_K"][1, _FIRST : _FIRST + 2, 0, 0] = 1, -1
    params["blocks.attn.W_V"][1, _FIRST, 0] = 1
    params["blocks.attn.W_O"][1, 0, 0, _OUT] = 1


def _copied(n: int) -> slice:
    return slice(_FIRST + n + 1, _FIRST + 2 * n + 1)
