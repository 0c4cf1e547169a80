"""A block with a hand in it: what it reads can be changed by what it has already made, within one trace."""

from collections.abc import Callable, Mapping

from jaxtyping import Array

from mechjax.models.marks import Mark

READS = frozenset({"q_input", "k_input", "v_input", "mlp_in"})
"""The sites at which readers read; blocks form them where `wanting` asks."""


def tapped(mark: Mark, changes: Mapping[str, Callable[[Array], Array]], seen: dict[str, Array]) -> Mark:
    """`mark`, but that sites named in `changes` are changed first; all that is named is put into `seen`."""

    def tap(x: Array, name: str) -> Array:
        seen[name] = mark(changes[name](x) if name in changes else x, name)
        return seen[name]

    return tap
