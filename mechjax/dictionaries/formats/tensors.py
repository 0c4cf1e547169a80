"""Named tensors of a file, each taken once, in its expected shape; none is left over unseen."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mechjax.base.errors import CheckpointError, UnsupportedModelError, did_you_mean
from mechjax.hub import TensorFile
from mechjax.hub.folder import inside

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Tensors:
    """The tensors of one dictionary.

    Sizes have names; a name means one number throughout: what the config says of it, or the first tensor.

    Attributes:
        what: The file, for messages.
        sizes: What is known of the sizes.
        dtype: In which numbers are handed out.
    """

    def __init__(self, what: str, arrays: Mapping[str, Any], *, dtype: np.dtype, **sizes: int | None):
        self.what, self.dtype = what, dtype
        self.sizes = {name: size for name, size in sizes.items() if size is not None}
        self._arrays = dict(arrays)

    @classmethod
    def of_safetensors(cls, folder: Path, name: str, *, dtype: np.dtype, **sizes: int | None) -> "Tensors":
        """Those of a safetensors file of `folder`."""
        file = TensorFile(inside(folder, name))
        return cls(f"`{folder / name}`", {key: file[key] for key in file.entries}, dtype=dtype, **sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def take(self, name: str, *axes: str) -> np.ndarray:
        """The tensor `name`, whose axes have the sizes of these names.

        Raises:
            CheckpointError: It is missing, has another shape, or holds no floating-point numbers.
        """
        if name not in self._arrays:
            raise CheckpointError(
                f"{self.what} lacks the tensor `{name}`; it holds {_listed(self._arrays)}."
                f"{did_you_mean(name, self._arrays)} Is it of the format that was read?"
            )
        array = self._arrays.pop(name)
        if not isinstance(array, np.ndarray) or array.dtype.name not in _FLOATS:
            kind = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
            raise CheckpointError(
                f"`{name}` of {self.what} is of {kind}; numbers of {', '.join(_FLOATS)} were expected."
            )
        fits = len(array.shape) == len(axes) and all(
            self.sizes.setdefault(axis, size) == size and size > 0
            for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits:
            right = ", ".join(f"{axis}={self.sizes.get(axis, 'any')}" for axis in axes)
            raise CheckpointError(
                f"`{name}` of {self.what} has the shape {array.shape}; ({right}) was expected."
            )
        return array.astype(self.dtype)

    def take_if(self, name: str, *axes: str) -> np.ndarray | None:
        """The tensor `name`, or None where there is none."""
        return self.take(name, *axes) if name in self else None

    def number(self, name: str) -> float | int:
        """The one number in the tensor `name`, or a plain number of that name.

        Raises:
            CheckpointError: It is missing or no single number.
        """
        value = self._arrays.pop(name, None)
        if (
            isinstance(value, np.ndarray)
            and value.size == 1
            and value.dtype.name in (*_FLOATS, "int32", "int64")
        ):
            value = value.reshape(()).astype(np.float64 if "float" in value.dtype.name else np.int64).item()
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.what} has no number `{name}`; is it of the format that was read?")
        return value

    def whole_numbers(self, name: str) -> list[int]:
        """The positive whole numbers in the tensor `name`.

        Raises:
            CheckpointError: It is missing or holds others.
        """
        value = self._arrays.pop(name, None)
        fits = (
            isinstance(value, np.ndarray)
            and value.ndim == 1
            and value.dtype.kind == "i"
            and (value > 0).all()
        )
        if not fits:
            raise CheckpointError(
                f"{self.what} has no positive whole numbers `{name}`; is it of the format that was read?"
            )
        return [int(n) for n in value]

    def drop(self, *names: str) -> None:
        """Leave out what says nothing of the function."""
        for name in names:
            self._arrays.pop(name, None)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            CheckpointError: A tensor that was not taken.
        """
        if self._arrays:
            raise CheckpointError(
                f"{self.what} holds {_listed(self._arrays)} besides what a dictionary of its kind has. That would be "
                "dropped silently, so the load is refused. Is it of the format that was read?"
            )


class Settings:
    """A config, whose values are taken by type.

    Attributes:
        what: The file, for messages.
        values: What it says.
    """

    def __init__(self, what: str, values: Mapping[str, Any]):
        self.what, self.values = what, values

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A positive whole number; None where there is none."""
        return self._of(name, default, lambda x: type(x) is int and x > 0, "a positive whole number")

    def number(self, name: str, default: float | int | None = None) -> float | int | None:
        """A number; None where there is none."""
        fits = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
        return self._of(name, default, fits, "a number")

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._of(name, default, lambda x: isinstance(x, bool), "true or false")

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text; None where there is none."""
        return self._of(name, default, lambda x: isinstance(x, str), "text")

    def inner(self, name: str) -> "Settings":
        """A config within this one; empty where there is none."""
        value = self._of(name, {}, lambda x: isinstance(x, dict), "an object")
        return Settings(f"`{name}` in {self.what}", value)

    def needed(self, name: str, value: Any) -> Any:
        """`value`, unless it is None.

        Raises:
            CheckpointError: It is.
        """
        if value is None:
            raise CheckpointError(
                f"{self.what} does not say `{name}`, without which the dictionary is not known."
            )
        return value

    def refuse_unless(self, name: str, value: Any, known: Iterable[Any]) -> None:
        """Whether mechjax has what the config asks for.

        Raises:
            UnsupportedModelError: It has not.
        """
        known = list(known)
        if value not in known:
            raise UnsupportedModelError(
                f"{self.what} has {name}={value!r}, which mechjax does not implement; it reads "
                f"{', '.join(repr(x) for x in known)}."
            )

    def _of(self, name: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not fits(value):
            raise CheckpointError(f"{self.what} has {name}={str(value)[:60]!r}; {kind} was expected.")
        return value


def _listed(names: Iterable[str]) -> str:
    found = sorted(str(name)[:60] for name in names)
    return ", ".join(f"`{name}`" for name in found[:8]) + (", ..." if len(found) > 8 else "") or "nothing"
