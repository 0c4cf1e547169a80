"""Large numbers for people: bytes in powers of 1024, everything else in powers of 1000."""

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_WORDS = ("", " thousand", " million", " billion", " trillion")


def in_bytes(n: int | float) -> str:
    """A number of bytes: `3221225472` is `"3.0 GiB"`."""
    value, power = _scaled(n, 1024, len(_BINARY))
    return f"{n:.0f} B" if power == 0 else f"{_rounded(value)} {_BINARY[power]}"


def in_flop(n: int | float) -> str:
    """A number of floating-point operations: `2.5e12` is `"2.5 TFLOP"`."""
    value, power = _scaled(n, 1000, len(_DECIMAL))
    return f"{n:.0f} FLOP" if power == 0 else f"{_rounded(value)} {_DECIMAL[power]}FLOP"


def in_words(n: int | float) -> str:
    """A count: `124439808` is `"124 million"`."""
    value, power = _scaled(n, 1000, len(_WORDS))
    return f"{n:.0f}" if power == 0 else f"{_rounded(value)}{_WORDS[power]}"


def _scaled(n: int | float, base: int, powers: int) -> tuple[float, int]:
    """`n` as a number below `base`, as it will be rounded, and the power of it."""
    power, value = 0, float(n)
    while abs(value) >= base - 0.5 and power < powers - 1:
        value, power = value / base, power + 1
    return value, power


def _rounded(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
