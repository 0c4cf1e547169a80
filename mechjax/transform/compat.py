"""The few places where JAX versions differ. Everything else uses public JAX as it is."""

from typing import Any

from jax.extend.core import primitives as jp

JIT_P: Any = getattr(jp, "jit_p", None) or getattr(jp, "pjit_p", None)


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carries of a `scan` equation."""
    if "num_consts" in params:  # jax <= 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def is_unspecified(sharding: Any) -> bool:
    """Whether a `jit` equation leaves this sharding to the compiler."""
    return type(sharding).__name__ == "UnspecifiedValue"


def varying(aval: Any) -> frozenset[str]:
    """Mesh axes over which a value differs inside `shard_map` (empty where JAX does not check)."""
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", frozenset()))


def manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """Mesh axes that a `shard_map` equation makes manual."""
    return frozenset(params.get("newly_manual_axes", params.get("manual_axes", ())))
