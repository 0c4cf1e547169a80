"""Edge attribution patching (EAP): what does each edge do for the metric, to first order?

    score[u -> v] = sum over positions of (w_u - a_u) . dm/dx_v

where `w_u` is what node u writes in the clean run, `a_u` what it writes when ablated (`ablation`), `x_v` what reader v
reads, and m the metric: what ablating the edge would take from m, were the model linear. It is the gradient of the
masked forward (`mechjax.graph.forward`) with respect to its mask, where all edges are kept.

Reference: Syed et al. (2023), "Attribution patching outperforms automated circuit discovery", arXiv:2310.10348, Eq. 3;
Nanda (2023), "Attribution patching". Summed over readers it is attribution patching of nodes (`Scores.nodes`).
Differs from the papers and the code of Hanna et al. (arXiv:2403.17806): the sign is m(intact) - m(ablated); sizes are
taken only where `reduce` asks for it, and it says whether before or after the mean over examples; means are each node's
own, over real tokens; where a norm stands after attention, heads' writes pass it at the scale of their run. `rules` may
give other derivatives (RelP, AttnLRP, GIM: `mechjax.models.backward_rules`): it is then the slope of that model's mask.
Cost: a forward of the other side, a forward and backward, and a product of nodes by readers: three forwards and a bit.
Memory: one part of the examples at a time, and what the other side's nodes write.
Exact when: the metric is affine in what readers read.    Misleads when: softmax saturates or norms rescale, so that the
gradient at the clean run says little of the way to the ablated one: see `eap_ig`, and compare with `exact`.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from mechjax.attribution.contraction import edge_scores, slopes
from mechjax.attribution.scores import Reduce, Scores, named, reduced
from mechjax.attribution.subject import Ablation, Subject, over_parts, sent_by, subject
from mechjax.base.meshes import on_any_mesh
from mechjax.graph.build import Graph
from mechjax.metrics.metric import Metric
from mechjax.models.backward_rules import GRADIENT, Rules
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.room import backs_off


@needs_decoder("graph")
@on_any_mesh
@backs_off
def eap(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    positions: Mapping[str, Any] | None = None,
    rules: Rules = GRADIENT,
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
    chunk_size: int | None = None,
) -> Scores:
    """Score every edge from the gradients of the clean run.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        graph: The model's graph, `mj.graph.build(model)`.
        positions: Where the graph's spans are, where these have names: for each, one position per example, several, or
            a mask (batch, pos).
        rules: Backward rules: GRADIENT, RELP, ATTNLRP, GIM, or rows of your own.
        ablation: What stands in for what a node writes: "resample" (what it writes on `corrupt`), "zero", "mean" over
            `reference` and its positions, or "mean_per_pos".
        reference: The prompts of a mean.
        reduce: "mean" over examples, signed; "abs_of_mean", its size; "mean_of_abs", the mean of the examples' sizes.
        chunk_size: Positions that are contracted at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.edges`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        UnsupportedModelError: Latent attention, or a model in which a backward rule would be missed.
    """
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce, rules, positions)
    per_example = reduce == "mean_of_abs"

    def part(part: Subject) -> tuple[Array, Array]:
        value, found, intact = slopes(part, part.start)
        sent = sent_by(part, intact, resampled=ablation == "resample")
        return edge_scores(part, [(1.0, found)], sent, per_example=per_example, chunk_size=chunk_size), value

    found, value = over_parts(given, part, per_example=per_example)
    return Scores(
        reduced(found, reduce), value, graph, ("edge",), named("eap", rules=rules), ablation, reduce
    )
