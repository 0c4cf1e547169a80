"""Changes to an exported graph before it is decomposed, in operations of our own."""

import functools
from typing import Any

from mechjax.base.optional import require


@functools.cache
def _registered() -> tuple[Any, Any]:
    torch = require("torch", extra="torch")
    library = torch.library.Library("mechjax", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("mark(Tensor x, int number) -> Tensor", tags=tags)
    library.define("stop(Tensor x) -> Tensor", tags=tags)
    library.impl("mark", lambda x, number: x.clone(), "CompositeExplicitAutograd")
    library.impl("stop", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.fx.node.has_side_effect(torch.ops.mechjax.mark.default)  # else a value that nobody reads is dropped
    return library, torch.ops.mechjax  # a library that is let go takes back what it defined


def operations() -> Any:
    """Our own operations in torch's registry: `mark` and `stop` (of gradients); both are identities.

    Raises:
        MissingExtraError: torch is not installed.
    """
    return _registered()[1]


def module_of(node: Any) -> str:
    """Where in the module a node of the graph comes from, in words."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    paths = [path.removeprefix("module").removeprefix(".") for path, _ in stack]
    return f"`{paths[-1]}`" if paths and paths[-1] else "the module itself"


def reshape_views(graph_module: Any) -> None:
    """Make views reshapes: decomposed, what they are views of may have other strides, which JAX has none of."""
    torch = require("torch", extra="torch")
    for inner in graph_module.modules():
        for node in getattr(inner, "graph", torch.fx.Graph()).nodes:
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default


def stop_gradients(graph_module: Any) -> None:
    """Make `detach` and `no_grad` operations of the graph: decomposition takes both for identities."""
    torch = require("torch", extra="torch")
    stop, aten = operations().stop.default, torch.ops.aten
    for inner in graph_module.modules():
        if not isinstance(inner, torch.fx.GraphModule):
            continue
        for node in list(inner.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.detach.default:
                node.target = stop
            elif str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
                for part in list(node.users):
                    with inner.graph.inserting_after(part):
                        stopped = inner.graph.call_function(stop, (part,))
                    stopped.meta = dict(part.meta)
                    part.replace_all_uses_with(stopped, delete_user_cb=lambda user, s=stopped: user is not s)
        inner.recompile()
