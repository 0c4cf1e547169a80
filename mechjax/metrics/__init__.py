"""Metrics: one number per example, from the logits of one position."""

from mechjax.metrics.answers import logit_diff as logit_diff
from mechjax.metrics.answers import nll as nll
from mechjax.metrics.answers import prob as prob
from mechjax.metrics.answers import rank as rank
from mechjax.metrics.divergence import kl as kl
from mechjax.metrics.metric import Metric as Metric
