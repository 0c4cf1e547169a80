"""Models of other libraries as subjects: unmodified, their modules' inputs and outputs become sites."""

from mechjax.interop.checkpoint_names import from_checkpoint_names as from_checkpoint_names
from mechjax.interop.equinox import from_equinox as from_equinox
from mechjax.interop.linen import from_linen as from_linen
from mechjax.interop.nnx import from_nnx as from_nnx
from mechjax.interop.pytorch import from_torch as from_torch
from mechjax.interop.subject import Subject as Subject
