"""Measuring dictionaries: what they reconstruct, what they found, and what a model keeps through them."""

from mechjax.dicteval.absorption import Absorption as Absorption
from mechjax.dicteval.absorption import absorption as absorption
from mechjax.dicteval.contexts import Contexts as Contexts
from mechjax.dicteval.contexts import Examples as Examples
from mechjax.dicteval.contexts import contexts as contexts
from mechjax.dicteval.decoder_lens import DecoderLens as DecoderLens
from mechjax.dicteval.decoder_lens import decoder_lens as decoder_lens
from mechjax.dicteval.detection import Detection as Detection
from mechjax.dicteval.detection import detection as detection
from mechjax.dicteval.loss_recovered import LossRecovered as LossRecovered
from mechjax.dicteval.loss_recovered import loss_recovered as loss_recovered
from mechjax.dicteval.neighbours import Neighbours as Neighbours
from mechjax.dicteval.neighbours import neighbours as neighbours
from mechjax.dicteval.reconstruction import Reconstruction as Reconstruction
from mechjax.dicteval.reconstruction import reconstruction as reconstruction
from mechjax.dicteval.recovery import Recovery as Recovery
from mechjax.dicteval.recovery import recovery as recovery
from mechjax.dicteval.sparse_probing import SparseProbing as SparseProbing
from mechjax.dicteval.sparse_probing import sparse_probing as sparse_probing
from mechjax.dicteval.spurious_correlation_removal import (
    SpuriousCorrelationRemoval as SpuriousCorrelationRemoval,
)
from mechjax.dicteval.spurious_correlation_removal import (
    spurious_correlation_removal as spurious_correlation_removal,
)
from mechjax.dicteval.targeted_probe_perturbation import (
    TargetedProbePerturbation as TargetedProbePerturbation,
)
from mechjax.dicteval.targeted_probe_perturbation import (
    targeted_probe_perturbation as targeted_probe_perturbation,
)
