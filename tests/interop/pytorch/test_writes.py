"""Writes in place into memory of which a graph has copies: refused where a copy would lack them, else as in torch."""

import pytest
from numpy.testing import assert_array_equal

from mechjax.base.errors import UnsupportedModelError
from mechjax.interop import from_torch
from tests.interop.pytorch.networks import D, Holding, torch


def _into_what_was_given(inner, x):
    x = 2 * x
    y = inner(x)
    x[:, 0] = 0
    return y + 1


def _into_a_view(inner, x):
    x = 2 * x
    first = x[:, :1]
    y = inner(x)
    first.zero_()
    return y + 1


def _as_out(inner, x):
    y = inner(2 * x)
    z = y.view(-1)
    torch.add(inner(y), 1, out=y)
    return z.sum() + inner.kept


def _without_gradients(inner, x):
    x = 2 * x
    y = inner(x)
    with torch.no_grad():
        x.add_(1)
    return y * 1


def _into_what_was_detached(inner, x):
    x = 2 * x
    x.detach().add_(1)
    return inner(x)


def _after_dropout(inner, x):
    x = 2 * x
    torch.nn.functional.dropout(x, 0.1, False).add_(1)
    return inner(x)


class _Handing(torch.nn.Module):
    """Hands on the memory that it was given, as dropout does when it is not training, and keeps it."""

    def forward(self, x):
        self.kept = x
        return x


WRITES = {
    _into_what_was_given: r"aten\.fill_\.\w+ writes in place into the \w+ of `inner`.*aten\.add\.\w+ in the module",
    _into_a_view: r"aten\.zero_\.default writes in place into the \w+ of `inner`.*aten\.add\.\w+ in the module",
    _as_out: r"aten\.add\.out writes in place into the \w+ of `inner`.*aten\.\w+\.\w+ in the module",
    _without_gradients: r"aten\.add_\.Tensor writes in place into the \w+ of `inner`.*aten\.mul\.Tensor in the module",
    _into_what_was_detached: r"aten\.add_\.Tensor writes in place into what mechjax.stop.default in the module itself hands",
    _after_dropout: r"aten\.add_\.Tensor writes in place into what aten.dropout.default in the module itself hands",
    lambda inner, x: (inner(2 * x), inner.kept.add_(1))[0]: r"aten\.add_\.Tensor writes in place into the \w+ of `inner`",
}  # fmt: skip


@pytest.mark.parametrize("do", WRITES)
def test_from_torch__a_write_that_a_copy_would_lack__is_refused(do):
    with pytest.raises(UnsupportedModelError, match=WRITES[do]):
        from_torch(Holding(do, _Handing()).eval(), torch.randn(2, D), dynamic=False)


def test_from_torch__writes_that_every_reader_sees__are_carried():
    def writes(inner, x):
        y = inner(x + 1)
        y.mul_(2)
        with torch.no_grad():
            z = y * 1
            z[:, 0] = 3
        first, second = z.chunk(2)
        first.add_(second)
        return torch.cat([first, y])

    module, x = Holding(writes, _Handing()).eval(), torch.randn(2, D)
    assert_array_equal(from_torch(module, x, dynamic=False)(x.numpy()), module(x))
