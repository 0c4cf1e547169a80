"""Logistic regression by scipy in float64, which nobody here wrote."""

import numpy as np
from scipy.optimize import minimize


def by_scipy(x, y, weights, l2, l1=0.0):
    """One probe by L-BFGS-B in float64; with `l1`, weights are differences of numbers that are 0 or more."""
    t, d = np.where(y, 1.0, -1.0), x.shape[1]
    centre = x.astype(np.float64).mean(0)
    z = x - centre

    def value(theta):
        w, b = theta[:d] - theta[d : 2 * d], theta[-1]
        m = t * (z @ w + b)
        r = -weights * t / (1 + np.exp(m))
        g = z.T @ r + l2 * w
        loss = (weights * np.logaddexp(0, -m)).sum() + l2 * (w @ w) / 2 + l1 * theta[: 2 * d].sum()
        return loss, np.concatenate([g + l1, l1 - g, [r.sum()]])

    positive = [(0, None)] * (2 * d) if l1 else [(None, None)] * d + [(0, 0)] * d
    options = {"maxiter": 50_000, "maxfun": 200_000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 30}
    theta = minimize(
        value,
        np.zeros(2 * d + 1),
        jac=True,
        method="L-BFGS-B",
        bounds=[*positive, (None, None)],
        options=options,
    ).x
    w = theta[:d] - theta[d : 2 * d]
    return w, theta[-1] - centre @ w
