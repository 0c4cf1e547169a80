"""Learning dictionaries of activations, and measuring what was learned."""

from mechjax.dictlearn.activations import activations as activations
from mechjax.dictlearn.activations import shuffled as shuffled
from mechjax.dictlearn.loss_recovered import LossRecovered as LossRecovered
from mechjax.dictlearn.loss_recovered import loss_recovered as loss_recovered
from mechjax.dictlearn.reconstruction import Reconstruction as Reconstruction
from mechjax.dictlearn.reconstruction import reconstruction as reconstruction
from mechjax.dictlearn.recovery import Recovery as Recovery
from mechjax.dictlearn.recovery import recovery as recovery
from mechjax.dictlearn.train import Training as Training
from mechjax.dictlearn.train import train as train
from mechjax.dictlearn.train_many import train_many as train_many
