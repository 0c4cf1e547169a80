"""Patching: put activations of one run into another, and see what changes."""

from mechjax.patching.activation_patch import activation_patch as activation_patch
from mechjax.patching.scores import PatchScores as PatchScores
