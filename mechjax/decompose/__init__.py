"""The residual stream as a sum: what each layer, head and neuron wrote, what it says about the logits."""

from mechjax.decompose.accumulated_resid import accumulated_resid as accumulated_resid
from mechjax.decompose.apply_norm import apply_norm as apply_norm
from mechjax.decompose.decompose_resid import decompose_resid as decompose_resid
from mechjax.decompose.expert_results import expert_results as expert_results
from mechjax.decompose.full_decomposition import full_decomposition as full_decomposition
from mechjax.decompose.head_results import head_results as head_results
from mechjax.decompose.logit_attribution import logit_attribution as logit_attribution
from mechjax.decompose.neuron_results import neuron_results as neuron_results
from mechjax.decompose.project import project as project
from mechjax.decompose.recorded import sites as sites
from mechjax.decompose.stack import Projection as Projection
from mechjax.decompose.stack import Stack as Stack
