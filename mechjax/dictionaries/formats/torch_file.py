"""The tensors of a file that `torch.save` wrote, without torch and without unpickling.

Such a file is a zip: `data.pkl` says which tensors there are, `data/0`, `data/1`, ... are their numbers. The pickle
is read as text: `pickletools.genops` gives its opcodes, and those that state dicts are made of are followed on a
stack of plain values. No class is looked up, nothing is imported and no function of the file's choosing is called: a
name is compared with a list, and what it would have done is done here. Everything else is refused by name.

Reference: torch/serialization.py of torch 2.13 (zip format, since 1.6); Python's `pickletools` for the opcodes.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats.zip_file import BROKEN

LARGEST_PICKLE = 16 << 20  # bytes; a dictionary's is a few kilobytes
_STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED = "collections.OrderedDict"
_NAMES = {_TENSOR, _PARAMETER, _ORDERED, *_STORAGES}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9c"
_ADVICE = "Do not open files from sources that you do not trust."


def read_torch(path: Path) -> Any:
    """What `torch.save` was given: tensors as arrays, containers and numbers as they are.

    Raises:
        CheckpointError: Missing, truncated, of the format before torch 1.6, or holding anything but tensors and plain
            containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, f"`{path}`", path.stat().st_size)
    except CheckpointError:
        raise
    except BROKEN as error:
        raise CheckpointError(_not_a_zip(path, error)) from None


def read_state(path: Path) -> dict[str, Any]:
    """As `read_torch`, of a file that holds a dict with names for keys: a state dict.

    Raises:
        CheckpointError: What `read_torch` refuses, or something else than such a dict.
    """
    state = read_torch(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"`{path}` holds a {type(state).__name__}; a dict of tensors was expected.")
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"`{path}` has keys that are no text; names of tensors were expected.")
    return state


def _not_a_zip(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"There is no file `{path}`."
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        return (
            f"`{path}` is in the format of torch before 1.6, which mechjax does not read. Write it again where torch "
            "is installed: `x = torch.load(FROM, weights_only=True); torch.save(x, TO)`."
        )
    return f"`{path}` is truncated or no file of torch.save: {error}. Download it again."


def _read(archive: zipfile.ZipFile, what: str, size: int) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise CheckpointError(
            f"{what} has two members of one name, so which one counts is undefined. {_ADVICE}"
        )
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"{what} holds {len(roots)} files `data.pkl`; one was expected, as torch.save writes it."
        )

    def member(name: str, most: int) -> bytes:
        info = members.get(roots[0] + name)
        if info is None:
            raise CheckpointError(f"{what} is truncated: it lacks its member `{name}`. Download it again.")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(size, most):
            raise CheckpointError(
                f"The member `{name}` of {what} is compressed or claims {info.file_size} bytes; torch.save writes "
                f"members as they are, and this one has at most {min(size, most)}. {_ADVICE}"
            )
        return archive.read(info)

    if roots[0] + "byteorder" in members and member("byteorder", 16) != b"little":
        raise CheckpointError(f"{what} was written on a big-endian machine, which mechjax does not read.")
    return _Machine(what, lambda key: member(f"data/{key}", size)).run(member("data.pkl", LARGEST_PICKLE))


@dataclass(frozen=True)
class _Name:
    """A global of the pickle: its name, and nothing behind it."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Numbers in a row."""

    numbers: np.ndarray


_MARK = object()


