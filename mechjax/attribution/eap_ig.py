"""Edge attribution patching with integrated gradients (EAP-IG): first order, on the whole way from ablated to clean.

    score[u -> v] = sum over positions of (w_u - a_u) . integral from 0 to 1 of dm/dx_v at t dt

What moves with t is the `path`:

- "inputs": the run begins with `a_input + t (w_input - a_input)`, and all else follows. As steps grow, the scores of
  edges out of `input` sum to m(clean) - m(the run that begins with a_input).
- "activations": one sublayer (input, a layer's heads, an MLP) writes `a + t (w - a)`, and only its edges are scored;
  they sum to m(clean) - m(that sublayer ablated).
- "mask": every edge carries `t w_u + (1 - t) a_u`, with w_u as it is in that run, in the score too. All edges sum to
  m(clean) - m(all ablated).

`steps` and `quadrature` say at which t the integral is read. One step by "trapezoid" on "inputs" is what the authors'
code calls clean-corrupted: the mean of the gradients of the clean and of the corrupt run.

References: Hanna et al. (2024), "Have faith in faithfulness", arXiv:2403.17806, Eq. 3 (inputs; MIB: EAP-IG-inputs);
Marks et al. (2024), arXiv:2403.19647, section 2 (activations; MIB: EAP-IG-activations); Miller et al. (2024),
arXiv:2407.08734 (mask).
Differs from the papers and their code: the sign is m(intact) - m(ablated); the midpoint rule by default, where the code
takes left ends for edges and right ends for nodes; in "activations" the run in which a sublayer moves scores only that
sublayer's edges, where the code adds the gradients of all runs to all edges; else as `eap`.
Cost: a forward for each side; then for each step a forward and a backward, and one product of nodes by readers for all
("inputs"; the gradients of all steps are kept), or a masked forward and its backward ("mask"; "activations" takes that
for every sublayer), whose memory is one stream per node and layer.
Exact when: the metric is affine in what readers read, but for "mask", where edges in a row share their effect.
Misleads when: edges are redundant, or the way between the two runs leaves what the model was trained on.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxtyping import Array

from mechjax.attribution.contraction import edge_scores, slopes
from mechjax.attribution.mask_path import slopes_of_mask, sublayers
from mechjax.attribution.quadrature import Quadrature, nodes_of
from mechjax.attribution.scores import Reduce, Scores, named, reduced
from mechjax.attribution.subject import Ablation, Subject, clean_run, over_parts, sent_by, subject
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.graph.build import Graph
from mechjax.graph.writes import recorded
from mechjax.metrics.metric import Metric
from mechjax.models.backward_rules import GRADIENT, Rules
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.room import backs_off

Path = Literal["inputs", "activations", "mask"]


@needs_decoder("graph")
@on_any_mesh
@backs_off
def eap_ig(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    path: Path = "inputs",
    steps: int = 5,
    quadrature: Quadrature = "midpoint",
    positions: Mapping[str, Any] | None = None,
    rules: Rules = GRADIENT,
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
        path: What moves from ablated to clean: "inputs", "activations" or "mask".
        steps: How many intervals the way is cut into.
        quadrature: Where in each interval gradients are taken: "midpoint", "left", "right", or "trapezoid" (both ends,
            so one run more).
        positions: Where the graph's spans are, as in `eap`.
        rules: Backward rules, as in `eap`.
        ablation: What stands in for what a node writes, as in `eap`.
        reference: The prompts of a mean.
        reduce: How examples become one number, as in `eap`; only "inputs" keeps examples apart for "mean_of_abs".
        chunk_size: Positions that "inputs" contracts at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.edges`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        UnsupportedModelError: Latent attention, or a model in which a backward rule would be missed.
    """
    rule = nodes_of(quadrature, steps)
    if path not in get_args(Path):
        raise ArgumentError(f"path={path!r}: expected one of {', '.join(map(repr, get_args(Path)))}.")
    per_example = reduce == "mean_of_abs"
    if per_example and path != "inputs":
        raise ArgumentError(
            f"path={path!r} gives one gradient for all examples, so reduce='mean_of_abs' needs path='inputs'."
        )
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce, rules, positions)

    def inputs(part: Subject) -> tuple[Array, Array]:
        value, _, acts = clean_run(part)
        intact = recorded(part.model, part.start, acts, part.graph)
        sent = sent_by(part, intact, resampled=ablation == "resample")
        runs = [(w, slopes(part, part.ablated.input + at * sent.input)[1]) for at, w in rule]
        found = edge_scores(part, runs, sent, per_example=per_example, chunk_size=chunk_size)
        return found, value

    if path == "inputs":
        found, value = over_parts(given, inputs, per_example=per_example)
    else:
        groups = sublayers(graph) if path == "activations" else 0 * sublayers(graph)
        found, value = slopes_of_mask(given, groups, rule), clean_run(given)[0]
    method = named("eap_ig", path=path, steps=steps, quadrature=quadrature, rules=rules)
    return Scores(reduced(found, reduce), value, graph, ("edge",), method, ablation, reduce)
