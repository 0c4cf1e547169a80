"""Checks of configs: choices that must be one of few, counts that must be whole numbers."""

import inspect
import math
from typing import Any, Literal, get_args, get_origin

from mechjax.base.errors import ArgumentError


def check_choices(config: Any) -> None:
    """Every `Literal` field holds one of its values, every bool field a bool."""
    hints = {
        name: hint
        for kind in reversed(type(config).__mro__)
        for name, hint in inspect.get_annotations(kind).items()
    }
    for name, hint in hints.items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in list(get_args(hint)):
            raise ArgumentError(f"`{name}` = {value!r} is not one of {', '.join(map(repr, get_args(hint)))}.")
        if hint is bool and not isinstance(value, bool):
            raise ArgumentError(f"`{name}` = {value!r} must be True or False.")


def check_count(name: str, value: Any, most: int = 2**31 - 1) -> None:
    """A whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ArgumentError(f"`{name}` = {value!r} must be a whole number from 1 to {most:,}.")


def check_positive(name: str, value: Any) -> None:
    """A positive, finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"`{name}` = {value!r} must be a positive, finite number.")
