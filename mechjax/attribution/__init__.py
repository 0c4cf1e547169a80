"""Attribution: what each edge of a model, or each node, does for a metric; exactly, or from gradients."""

from mechjax.attribution.contextual_decomposition import contextual_decomposition as contextual_decomposition
from mechjax.attribution.eap import eap as eap
from mechjax.attribution.eap_ig import eap_ig as eap_ig
from mechjax.attribution.exact import exact as exact
from mechjax.attribution.information_flow import InformationFlow as InformationFlow
from mechjax.attribution.information_flow import information_flow as information_flow
from mechjax.attribution.scores import Scores as Scores
