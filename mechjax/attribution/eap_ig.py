"""Edge attribution patching with integrated gradients (EAP-IG): first order, on the whole way from corrupt to clean.

    score[u -> v] = sum over positions of (w_u - a_u) . integral from 0 to 1 of dm/dx_v at e(t) dt
    e(t) = a_input + t (w_input - a_input)

The run begins with the embeddings e(t) and everything after follows from them. `steps` and `quadrature` say at which t
the integral is read.

Reference: Hanna et al. (2024), "Have faith in faithfulness", arXiv:2403.17806, Eq. 3 (there "EAP-IG"; MIB calls it
EAP-IG-inputs).
Differs from the paper and its code: the sign is m(intact) - m(ablated); the midpoint rule by default, where the code
takes left ends for edges and right ends for nodes; else as `eap`.
Cost: a forward for each side, and for each step a forward, a backward and a product of nodes by readers.
Exact when: the metric is affine in what readers read. As steps grow, the scores of the edges out of `input` always sum
to m(clean) - m(the run that begins with the ablated input).    Misleads when: edges are redundant, or the way between
the two inputs leaves what the model was trained on.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mechjax.attribution.contraction import edge_scores
from mechjax.attribution.measured import FromStart
from mechjax.attribution.quadrature import Quadrature, nodes_of
from mechjax.attribution.scores import Reduce, Scores, reduced
from mechjax.attribution.subject import Ablation, subject
from mechjax.graph.build import Graph
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder


def eap_ig(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    steps: int = 5,
    quadrature: Quadrature = "midpoint",
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
    chunk_size: int | None = None,
) -> Scores:
    """Score every edge from gradients on the way from the ablated input to the clean one.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        graph: The model's graph, `mj.graph.build(model)`.
        steps: How many intervals the way is cut into.
        quadrature: Where in each interval gradients are taken: "midpoint", "left", "right", or "trapezoid" (both ends,
            so one run more).
        ablation: What stands in for what a node writes, as in `eap`.
        reference: The prompts of a mean.
        reduce: How examples become one number, as in `eap`.
        chunk_size: Positions that are contracted at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.edges`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
    """
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce)
    sent = jax.tree.map(jnp.subtract, given.intact, given.ablated)
    total = None
    for at, weight in nodes_of(quadrature, steps):
        start = given.ablated.input + at * sent.input
        found, _ = edge_scores(
            given, start, sent, graph, per_example=reduce == "mean_of_abs", chunk_size=chunk_size
        )
        total = weight * found if total is None else total + weight * found
    value = eqx.filter_jit(FromStart(given.model, given.measured))(given.start, given.mask)
    method = f"eap_ig(steps={steps}, quadrature={quadrature!r})"
    return Scores(reduced(jnp.asarray(total), reduce), value, graph, ("edge",), method, ablation, reduce)
