"""Where a result comes from: the code that made it, what it was made from, and where it ran.

Arrays and pytrees are told by checksums, numbers and short text as they are. Of the process only what is listed here is
ever kept: versions, devices, JAX's settings that change numbers. No path, no name of a user or machine, and no variable
of the environment but those listed.
"""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.digests import array_leaves, arrays_digest, is_within_reach, lasts, parts_digest, with_rest
from mechjax.base.errors import ArgumentError, CheckpointError

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "optax")
SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_default_prng_impl",
    "jax_threefry_partitionable",
)  # fmt: skip
"""JAX's settings that change numbers."""
FLAGS = (
    "xla_allow_excess_precision", "xla_backend_optimization_level", "xla_cpu_enable_fast_math",
    "xla_cpu_use_fusion_emitters", "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops",
    "xla_tpu_enable_bf16_nonmatmul", "xla_default_matmul_precision",
)  # fmt: skip
"""Flags in XLA_FLAGS that change numbers; of their values a word or a number is kept, nothing that could be a path."""
VARIABLES = ("NVIDIA_TF32_OVERRIDE",)
"""Variables of the environment that change numbers; kept like flags."""

_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,32}")
_PATH = re.compile(r"(~|/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:)\S*")
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,}"
    r"|ya29\.[\w-]{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.)|://[^/\s]*@"
)
_SHORT = 200  # characters of text that is kept as it is
_SHOWN = 12  # sources in print


