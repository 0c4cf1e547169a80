"""A drawing of the strongest edges of a graph: layers from the input below to the logits on top.

Places follow from names alone (`a0.h1`, `a1.kv0<k>`, `m2`), so any graph whose nodes and readers are named so can be
drawn. Nodes without an edge that is drawn are dots: the shape of the model stays, and takes no room.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mechjax.viz.html import Html, tag

_NAME = re.compile(r"([am])(\d+)(?:\.(\w+?))?(?:<([qkv])>)?")
_BOX, _DOT, _GAP, _TALL = 38.0, 7.0, 6.0, 21.0  # widths of nodes with and without edges, between them; height
_LETTER = 6.95  # width in a fixed-width font
_LAYER, _RAISED, _PORT, _BRACKET = 100.0, 37.0, 11.0, 13.0
_LEFT, _MOST_DOTS = 58.0, 64
_SMALLEST = 0.7  # of its own size: below, names cannot be read, and the drawing scrolls
_SIDES = {"q": -11.0, "k": 0.0, "v": 11.0}


@dataclass(frozen=True)
class Drawn:
    """One edge to draw.

    Attributes:
        number: Its place in the list that stands beside the drawing.
        node: Name of the node that sends.
        reader: Name of the reader.
        share: Its score over the largest size, -1 to 1.
        said: What to say of it when it is pointed at.
    """

    number: int
    node: str
    reader: str
    share: float
    said: str


def owner(reader: str) -> str:
    """The node, or group of heads that share keys and values, that a reader belongs to."""
    return reader.partition("<")[0]


def width(share: float) -> float:
    """How wide an edge is drawn: less than in proportion, so that weak ones are still seen."""
    return 0.7 + 6.0 * share**0.8


def edge_graph(nodes: Sequence[str], readers: Sequence[str], edges: Sequence[Drawn], *, caption: str) -> Html:
    """The drawing, as one SVG element whose colours are those of the page.

    Args:
        nodes: Names of all nodes that write, in forward order.
        readers: Names of all readers.
        edges: The edges to draw, the strongest first.
        caption: What it shows, in one sentence.
    """
    plan = _Plan(tuple(nodes), tuple(readers), tuple(edges))
    curves = [_curve(plan, edge) for edge in reversed(edges)]  # the strongest lie on top
    return tag(
        "svg", tag("title", caption), plan.bands(), curves, plan.ports(), plan.boxes(), role="img",
        viewBox=f"0 0 {plan.wide:.0f} {plan.tall:.0f}",
        style=f"width:{1.25 * plan.wide:.0f}px;min-width:{_SMALLEST * plan.wide:.0f}px",
    )  # fmt: skip


@dataclass(frozen=True)
class _Box:
    x: float  # of its middle
    y: float  # of its top
    width: float


@dataclass(frozen=True)
class _Plan:
    """Where everything stands."""

    nodes: tuple[str, ...]
    readers: tuple[str, ...]
    edges: tuple[Drawn, ...]

    @cached_property
    def active(self) -> frozenset[str]:
        """What has an edge."""
        return frozenset(name for edge in self.edges for name in (edge.node, owner(edge.reader)))

    @cached_property
    def layers(self) -> list[tuple[list[str], list[str]]]:
        """For each layer its heads, and its MLP's nodes."""
        found: dict[int, tuple[list[str], list[str]]] = {}
        for name in self.nodes:
            if said := _NAME.fullmatch(name):
                found.setdefault(int(said[2]), ([], []))[said[1] == "m"].append(name)
        for _, mlps in found.values():
            mlps.sort(key=lambda name: "." in name)  # whole MLPs below each other, their units beside them
        return [tuple(map(self._seen, found[layer])) for layer in sorted(found)]  # pyright: ignore[reportReturnType]

    def _seen(self, names: list[str]) -> list[str]:
        return names if len(names) <= _MOST_DOTS else [name for name in names if name in self.active]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The heads of each group that shares keys and values."""
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(map(owner, self.readers)):
            said = _NAME.fullmatch(name)
            if said and (said[3] or "").startswith("kv"):
                found[name] = []
        for layer, (heads, _) in enumerate(self.layers):
            own = [name for name in found if name.startswith(f"a{layer}.")]
            for i, head in enumerate(heads if own else ()):
                found[own[i * len(own) // len(heads)]].append(head)
        return found

    def _width(self, names: Sequence[str]) -> float:
        sizes = [max(_BOX, _LETTER * len(_label(n)) + 7) if n in self.active else _DOT for n in names]
        return sum(sizes) + _GAP * max(len(names) - 1, 0)

    @cached_property
    def middle(self) -> float:
        """Where rows of heads have their middle."""
        return _LEFT + max((self._width(heads) for heads, _ in self.layers), default=0.0) / 2

    @cached_property
    def wide(self) -> float:
        """The drawing's width."""
        mlps = max((self._width(mlps) for _, mlps in self.layers), default=0.0)
        return max(2 * self.middle - _LEFT + mlps + 95, 340.0)

    @cached_property
    def tall(self) -> float:
        """The drawing's height."""
        return 150 + _LAYER * len(self.layers)

    @cached_property
    def spine(self) -> float:
        """Where input and logits have their middle."""
        return (_LEFT + self.wide - 40) / 2

    @cached_property
    def box(self) -> dict[str, _Box]:
        """Where each node stands; the input and the logits are wide, so that edges spread along them."""
        bar = max(120.0, 0.5 * (self.wide - _LEFT))
        found = {
            "input": _Box(self.spine, self.tall - 36, bar),
            "logits": _Box(self.spine, 10.0, bar),
        }
        for layer, (heads, mlps) in enumerate(self.layers):
            y = self.tall - 82 - _LAYER * layer - _TALL - (_BRACKET if self.groups else 0)
            starts = (self.middle - self._width(heads) / 2, 2 * self.middle - _LEFT + 30)
            for names, start, top in zip((heads, mlps), starts, (y, y - _RAISED), strict=True):
                for i, name in enumerate(names):
                    width = self._width([name])
                    right = start + self._width(names[: i + 1])
                    found[name] = _Box(right - width / 2, top, width)
        return found

    def port(self, reader: str) -> tuple[float, float]:
        """Where edges into a reader end."""
        said, name = _NAME.fullmatch(reader), owner(reader)
        if name in self.groups:
            inside = [self.box[head] for head in self.groups[name] if head in self.box]
            x = sum(box.x for box in inside) / max(len(inside), 1)
            return x + _SIDES[said[4]] - 5.5 if said else x, inside[0].y + _TALL + _BRACKET + _PORT
        box = self.box[name]
        aside = _SIDES[said[4]] if said and said[4] and not self.groups else 0.0
        return box.x + aside, box.y + _TALL + (_PORT if said and said[4] else 0.0)

    def bands(self) -> list[Html]:
        """Names of the layers, and every other one shaded."""
        found = []
        for layer in range(len(self.layers)):
            top = self.tall - 68 - _LAYER * (layer + 1)
            if layer % 2 == 0:
                found.append(
                    tag("rect", x="0", y=f"{top:.0f}", width=f"{self.wide:.0f}", height=f"{_LAYER:.0f}",
                        rx="8", class_="band")
                )  # fmt: skip
            found.append(
                tag("text", f"layer {layer}", x="10", y=f"{top + _LAYER / 2 + 4:.0f}", class_="layer")
            )
        return found

    def ports(self) -> list[Html]:
        """The sides by which heads read, where an edge ends, and brackets under heads that share keys."""
        found = []
        for reader in dict.fromkeys(edge.reader for edge in self.edges):
            said, name = _NAME.fullmatch(reader), owner(reader)
            if not said or not said[4]:
                continue
            x, y = self.port(reader)
            if name in self.groups:
                ends = [self.box[head] for head in (self.groups[name][0], self.groups[name][-1])]
                left, right, top = ends[0].x - ends[0].width / 2, ends[1].x + ends[1].width / 2, y - _PORT - 4
                path = f"M{left:.1f} {top - 4:.1f} V{top:.1f} H{right:.1f} V{top - 4:.1f}"
                found.append(tag("path", d=path, class_="bracket"))
            found.append(tag("text", said[4], x=f"{x:.1f}", y=f"{y - 2:.1f}", class_="side"))
        return found

    def boxes(self) -> list[Html]:
        """The nodes."""
        said = {name: _told(name, self.edges) for name in self.active}
        found = []
        for name, box in self.box.items():
            dim = {"x": f"{box.x - box.width / 2:.1f}", "width": f"{box.width:.1f}"}
            if name in ("input", "logits") or name in self.active:
                rect = tag("rect", **dim, y=f"{box.y:.1f}", height=f"{_TALL:.0f}", rx="5")
                text = tag("text", _label(name), x=f"{box.x:.1f}", y=f"{box.y + 15:.1f}")
                found.append(
                    tag("g", rect, text, class_="node", data_node=name, data_tip=said.get(name, name))
                )
            else:
                found.append(
                    tag("circle", cx=f"{box.x:.1f}", cy=f"{box.y + _TALL / 2:.1f}", r="2.4", class_="idle",
                        data_tip=f"{name}: none of the edges shown")
                )  # fmt: skip
        return found


