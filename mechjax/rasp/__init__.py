"""RASP: a language of sequences, an interpreter, and a compiler to transformers whose circuits are known."""

from mechjax.rasp.compile_program import compile_program as compile_program
from mechjax.rasp.compiled import Compiled as Compiled
from mechjax.rasp.expressions import Aggregate as Aggregate
from mechjax.rasp.expressions import LinearSequenceMap as LinearSequenceMap
from mechjax.rasp.expressions import Map as Map
from mechjax.rasp.expressions import Select as Select
from mechjax.rasp.expressions import SelectorWidth as SelectorWidth
from mechjax.rasp.expressions import SequenceMap as SequenceMap
from mechjax.rasp.expressions import SOp as SOp
from mechjax.rasp.expressions import always as always
from mechjax.rasp.expressions import equal as equal
from mechjax.rasp.expressions import indices as indices
from mechjax.rasp.expressions import tokens as tokens
from mechjax.rasp.interpret import interpret as interpret
from mechjax.rasp.programs import STANDARD as STANDARD
from mechjax.rasp.variables import Variable as Variable
