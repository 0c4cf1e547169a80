"""Patching: put activations of one run into another, and see what changes."""

from mechjax.patching.activation_patch import activation_patch as activation_patch
from mechjax.patching.attention_knockout import KnockoutScores as KnockoutScores
from mechjax.patching.attention_knockout import attention_knockout as attention_knockout
from mechjax.patching.causal_trace import TraceScores as TraceScores
from mechjax.patching.causal_trace import causal_trace as causal_trace
from mechjax.patching.mediation_effects import MediationEffects as MediationEffects
from mechjax.patching.mediation_effects import mediation_effects as mediation_effects
from mechjax.patching.path_patching import PathScores as PathScores
from mechjax.patching.path_patching import path_patching as path_patching
from mechjax.patching.scores import PatchScores as PatchScores
