"""Circuits as data: which nodes write and which read, and the forward in which every edge between them can be cut."""

from mechjax.graph.agreement import Agreement as Agreement
from mechjax.graph.agreement import agreement as agreement
from mechjax.graph.build import Graph as Graph
from mechjax.graph.build import build as build
from mechjax.graph.forward import masked_forward as masked_forward
from mechjax.graph.forward import masked_stream as masked_stream
from mechjax.graph.gates import GATES as GATES
from mechjax.graph.gates import gate as gate
from mechjax.graph.mib import from_mib as from_mib
from mechjax.graph.mib import to_mib as to_mib
from mechjax.graph.planted import planted as planted
from mechjax.graph.truth import Truth as Truth
from mechjax.graph.units import with_dictionary as with_dictionary
from mechjax.graph.writes import Writes as Writes
from mechjax.graph.writes import writes as writes
