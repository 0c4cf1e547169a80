"""Probes as they are given, and what rows count, label by label."""

import jax.numpy as jnp
import numpy as np

from mechjax.fit.logistic import Logistic


def probe(weight, bias):
    """Probes as they are given."""
    return Logistic(weight, bias, jnp.zeros(len(bias)), jnp.zeros(len(bias), jnp.int32))


def balanced(labels, name, rows):
    """What each row counts for the probe of one label, label by label."""
    weights, others = np.zeros(len(labels)), [other for other in np.unique(labels) if other != name]
    weights[rows & (labels == name)] = 1
    for other in others:
        of = rows & (labels == other)
        weights[of] = (rows & (labels == name)).sum() / len(others) / of.sum()
    return weights
