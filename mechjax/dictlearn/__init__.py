"""Learning dictionaries of activations."""

from mechjax.dictlearn.activations import activations as activations
from mechjax.dictlearn.activations import shuffled as shuffled
from mechjax.dictlearn.train import Training as Training
from mechjax.dictlearn.train import train as train
from mechjax.dictlearn.train_many import train_many as train_many
