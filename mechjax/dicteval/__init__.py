"""Measuring dictionaries: what they reconstruct, what they found, and what a model keeps through them."""

from mechjax.dicteval.loss_recovered import LossRecovered as LossRecovered
from mechjax.dicteval.loss_recovered import loss_recovered as loss_recovered
from mechjax.dicteval.reconstruction import Reconstruction as Reconstruction
from mechjax.dicteval.reconstruction import reconstruction as reconstruction
from mechjax.dicteval.recovery import Recovery as Recovery
from mechjax.dicteval.recovery import recovery as recovery