@dataclass(frozen=True)
class Source:
    """One thing that a result was made from.

    Attributes:
        name: What the caller calls it: `model`, `clean`, `seed`.
        kind: What it is: a class, or "text", "number", "key", "function".
        value: A number, or short text; None where checksums tell it.
        digest: SHA-256 of all of it; None where it is told by its value, or cannot be told in another process.
        arrays: SHA-256 of its arrays alone, which no version of JAX changes.
        dtypes: Of its arrays.
        mesh: Names and sizes of the axes of the mesh that its arrays are spread over.
        held: Whose parts `arrays` is of, where no process holds the whole: "process 0 of 4".
    """

    name: str
    kind: str
    value: str | int | float | bool | None = None
    digest: str | None = None
    arrays: str | None = None
    dtypes: tuple[str, ...] = ()
    mesh: tuple[tuple[str, int], ...] = ()
    held: str = ""

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.kind} {self.value}" if self.kind == "key" else f"{self.value}"
        told = [self.kind, *self.dtypes]
        if digest := self.digest or self.arrays:
            told.append(f"sha256 {digest[:12]}" + (f" of the parts of {self.held}" if self.held else ""))
        if self.mesh:
            told.append("mesh " + " ".join(f"{axis}={size}" for axis, size in self.mesh))
        return ", ".join(told)


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from; made by `provenance_of`, printed in under 20 lines.

    Attributes:
        mechjax: Its version; "from source" where it is not installed.
        code: SHA-256 of its source files.
        versions: Of Python and of the packages that numbers hang on.
        platform: JAX's, such as "cpu", "gpu", "tpu".
        device: The kind of device.
        devices: How many, in all processes.
        processes: How many.
        settings: JAX's settings, XLA's flags and variables that change numbers, those that are listed in this module.
        made_from: What the caller named.
    """

    mechjax: str
    code: str
    versions: tuple[tuple[str, str], ...]
    platform: str
    device: str
    devices: int
    processes: int
    settings: tuple[tuple[str, str], ...]
    made_from: tuple[Source, ...] = ()

    def page(self) -> dict[str, Any]:
        """As JSON, for a file."""
        told: dict[str, Any] = asdict(self)
        told |= {name: dict(told[name]) for name in ("versions", "settings")}
        told["made_from"] = [_told(one) for one in self.made_from]
        return {"schema": SCHEMA, **json.loads(json.dumps(told))}

    def lines(self) -> list[tuple[str, str]]:
        """What it says, as (word, text)."""
        where = f"{self.platform}, {self.devices} × {self.device}"
        where += f", {self.processes} processes" if self.processes > 1 else ""
        told = [
            ("mechjax", f"{self.mechjax}, code {self.code[:12]}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions)),
            ("device", where),
            ("settings", ", ".join(f"{name} {value}" for name, value in self.settings)),
            *((one.name, str(one)) for one in self.made_from[:_SHOWN]),
        ]
        more = len(self.made_from) - _SHOWN
        return told + ([("", f"… and {more} more")] if more > 0 else [])

    def __repr__(self) -> str:
        told = self.lines()
        wide = max(len(word) for word, _ in told)
        shown = (f"  {word:<{wide}}  {text if len(text) <= 160 else text[:159] + '…'}" for word, text in told)
        return "\n".join(["Provenance", *shown])


def provenance_of(**made_from: Any) -> Provenance:
    """Where what is made now, in this process, comes from.

    Cost: a SHA-256 over what is named (about 1 GB/s), and once in a process over mechjax's own files (some 30 ms). What
    is spread over processes is not gathered: of such arrays the parts that this process holds are told, as such.

    Args:
        **made_from: What it was made from, each under the name that it is to have: models, prompts, metrics, stores,
            tokenizers, arrays and whatever else is a pytree, by checksum; keys, numbers and short text as they are.

    Raises:
        ArgumentError: Something that has no checksum, a path, or text that looks like a secret.
    """
    try:
        found = jax.devices()
        where = (found[0].platform, found[0].device_kind, len(found), jax.process_count())
    except RuntimeError:  # a platform that cannot start; what is of numpy alone needs none
        where = ("none", "none", 0, 1)
    return Provenance(
        _version("mechjax") or "from source",
        code_digest(),
        (("python", platform.python_version()), *((name, _version(name) or "none") for name in PACKAGES)),
        *where,
        tuple(_settings()),
        tuple(_source(name, value) for name, value in made_from.items()),
    )


def placed(name: str, tree: Any, arrays: str | None = None) -> Source:
    """A pytree whose arrays have checksums elsewhere: what it is, its dtypes, and the mesh that it is spread over.

    Args:
        name: What it is to be called.
        tree: The pytree.
        arrays: SHA-256 of its arrays, where it is known.
    """
    leaves = array_leaves(tree)
    return Source(name, type(tree).__name__, None, None, arrays, _dtypes(leaves), _mesh(leaves))


def read_provenance(page: Any) -> Provenance:
    """What `Provenance.page` wrote.

    Raises:
        CheckpointError: It is of a later schema, or is none.
    """
    told = dict(page) if isinstance(page, dict) else {}
    if (schema := told.pop("schema", None)) != SCHEMA:
        raise CheckpointError(
            f"the provenance has schema {schema!r}, and this mechjax reads {SCHEMA}: read it with the one that "
            "wrote it, or a newer one."
        )
    try:
        told |= {name: tuple(told[name].items()) for name in ("versions", "settings")}
        known = {field.name for field in fields(Source)}
        told["made_from"] = tuple(
            Source(**{k: _frozen(v) for k, v in one.items() if k in known}) for one in told["made_from"]
        )
        if not all(isinstance(told[word], str) for word in ("mechjax", "code", "platform", "device")):
            raise TypeError("a word is no text")
        return Provenance(**told)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the provenance is none that mechjax writes ({error}).") from None


@functools.cache
def code_digest() -> str:
    """SHA-256 of mechjax's own source files, of their names and bytes, as they lie on disk when first asked for."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()} {len(data)};".encode())
        total.update(data)
    return total.hexdigest()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _settings() -> Iterator[tuple[str, str]]:
    for name in SETTINGS:
        if hasattr(jax.config, name):
            yield name.removeprefix("jax_"), str(getattr(jax.config, name))
    split = (flag.lstrip("-").partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    flags = {name: value for name, _, value in split}
    found = {name: flags.get(name) for name in FLAGS} | {name: os.environ.get(name) for name in VARIABLES}
    yield from ((name, value) for name, value in found.items() if value and _WORD.fullmatch(value))


def _source(name: str, value: Any) -> Source:
    """One thing, told.

    Raises:
        ArgumentError: It cannot be.
    """
    if isinstance(value, PurePath):
        _refuse(
            name,
            "a path",
            "give what lies there, a model or a tokenizer, whose checksum is kept, or its name",
        )
    if (plain := _plain(name, value)) is not None:
        return plain
    if isinstance(digest := getattr(value, "digest", None), str):  # a store, a tokenizer
        return Source(name, type(value).__name__, digest=digest)
    if _is_key(value):
        words = np.asarray(jax.random.key_data(value)).reshape(-1).tolist()
        return Source(name, "key", f"{jax.random.key_impl(value)} {' '.join(map(str, words))}")
    leaves = array_leaves(value)
    if not leaves and inspect.isroutine(value):
        return _function(name, value)
    if not leaves and not lasts(value):
        found = f"a {type(value).__name__} without arrays, which no checksum tells in another process"
        _refuse(name, found, "give its name, and its numbers each by theirs")
    return _tree(name, value, leaves)


def _plain(name: str, value: Any) -> Source | None:
    """Numbers and text, and lists and tables of these; None where something else is in it."""
    if not (value is None or isinstance(value, bool | int | float | str | list | tuple | dict)):
        return None
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return None
    if isinstance(value, bool | int | float):
        finite = isinstance(value, int) or np.isfinite(value)
        return Source(name, "number", value if finite else str(value))
    kind = "text" if isinstance(value, str) else type(value).__name__
    if len(text) > _SHORT:
        told = hashlib.sha256(text.encode()).hexdigest()
        return Source(name, f"{kind} of {len(text)} characters", digest=told)
    for part in _texts(value):
        if _PATH.fullmatch(part):
            _refuse(name, "a path", "give what lies there, whose checksum is kept, or a name")
        if _SECRET.search(part):
            _refuse(name, "text that looks like a key or a token", "leave it out: results are passed on")
    return Source(name, kind, text)


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _function(name: str, value: Any) -> Source:
    """A function: its name, and a checksum of its source where there is one. What it closes over is not told."""
    try:
        digest = hashlib.sha256(inspect.getsource(value).encode()).hexdigest()
    except (OSError, TypeError):
        digest = None
    return Source(name, f"function {value.__module__}.{value.__qualname__}", digest=digest)


def _tree(name: str, value: Any, leaves: list[Any]) -> Source:
    """A pytree."""
    one = len(leaves) == 1 and leaves[0] is value
    kind = f"array {list(value.shape)}" if one else type(value).__name__
    held, digest = "", None
    if all(map(is_within_reach, leaves)):
        arrays = arrays_digest(value)
        digest = with_rest(value, arrays) if lasts(value) else None
    else:
        arrays, held = parts_digest(value), f"process {jax.process_index()} of {jax.process_count()}"
    return Source(name, kind, None, digest, arrays if leaves else None, _dtypes(leaves), _mesh(leaves), held)


def _dtypes(leaves: list[Any]) -> tuple[str, ...]:
    return tuple(sorted({str(leaf.dtype) for leaf in leaves}))


def _mesh(leaves: list[Any]) -> tuple[tuple[str, int], ...]:
    """The axes of the meshes that arrays are spread over."""
    places = (leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array))
    named = (place for place in places if isinstance(place, jax.sharding.NamedSharding))
    return tuple(dict.fromkeys(axis for place in named for axis in place.mesh.shape.items()))


def _is_key(value: Any) -> bool:
    return (
        isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.size == 1
    )


def _told(source: Source) -> dict[str, Any]:
    """A source as JSON, without what it does not have."""
    told: dict[str, Any] = {
        name: value for name, value in asdict(source).items() if value not in (None, "", ())
    }
    return {**told, "name": source.name, **({"mesh": dict(source.mesh)} if source.mesh else {})}


def _frozen(value: Any) -> Any:
    """Lists and tables of JSON as the tuples that they were."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _refuse(name: str, found: str, do: str) -> NoReturn:
    raise ArgumentError(
        f"`{name}` cannot be told in the provenance of a result: it is {found}. What a result was made from is told by "
        f"checksums, numbers and short text; {do}."
    )
