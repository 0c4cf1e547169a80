"""Names for marks, and the layers that they belong to.

A site is called after its module's path, with `.input` or `.output`: `blocks.attn.output`. Layers are left out of the
name. In a loop, the loop's counter is the layer. Outside loops, modules of one name that are numbered from 0 on, have
modules inside, and agree in the shapes of all that they have in common (`blocks_0`, `blocks.1`) are layers; only the
outermost such number is a layer, any other stays, joined by an underscore (`mlp.layers_0`; `block_1_0` in a list of
lists).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import ArgumentError, SiteError, did_you_mean
from mechjax.interop.marks import Mark, Recorder, mark_number, raw_name
from mechjax.transform.table import SiteInfo

Part = tuple[str, int | None]  # a word of a path, and its number; "" for a number right after another
Sites = Mapping[str, str | tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Name:
    """What a mark is called, the layer it stands in, how many there are, the names of its axes, and who has it.

    `having` are the layers that have such a mark, where not all do.
    """

    name: str
    layer: int | None = None
    layers: int | None = None
    axes: tuple[str, ...] = ()
    having: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Chosen:
    """A site renamed by the user: its new name, the name that it has by its path, and its axes."""

    name: str
    path: str
    axes: tuple[str, ...]


def chosen_sites(sites: Sites | None) -> tuple[Chosen, ...]:
    """The user's `sites=`, checked as far as can be before the model is traced.

    Raises:
        ArgumentError: one activation is given two names, or something else than paths.
    """
    chosen = []
    for name, given in (sites or {}).items():
        path, axes = (given, ()) if isinstance(given, str) else given
        if not isinstance(path, str) or isinstance(axes, str):
            raise ArgumentError(
                f"sites={{{name!r}: {given!r}}}: give the path of an activation, or the path and the names of its last "
                f"axes: {{{name!r}: ('blocks.output', ('pos', 'd_model'))}}."
            )
        chosen.append(Chosen(name, path, tuple(axes)))
    paths = [c.path for c in chosen]
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice is not None:
        both = " and ".join(f"`{c.name}`" for c in chosen if c.path == twice)
        raise ArgumentError(f"sites= names `{twice}` twice, {both}; an activation has one name. Choose one.")
    return tuple(chosen)


def name_modules(recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, Name]:
    """Names for the marks of modules that are in the program; number of the mark -> name."""
    infos = _in_program(recorder, table)
    marks = {i: recorder.marks[i] for i in infos if recorder.marks[i].call not in recorder.wrappers}
    tails = _tails(marks)
    parts = {i: _parts(mark.path) for i, mark in marks.items()}
    layered = _containers({i: infos[i] for i in marks}, parts, tails)
    names: dict[int, Name] = {}
    for i, path in parts.items():
        places = (k for k in range(len(path)) if (path[:k], path[k][0]) in layered)
        at = None if infos[i].stacked else next(places, None)
        name = ".".join([*_words(path, at), *tails[i]])
        names[i] = Name(name) if at is None else Name(name, path[at][1], layered[path[:at], path[at][0]])
    return _with_holders(names)


def _with_holders(names: dict[int, Name]) -> dict[int, Name]:
    """The names, saying which layers have them where not all do."""
    holders: dict[str, set[int]] = defaultdict(set)
    for name in names.values():
        if name.layer is not None:
            holders[name.name].add(name.layer)
    return {
        i: name
        if name.layers is None or len(holders[name.name]) == name.layers
        else replace(name, having=tuple(sorted(holders[name.name])))
        for i, name in names.items()
    }


def name_occurrences(recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, Name]:
    """Names for marks that carry their own: outside loops, occurrences of one name and shape are layers."""
    infos = _in_program(recorder, table)
    by_name: dict[str, list[int]] = defaultdict(list)
    for i in infos:
        by_name[recorder.marks[i].path[0]].append(i)
    names: dict[int, Name] = {}
    for name, found in by_name.items():
        n = len(found)
        alike = len({(infos[i].shape, infos[i].dtype) for i in found}) == 1
        for k, i in enumerate(found):
            if n == 1:
                names[i] = Name(name)
            elif alike and not any(infos[j].stacked for j in found):
                names[i] = Name(name, k, n)
            else:
                names[i] = Name(f"{name}.call_{k}")
    return names


def settle(names: dict[int, Name], chosen: Sequence[Chosen]) -> dict[int, Name]:
    """The names as they can be asked for: the user's own, else the paths.

    Raises:
        SiteError: the user renames what is not there, or to a name that is taken.
    """
    have = {n.name for n in names.values()}
    for c in chosen:
        if c.path not in have:
            raise SiteError(
                f"sites= names `{c.name}` after `{c.path}`, which this model does not have."
                f"{did_you_mean(c.path, have)} It has {_some(have)}; "
                "mechjax.list_sites(subject, ...) without sites= shows all of them."
            )
    renamed = {c.path: c for c in chosen}
    kept = have - set(renamed)
    for c in chosen:
        if c.name in kept:
            raise SiteError(
                f"sites= names `{c.path}` `{c.name}`, but another activation has that name already. Choose another."
            )
    return {
        i: replace(name, name=spelled_out(c.name)[0], axes=c.axes) if (c := renamed.get(name.name)) else name
        for i, name in names.items()
    }


def _some(names: set[str], most: int = 12) -> str:
    shown = sorted(names)[:most]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{n}`" for n in shown) + more if shown else "none"


def _in_program(recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, SiteInfo]:
    """The marks that are in the program, in its order."""
    numbers = dict.fromkeys(mark_number(name.partition("@")[0]) for name in table)
    return {i: table[raw_name(i)] for i in numbers if i is not None and raw_name(i) in table}


def _tails(marks: dict[int, Mark]) -> dict[int, tuple[str, ...]]:
    """What follows the module's path in a name: method, call (where there are several), side, place in a tuple."""
    calls: dict[Any, dict[int, int]] = defaultdict(dict)  # in the order of the program
    for mark in marks.values():
        known = calls[mark.path, mark.method]
        known.setdefault(mark.call, len(known))
    tails = {}
    for i, mark in marks.items():
        known = calls[mark.path, mark.method]
        call = f"call_{known[mark.call]}" if len(known) > 1 else ""
        tails[i] = tuple(part for part in (mark.method, call, mark.side, mark.leaf) if part)
    return tails