def _label(name: str) -> str:
    """What is written into a node: its head or unit, as its layer stands at the left."""
    return (_NAME.fullmatch(name) or [name] * 4)[3] or name


def _told(name: str, edges: Sequence[Drawn]) -> str:
    sends = sum(edge.node == name for edge in edges)
    reads = sum(owner(edge.reader) == name for edge in edges)
    return f"{name}: sends {sends} and reads {reads} of the edges shown"


def _curve(plan: _Plan, edge: Drawn) -> Html:
    """One edge, from the top of what sends to where it is read; a wide line nobody sees makes it easy to point at."""
    start, (x1, y1) = plan.box[edge.node], plan.port(edge.reader)
    x0, y0 = start.x, start.y
    if edge.node == "input":
        x0 = _along(start, x1)
    if edge.reader == "logits":
        x1 = _along(plan.box["logits"], x0)
    rise = y0 - y1
    reach = max(0.45 * rise, 14.0)
    # Edges along a column would lie upon each other and upon what stands between: the longer ones swing out.
    swing = np.exp(-(((x1 - x0) / 40) ** 2)) * np.clip(0.28 * (rise - _LAYER), 0, 75)
    aside = float(swing) * (1 if x0 >= plan.middle else -1)
    d = f"M{x0:.1f} {y0:.1f}C{x0 + aside:.1f} {y0 - reach:.1f} {x1 + aside:.1f} {y1 + reach:.1f} {x1:.1f} {y1:.1f}"
    size = abs(edge.share)
    look = f"stroke-width:{width(size):.2f}px;--o:{0.35 + 0.55 * size**0.5:.2f}"
    sign = "n" if edge.share < 0 else "p"
    return tag(
        "g", tag("path", d=d, class_="hit"), tag("path", d=d, style=look), class_=f"edge {sign}",
        data_edge=edge.number, data_from=edge.node, data_to=owner(edge.reader), data_tip=edge.said,
    )  # fmt: skip


def _along(bar: _Box, x: float) -> float:
    """Where on a wide node an edge to `x` leaves."""
    return bar.x + float(np.clip(0.6 * (x - bar.x), -0.47 * bar.width, 0.47 * bar.width))