class _Machine:
    """Follows the opcodes of a state dict."""

    def __init__(self, what: str, member: Callable[[str], bytes]):
        self.what, self.member = what, member
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, pickle: bytes) -> Any:
        """The value that the pickle describes."""
        try:
            for opcode, argument, _ in pickletools.genops(pickle):
                if opcode.name == "STOP":
                    break
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise self.refuse(f"its pickle has the opcode {opcode.name}")
                handler(self, argument)
            (value,) = self.stack
        except CheckpointError:
            raise
        # An operand that is missing or of another type: what pickle's own machine would have stumbled over.
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self.refuse(
                f"its pickle is truncated or broken ({type(error).__name__}: {error})"
            ) from None
        return value

    def refuse(self, why: str) -> CheckpointError:
        """What to say of a file that holds more than numbers."""
        return CheckpointError(
            f"{self.what} cannot be read: {why}. Only tensors, plain containers, text and numbers are read, and no "
            f"code is run. {_ADVICE}"
        )

    def push(self, value: Any) -> None:
        """Onto the stack."""
        self.stack.append(value)

    def popped(self) -> list[Any]:
        """What stands above the last mark, which goes too."""
        place = max(i for i, x in enumerate(self.stack) if x is _MARK)
        above = self.stack[place + 1 :]
        del self.stack[place:]
        return above

    def taken(self, n: int) -> tuple[Any, ...]:
        """The last `n` values; a mark is none."""
        if len(self.stack) < n or any(x is _MARK for x in self.stack[-n:]):
            raise IndexError("too few values")
        above = tuple(self.stack[-n:])
        del self.stack[-n:]
        return above

    def remember(self, at: int | None) -> None:
        """The value on top under a number."""
        self.memo[len(self.memo) if at is None else at] = self.stack[-1]

    def name(self, text: str) -> None:
        """A global, by its module and name."""
        if text not in _NAMES:
            raise self.refuse(f"it names `{text[:80]}`")
        self.push(_Name(text))

    def stack_name(self, _: Any) -> None:
        """A global whose module and name are on the stack."""
        module, name = self.taken(2)
        self.name(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def storage(self, _: Any) -> None:
        """Numbers that lie beside the pickle."""
        (claim,) = self.taken(1)
        kind, name, key, _, count = claim
        dtype = _STORAGES.get(name.text) if isinstance(name, _Name) else None
        if kind != "storage" or dtype is None or type(count) is not int or not _is_key(key):
            raise self.refuse(f"it has the persistent id {str(claim)[:80]}")
        if key not in self.storages:
            data = self.member(key)
            if len(data) != count * dtype.itemsize:
                raise self.refuse(f"its storage {key} has {len(data)} bytes, {count} numbers were claimed")
            self.storages[key] = _Storage(np.frombuffer(data, dtype))
        found = self.storages[key]
        if found.numbers.dtype != dtype or len(found.numbers) != count:
            raise self.refuse(f"it describes its storage {key} in two ways")
        self.push(found)

    def call(self, _: Any) -> None:
        """What the function of a pickle would have made, for the three that are known."""
        function, given = self.taken(2)
        text = function.text if isinstance(function, _Name) else None
        if text == _ORDERED and given == ():
            self.push({})
        elif text == _TENSOR:
            self.push(self.tensor(*given[:4]))
        elif text == _PARAMETER and isinstance(given[0], np.ndarray):
            self.push(given[0])
        else:
            raise self.refuse(f"it calls `{text or type(function).__name__}`")

    def tensor(self, storage: Any, start: Any, shape: Any, strides: Any) -> np.ndarray:
        """A view of a storage, none of whose numbers is outside of it or there twice."""
        sizes = (start, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in sizes):
            raise self.refuse(f"it has a tensor of shape {str(shape)[:80]} and strides {str(strides)[:80]}")
        numbers, count = storage.numbers, math.prod(shape)
        last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if len(shape) > 8 or count > len(numbers) or (count and last >= len(numbers)) or 0 in shape:
            raise self.refuse(
                f"it has a tensor of shape {str(shape)[:80]} and strides {str(strides)[:80]} from number {start} of "
                f"a storage of {len(numbers)}"
            )
        steps = [step * numbers.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(numbers[start:], shape, steps, writeable=False)

    def set_items(self, pairs: list[Any]) -> None:
        """Into the dict on top."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.refuse("it sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int | float):
                raise self.refuse(f"it has a key of type {type(key).__name__}")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        """To the list on top."""
        if not isinstance(self.stack[-1], list):
            raise self.refuse("it appends to what is no list")
        self.stack[-1].extend(items)

    def build(self, _: Any) -> None:
        """The state of an OrderedDict: its versions of modules, which say nothing of the numbers."""
        target, state = self.taken(2)
        if not isinstance(target, dict) or not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise self.refuse("it sets the state of an object")
        self.push(target)


def _is_key(key: Any) -> bool:
    """Whether `key` is a number in text, as storages are named."""
    return isinstance(key, str) and len(key) < 10 and key.isascii() and key.isdigit()


def _table() -> dict[str, Callable[[_Machine, Any], None]]:
    """What is done at each opcode that is known."""
    push: Callable[[_Machine, Any], None] = lambda m, x: m.push(x)
    nothing: Callable[[_Machine, Any], None] = lambda m, _: None
    literal = [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    ]
    table: dict[str, Callable[[_Machine, Any], None]] = {
        **dict.fromkeys(literal, push),
        **dict.fromkeys(("PROTO", "FRAME"), nothing),
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, at: m.remember(at)),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, at: m.push(m.memo[at])),
        "MEMOIZE": lambda m, _: m.remember(None),
        "NONE": lambda m, _: m.push(None),
        "NEWTRUE": lambda m, _: m.push(True),
        "NEWFALSE": lambda m, _: m.push(False),
        "MARK": lambda m, _: m.push(_MARK),
        "EMPTY_DICT": lambda m, _: m.push({}),
        "EMPTY_LIST": lambda m, _: m.push([]),
        "EMPTY_TUPLE": lambda m, _: m.push(()),
        "TUPLE": lambda m, _: m.push(tuple(m.popped())),
        "TUPLE1": lambda m, _: m.push(m.taken(1)),
        "TUPLE2": lambda m, _: m.push(m.taken(2)),
        "TUPLE3": lambda m, _: m.push(m.taken(3)),
        "SETITEM": lambda m, _: m.set_items(list(m.taken(2))),
        "SETITEMS": lambda m, _: m.set_items(m.popped()),
        "APPEND": lambda m, _: m.append(list(m.taken(1))),
        "APPENDS": lambda m, _: m.append(m.popped()),
        "GLOBAL": lambda m, text: m.name(".".join(text.split(" "))),
        "STACK_GLOBAL": _Machine.stack_name,
        "BINPERSID": _Machine.storage,
        "REDUCE": _Machine.call,
        "BUILD": _Machine.build,
    }
    return table


_HANDLERS = _table()
