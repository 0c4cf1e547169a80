"""Meshes: which devices hold what."""

from mechjax.parallel.mesh import make_mesh as make_mesh
from mechjax.parallel.shard import shard as shard
