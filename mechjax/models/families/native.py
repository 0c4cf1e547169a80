"""mechjax's own layout: config.json holds our config field by field, and every tensor is one of our parameters.

For decoders that no Hugging Face architecture expresses, such as attention-only ones: `export(model, folder,
family="mechjax")` writes any, and `load` reads it back bit for bit. No other library opens these folders.

A part of the config that is a class of its own is an object whose `kind` names the class. A field that the file leaves
out has its default, so that folders outlive fields that are added; a field that is not known is refused.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mechjax.base.errors import UnsupportedModelError, did_you_mean
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.rule import Rule
from mechjax.models.model_config import ModelConfig

_KIND = "kind"


@dataclass(frozen=True)
class _Whole(Rule):
    """A parameter stored as it is, its layers stacked."""

    def places(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield self.name, ()

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return config.shapes[self.name]

    def split(self, array: Any, config: ModelConfig, **sizes_here: int) -> dict[str, Any]:
        return {self.name: array}

    def join(self, params: Mapping[str, Any], config: ModelConfig) -> Any:
        return params[self.name]


class _Native(Family):
    """A family whose tensors are our parameters, whatever a config asks for."""

    def rules_for(self, config: ModelConfig) -> tuple[Rule, ...]:
        """One rule per parameter."""
        return tuple(_Whole(path, (path,), "") for path in config.shapes)


def _encoded(value: Any) -> Any:
    """A value of the config as JSON holds it."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_KIND: type(value).__name__} | fields
    return [_encoded(x) for x in value] if isinstance(value, tuple) else value


def _decoded(value: Any, hint: Any, field: str) -> Any:
    """The inverse, where `hint` is the annotation of the field."""
    if isinstance(value, list):
        return tuple(_decoded(x, hint, field) for x in value)
    if not isinstance(value, dict):
        return value
    known = {cls.__name__: cls for cls in _classes(hint)}
    kind = value.get(_KIND)
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedModelError(
            f"The config has `{field}` of the `{_KIND}` {kind!r}; known are {', '.join(known) or 'none'}."
            f"{did_you_mean(str(kind), known)} Was it written by a newer mechjax?"
        )
    fields = {f.name: f.type for f in dataclasses.fields(known[kind])}
    given = {k: v for k, v in value.items() if k != _KIND}
    if unknown := [name for name in given if name not in fields]:
        raise UnsupportedModelError(
            f"The config has `{field}` with {', '.join(map(repr, unknown))}; a {kind} has {', '.join(sorted(fields))}."
            f"{did_you_mean(unknown[0], fields)} Was it written by a newer mechjax?"
        )
    return known[kind](**{k: _decoded(v, fields[k], f"{field}.{k}") for k, v in given.items()})


def _classes(hint: Any) -> Iterator[type]:
    """The dataclasses in an annotation, and what derives from them."""
    if isinstance(hint, type) and not get_args(hint):
        if dataclasses.is_dataclass(hint):
            yield hint
        for derived in hint.__subclasses__() if hint.__module__.startswith("mechjax.") else ():
            yield from _classes(derived)
    for part in get_args(hint):
        yield from _classes(part)


def _reader(name: str, hint: Any) -> Callable[[HfConfig], Any]:
    return lambda given: _decoded(given[name], hint, name)


_FIELDS = [f for f in dataclasses.fields(Config) if f.name != "precision"]  # how to compute, not what

NATIVE: Family = _Native(
    name="mechjax",
    architectures=("MechjaxDecoder",),
    model_type="mechjax",
    config={f.name: _reader(f.name, f.type) for f in _FIELDS},
    choices={},
    weights=(),
    prefix="",
    to_hf=lambda config: {f.name: _encoded(getattr(config, f.name)) for f in _FIELDS},
    defaults={f.name: f.default for f in _FIELDS if f.default is not dataclasses.MISSING},
)
