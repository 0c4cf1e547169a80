"""Large numbers for people."""

import pytest

from mechjax.base.units import in_bytes, in_flop, in_words


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (1023.9 * 1024, "1.0 MiB"), (141e9, "131 GiB"), (1 << 62, "4096 PiB")],
)  # fmt: skip
def test_in_bytes__of_a_number__uses_powers_of_1024(n, said):
    assert in_bytes(n) == said


def test_in_flop_and_in_words__of_a_number__use_powers_of_1000():
    assert [in_flop(n) for n in (999, 1500, 2.5e12, 3e20)] == [
        "999 FLOP",
        "1.5 kFLOP",
        "2.5 TFLOP",
        "300 EFLOP",
    ]
    assert [in_words(n) for n in (7, 1200, 124_439_808, 70_553_706_496)] == [
        "7", "1.2 thousand", "124 million", "70.6 billion"
    ]  # fmt: skip
