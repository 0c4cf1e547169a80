"""The one door for optional packages: imported by name when first needed, with one line of advice when missing."""

import importlib
from types import ModuleType

from mechjax.base.errors import MissingExtraError


def require(name: str, *, extra: str) -> ModuleType:
    """Import the optional package `name`.

    Args:
        name: The module to import, such as `"torch"`.
        extra: The extra of mechjax that installs it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # the package is there, but something that it needs is not: its own message says what
        raise MissingExtraError(
            f"this needs `{name}`, which is not installed. Install it with: pip install 'mechjax[{extra}]'"
        ) from None
