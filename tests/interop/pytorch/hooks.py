"""What forward hooks of PyTorch see, and do, at every module's inputs and outputs: the oracle of the bridge."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

Key = tuple[str, int, str, str]  # module, call, side, place
Change = Callable[[Key, Any], Any]


def _changed(value: Any, key: tuple[str, int, str], at: tuple[str, ...], change: Change) -> Any:
    if isinstance(value, torch.Tensor):
        place = "" if all(part == "0" for part in at) else ".".join(at)
        return change((*key, place), value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [_changed(part, key, (*at, str(i)), change) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_changed(part, key, (*at, str(i)), change) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        parts = {name: _changed(part, key, (*at, str(name)), change) for name, part in value.items()}
        return type(value)(**parts) if dataclasses.is_dataclass(value) else parts
    return value


def run_hooked(module: Any, kwargs: dict[str, Any], change: Change) -> Any:
    """Call the module with `change(key, tensor)` put in place of every tensor that a module takes or returns."""
    calls: dict[str, int] = {}
    running: list[int] = []
    handles = []

    def before(name: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            running.append(calls.setdefault(name, 0))
            calls[name] += 1
            key = (name, running[-1], "input")
            return _changed(args, key, (), change), _changed(kwargs, key, (), change)

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
            return _changed(out, (name, running.pop(), "output"), (), change)

        return hook

    how = {"with_kwargs": True, "prepend": True}  # before hooks by which the module itself notes values
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(before(name), **how))
        handles.append(part.register_forward_hook(after(name), **how))
    try:
        return module(**kwargs)
    finally:
        for handle in handles:
            handle.remove()


def seen(module: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[Key, Any]]:
    """The output, and a copy of every tensor that a module takes or returns."""
    values: dict[Key, Any] = {}

    def keep(key: Key, x: Any) -> Any:
        values[key] = x.detach().clone()
        return x

    with torch.no_grad():
        return run_hooked(module, kwargs, keep), values


def gradients(module: Any, kwargs: dict[str, Any], metric: Callable[[Any], Any]) -> dict[Key, Any]:
    """d metric / d value by autograd, for every floating value; zero where the metric does not depend on it."""
    values: dict[Key, Any] = {}

    def keep(key: Key, x: Any) -> Any:
        if not x.is_floating_point():
            return x
        x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        values[key] = x
        return x.clone()  # the module may write into it

    with torch.enable_grad():
        value = metric(run_hooked(module, kwargs, keep))
        found = torch.autograd.grad(value, list(values.values()), allow_unused=True)
    pairs = zip(values.items(), found, strict=True)
    return {key: torch.zeros_like(x) if g is None else g for (key, x), g in pairs}


def candidates(key: Key, n_calls: int) -> list[tuple[str, int | None]]:
    """The names that a site may have for what a hook sees, with its layer: any one number of the path may be it."""
    path, call, side, place = key
    words = path.split(".") if path else []
    tail = [*([f"call_{call}"] if n_calls > 1 else []), side, *([place] if place else [])]
    numbers = [i for i, word in enumerate(words) if word.isdecimal() or re.fullmatch(r".+_\d+", word)]
    numbered = [
        i for i in numbers if not (words[i].isdecimal() and i - 1 in numbers)
    ]  # of lists in lists, the outer
    names = []
    for layer_at in [None, *numbered]:
        parts: list[str] = []
        for i, word in enumerate(words):
            if i == layer_at:
                if not word.isdecimal():
                    parts.append(word.rpartition("_")[0])
            elif word.isdecimal() and parts:
                parts[-1] += f"_{word}"
            else:
                parts.append(word)
        number = None if layer_at is None else int(re.search(r"\d+$", words[layer_at])[0])
        names.append((".".join([*parts, *tail]), number))
    return names
