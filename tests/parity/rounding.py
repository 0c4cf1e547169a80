"""Half precision, held to the numbers in full: two programs that round apart need not be near each other."""

import numpy as np

from tests.tolerances import TOL


def assert_rounds_alike(ours, theirs, exact) -> None:
    """What bfloat16 takes from the logits is small, and no more than it takes from those of transformers.

    Args:
        ours: Our logits in half precision.
        theirs: Those of transformers.
        exact: Those of transformers in float32.
    """
    error = lambda logits: (
        np.sqrt(np.square(np.asarray(logits, np.float32) - exact).mean()) / np.abs(exact).max()
    )
    assert error(ours) < TOL["bfloat16", "parity"]["atol"] / 2
    assert error(ours) < 1.5 * error(theirs)
