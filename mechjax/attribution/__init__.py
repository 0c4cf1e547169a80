"""Attribution: what each edge of a model, or each node, does for a metric; exactly, or from gradients."""

from mechjax.attribution.eap import eap as eap
from mechjax.attribution.eap_ig import eap_ig as eap_ig
from mechjax.attribution.exact import exact as exact
from mechjax.attribution.scores import Scores as Scores
from mechjax.models.backward_rules import ATTNLRP as ATTNLRP
from mechjax.models.backward_rules import GIM as GIM
from mechjax.models.backward_rules import GRADIENT as GRADIENT
from mechjax.models.backward_rules import RELP as RELP
from mechjax.models.backward_rules import Rules as Rules
