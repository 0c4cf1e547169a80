"""Attribution: what each edge, node or activation does for a metric; exactly, or from gradients."""

from mechjax.attribution.atp_star import atp_star as atp_star
from mechjax.attribution.attribution_patching import attribution_patch as attribution_patch
from mechjax.attribution.contextual_decomposition import contextual_decomposition as contextual_decomposition
from mechjax.attribution.diagnosis import Diagnosis as Diagnosis
from mechjax.attribution.diagnosis import diagnose as diagnose
from mechjax.attribution.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
from mechjax.attribution.eap import eap as eap
from mechjax.attribution.eap_ig import eap_ig as eap_ig
from mechjax.attribution.exact import exact as exact
from mechjax.attribution.information_flow import InformationFlow as InformationFlow
from mechjax.attribution.information_flow import information_flow as information_flow
from mechjax.attribution.integrated_gradients import integrated_gradients as integrated_gradients
from mechjax.attribution.node_scores import NodeScores as NodeScores
from mechjax.attribution.scores import Scores as Scores
from mechjax.attribution.site_scores import SiteScores as SiteScores
from mechjax.models.backward_rules import ATTNLRP as ATTNLRP
from mechjax.models.backward_rules import GIM as GIM
from mechjax.models.backward_rules import GRADIENT as GRADIENT
from mechjax.models.backward_rules import RELP as RELP
from mechjax.models.backward_rules import Rules as Rules