def _parts(path: tuple[str, ...]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for word in path:
        numbered = re.fullmatch(r"(.+)_(\d+)", word)
        if numbered:
            parts.append((numbered[1], int(numbered[2])))
        elif word.isdecimal() and parts and parts[-1][1] is None:
            parts[-1] = (parts[-1][0], int(word))
        elif word.isdecimal() and parts:
            parts.append(("", int(word)))  # a list in a list
        else:
            parts.append((word, None))
    return tuple(parts)


def _words(path: tuple[Part, ...], layer_at: int | None) -> list[str]:
    """The words of a name, with every number joined on but the layer's."""
    words: list[str] = []
    for k, (word, n) in enumerate(path):
        text = word if n is None or k == layer_at else f"{word}_{n}"
        if word:
            words.append(text)
        else:
            words[-1] += text
    return words


def _containers(
    infos: dict[int, SiteInfo], parts: dict[int, tuple[Part, ...]], tails: dict[int, tuple[str, ...]]
) -> dict[Any, int]:
    """The numbered modules that are layers: (path to them, their name) -> how many there are."""
    inside: dict[Any, dict[int, set[Any]]] = defaultdict(lambda: defaultdict(set))
    shapes: dict[Any, dict[Any, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for i, info in infos.items():
        if info.stacked:
            continue
        for k, (word, n) in enumerate(parts[i]):
            if word and n is not None:  # of a list in a list, only the outer may be layers
                key, rest = (parts[i][:k], word), parts[i][k + 1 :]
                inside[key][n].add(rest)
                shapes[key][rest, tails[i]].add((info.shape, str(info.dtype)))
    return {
        key: len(members)
        for key, members in inside.items()
        if len(members) > 1
        and set(members) == set(range(len(members)))
        and all(any(rests) for rests in members.values())  # modules with modules inside
        and all(len(found) == 1 for found in shapes[key].values())
    }
