"""Sparse dictionaries of activations: how each kind encodes, decodes, and what it minimises."""

from mechjax.dictionaries.batch_top_k import BatchTopK as BatchTopK
from mechjax.dictionaries.cross_layer import CrossLayerTranscoder as CrossLayerTranscoder
from mechjax.dictionaries.crosscoder import Crosscoder as Crosscoder
from mechjax.dictionaries.dictionary import Dictionary as Dictionary
from mechjax.dictionaries.dictionary import Stage as Stage
from mechjax.dictionaries.formats import load as load
from mechjax.dictionaries.formats import write_saelens as write_saelens
from mechjax.dictionaries.gated import Gated as Gated
from mechjax.dictionaries.jump_relu import JumpReLU as JumpReLU
from mechjax.dictionaries.matching_pursuit import MatchingPursuit as MatchingPursuit
from mechjax.dictionaries.matryoshka import Matryoshka as Matryoshka
from mechjax.dictionaries.normalized import Normalized as Normalized
from mechjax.dictionaries.p_anneal import PAnneal as PAnneal
from mechjax.dictionaries.relu import ReLU as ReLU
from mechjax.dictionaries.splice import splice as splice
from mechjax.dictionaries.switch import Switch as Switch
from mechjax.dictionaries.top_k import TopK as TopK
