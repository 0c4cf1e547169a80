"""Small PyTorch modules, as users write them; and some that no pure function can be made of."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from tests.needs import torch_bridge

torch, _ = torch_bridge()

# Else pytest keeps a line for every tensor that is traced.
logging.getLogger("torch.__trace").propagate = False

LAYERS, POS, D, HIDDEN, VOCAB = 3, 4, 6, 10, 11


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, HIDDEN), torch.nn.Linear(HIDDEN, D)

    def forward(self, x: Any) -> Any:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = torch.nn.LayerNorm(D), MLP()

    def forward(self, x: Any, mask: Any = None) -> tuple[Any, Any]:
        x = x + x.cumsum(1) / (1 + torch.arange(x.shape[1]))[:, None]
        out = self.mlp(self.norm(x))
        return x + (out if mask is None else out * mask[..., None]), out


@dataclasses.dataclass
class Output:
    logits: Any
    last: Any
    nothing: Any = None


class Net(torch.nn.Module):
    """Tied embeddings, blocks that return tuples, a dataclass as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, D)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.unembed = torch.nn.Linear(D, VOCAB, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens: Any, mask: Any = None, *, double: bool = False) -> Output:
        x = self.embed(tokens)
        for block in self.blocks:
            x, out = block(x, mask=mask)
        logits = self.unembed(x)
        return Output(2 * logits if double else logits, (out,))


def net() -> Any:
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        made.embed.weight.mul_(0.3)  # else half precision sees only the largest
    return made


def tokens(batch: int = 2, pos: int = POS) -> Any:
    torch.manual_seed(1)
    return torch.randint(0, VOCAB, (batch, pos))


class Holding(torch.nn.Module):
    """A module with another inside, called by `do(inner, x)`."""

    def __init__(self, do: Callable[..., Any], inner: Any = None) -> None:
        super().__init__()
        self.do, self.inner = do, inner

    def forward(self, x: Any) -> Any:
        return self.do(x) if self.inner is None else self.do(self.inner, x)


def inside(do: Callable[..., Any]) -> Any:
    """A module `inner` that does something, inside another."""
    return Holding(lambda inner, x: inner(x), Holding(do)).eval()
