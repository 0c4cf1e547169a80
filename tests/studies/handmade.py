"""A tour with numbers made by hand: what a page looks like, without running a model."""

import jax.numpy as jnp
import numpy as np

from mechjax.studies.tour_page import Story, Tour

TOKENS = (
    "<bos>",
    "When",
    "Mary",
    "and",
    "John",
    "went",
    "to",
    "the",
    "store",
    ",",
    "John",
    "gave",
    "a",
    "ring",
    "to",
)
AT = (2, 4, 10, 14)
LEADING = ((3, 0), (2, 3), (1, 2))


def handmade_tour(tokens: tuple[str, ...] = TOKENS, answer: str = "Mary", wrong: str = "John") -> Tour:
    """A tour of 4 layers of 4 heads; `tokens` may be anything, as long as there are as many."""
    rng = np.random.default_rng(0)

    def floats(array) -> jnp.ndarray:
        return jnp.asarray(array, jnp.float32)

    heads = rng.normal(0, 0.04, (4, 4))
    heads[(3, 2, 1), (0, 3, 2)] = 0.72, 0.58, 0.31
    residual = np.array([[0, 0, 1, 0], [0, 0.01, 0.98, 0.02], [0, 0, 0.52, 0.41], [0, -0.2, 0.05, 0.97]])
    places = rng.normal(0, 0.02, (4, 4, 4))
    places[(3, 2, 1), (0, 3, 2), (3, 3, 2)] = 0.7, 0.57, 0.3
    story = rng.normal(0, 0.02, (4, len(tokens)))
    story[:, AT] = residual
    patterns = np.tril(rng.exponential(1, (3, len(tokens), len(tokens))))
    patterns[(0, 1, 2), (14, 14, 10), (2, 10, 4)] = 80, 60, 90
    patterns /= patterns.sum(-1, keepdims=True)
    return Tour(
        heads=floats(heads),
        residual=floats(residual),
        places=floats(places),
        looks=floats(patterns[:, AT][:, :, AT]),
        intact=floats(5.83),
        ablated=floats(0.74),
        random=floats(rng.normal(5.6, 0.25, 20)),
        story=Story(
            residual=floats(story),
            patterns=floats(patterns),
            tokens=tokens,
            corrupt_tokens=(*tokens[:10], answer, *tokens[11:]),
            at=AT,
            answer=answer,
            wrong=wrong,
            guesses=((answer, 0.973), (wrong, 0.012), ("the", 0.004)),
        ),
        leading=LEADING,
        roles=("IO", "S1", "S2", "END"),
        model="tasks-4l",
        n=64,
        seed=0,
        seconds=(("Patching heads", 31.2),),
    )
