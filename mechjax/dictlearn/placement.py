"""Where a run's arrays lie on a mesh: latents are split over `model`, tokens over `data`.

The compiler partitions a step by these (GSPMD); what crosses devices is what the sums say: counts of active latents, a
token's reconstruction, gradients summed over tokens. Each device holds 1/model of every matrix and of its moments.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import automatic
from mechjax.dictionaries import Dictionary
from mechjax.dictlearn.step import State, trained_part, turned
from mechjax.parallel.layout import layout
from mechjax.parallel.mesh import n_model
from mechjax.parallel.shard import spread

LATENTS = {"model": ("feature",)}


def fitting(mesh: Mesh, dictionary: Dictionary) -> Mesh:
    """The mesh with axes that the compiler may place by, where it fits the dictionary.

    Raises:
        ArgumentError: An axis that is not there, or latents that it does not divide.
    """
    sizes = dict(mesh.shape)
    if unknown := {"data", "model"} ^ sizes.keys():
        raise ArgumentError(
            f"the mesh has axes {mesh.axis_names}; training needs `data` and `model` and no others (it is "
            f"{', '.join(sorted(unknown))}). `mj.make_mesh(data=2, model=4)` makes one."
        )
    n = dictionary.n_features
    if n % sizes["model"]:
        fits = [size for size in range(1, mesh.size + 1) if n % size == 0 and mesh.size % size == 0]
        raise ArgumentError(
            f"the mesh splits latents over model={sizes['model']} devices, and n_features={n} cannot be split so: of "
            f"{mesh.size} devices, model may be {', '.join(map(str, fits))}."
        )
    return automatic(mesh)


def placed(state: State, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state with its arrays on the mesh."""
    return _with_specs(
        lambda x, spec: spread(x, NamedSharding(mesh, spec)), state, optimizer, mesh.shape["model"]
    )


def kept_placed(state: State, optimizer: optax.GradientTransformation) -> State:
    """The state, where the compiler is to leave it as it was placed; the same outside a mesh's context."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return _with_specs(lax.with_sharding_constraint, state, optimizer, n_model())


def spread_batches(z: Any, mesh: Mesh, own: bool) -> Any:
    """A stack of batches (step, token, ...), with each one's own before the token's axis, with tokens over `data`.

    Raises:
        ShapeError: Tokens that do not divide.
    """
    if z is None:
        return None
    lead = 2 if own else 1
    n, parts = z.shape[lead], mesh.shape["data"]
    if n % parts:
        raise ShapeError(
            f"the mesh splits a batch over data={parts} devices, and batches have {n} tokens: give a multiple of "
            f"{parts}."
        )
    return spread(z, NamedSharding(mesh, P(*(None,) * lead, "data")))


def _with_specs(
    of: Callable[[Any, P], Array], state: State, optimizer: optax.GradientTransformation, parts: int
) -> State:
    """The state with `of` done to each array and how it is split."""
    held = state.dictionary
    dims = layout(jax.eval_shape(turned, held), {"model": parts}, LATENTS)
    found = jax.tree.map(lambda names: P(*names), dims, is_leaf=lambda x: isinstance(x, tuple))
    if held.W_enc is not None:  # its annotation names axes as the dictionary has them; here it is transposed
        *lead, inputs, latents = dims.W_enc
        found = eqx.tree_at(lambda d: d.W_enc, found, P(*lead, latents, inputs))
    trained = jax.tree.map(
        lambda x, spec: None if x is None else spec, trained_part(held)[0], found, is_leaf=lambda x: x is None
    )
    moments = optax.tree.map_params(
        optimizer, of, state.optimizer, trained, transform_non_params=lambda x: of(x, P())
    )
    silent = of(state.silent, P(*(None,) * (state.silent.ndim - 1), "model"))
    parts_of = (
        jax.tree.map(of, held, found),
        moments,
        silent,
        of(state.control, P()),
        of(state.skipped, P()),
    )
    where = lambda s: (s.dictionary, s.optimizer, s.silent, s.control, s.skipped)
    return eqx.tree_at(where, state, parts_of)
