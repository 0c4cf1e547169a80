"""Patching: put activations of one run into another, and see what changes."""

from mechjax.patching.activation_patch import activation_patch as activation_patch
from mechjax.patching.path_patching import PathScores as PathScores
from mechjax.patching.path_patching import path_patching as path_patching
from mechjax.patching.scores import PatchScores as PatchScores
