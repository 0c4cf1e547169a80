"""Devices by name."""

import pytest

from mechjax.base.errors import ArgumentError
from mechjax.parallel.hardware import MEMORY, Hardware, hardware


@pytest.mark.parametrize(
    ("name", "kind", "n"),
    [("v5e-256", "v5e", 256), ("v5e:16x16", "v5e", 256), ("v5p:2x2x4", "v5p", 16), ("8xH200", "H200", 8), ("h100", "H100", 1)],
)  # fmt: skip
def test_hardware__in_every_spelling__is_known(name, kind, n):
    found = hardware(name)
    assert found == Hardware(kind, n)
    assert 0.9 * MEMORY[kind] < found.room < MEMORY[kind]


@pytest.mark.parametrize("name", ["v9-8", "H300", "0xH100", "8x", "", "v5e:2xx"])
def test_hardware__that_nobody_makes__says_what_there_is(name):
    with pytest.raises(ArgumentError, match=r"expected such as 'v5e-256', .* of v4, v5e"):
        hardware(name)


def test_hardware__nearly_spelled__is_suggested():
    with pytest.raises(ArgumentError, match=r"H200"):
        hardware("8xH20")
