"""Sparse dictionaries of activations: how each kind encodes, decodes, and what it minimises."""

from mechjax.dictionaries.batch_top_k import BatchTopK as BatchTopK
from mechjax.dictionaries.dictionary import Dictionary as Dictionary
from mechjax.dictionaries.dictionary import Stage as Stage
from mechjax.dictionaries.gated import Gated as Gated
from mechjax.dictionaries.jump_relu import JumpReLU as JumpReLU
from mechjax.dictionaries.matryoshka import Matryoshka as Matryoshka
from mechjax.dictionaries.relu import ReLU as ReLU
from mechjax.dictionaries.top_k import TopK as TopK
