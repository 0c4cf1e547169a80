"""How close is equal. One table; `assert_allclose(actual, expected, **TOL["float32", "parity"])`.

Tolerances are tightened freely and never loosened: a comparison that needs more room has a defect to find.
"""

TOL: dict[tuple[str, str], dict[str, float]] = {
    ("any", "exact"): {"rtol": 0.0, "atol": 0.0},  # bits: round trips, identity edits, the same program twice
    ("float32", "law"): {"rtol": 1e-6, "atol": 1e-6},  # the transform's laws: one program, two spellings
    ("float32", "layout"): {
        "rtol": 1e-5,
        "atol": 1e-5,
    },  # scanned, unrolled, resumed, padded: another order of sums
    ("float32", "parity"): {"rtol": 1e-5, "atol": 1e-5},  # another implementation of the same model
    ("float32", "sweep"): {
        "rtol": 1e-5,
        "atol": 1e-5,
    },  # a resumed, chunked sweep against a loop of whole runs
    ("float32", "mesh"): {"rtol": 1e-5, "atol": 1e-5},  # one device against eight
    ("float32", "gradient"): {
        "rtol": 1e-4,
        "atol": 1e-5,
    },  # reverse mode against finite or analytic differences
    ("float32", "decomposition"): {
        "rtol": 1e-5,
        "atol": 1e-5,
    },  # the sum of what was written, against the stream
    ("float32", "attribution"): {
        "rtol": 1e-4,
        "atol": 1e-4,
    },  # logits, and logits from under a soft-cap, from the sum of all components
    ("float64", "gradient"): {"rtol": 1e-10, "atol": 1e-12},  # one derivative, contracted in two orders
    ("float32", "projection"): {"rtol": 1e-5, "atol": 3e-5},  # inner products in another order
    ("bfloat16", "parity"): {"rtol": 2e-2, "atol": 2e-2},  # eight bits of mantissa through a few layers
    ("any", "operations"): {"rtol": 1e-3, "atol": 0.0},  # XLA counts exponentials and a few copies apart
    ("float32", "spectrum"): {
        "rtol": 1e-4,
        "atol": 1e-4,
    },  # eigenvalues of nonsymmetric matrices, singular vectors: rounding divided by the gaps between them
}
