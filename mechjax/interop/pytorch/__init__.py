"""PyTorch modules as subjects."""

from mechjax.interop.pytorch.module import from_torch as from_torch
