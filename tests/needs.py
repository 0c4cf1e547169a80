"""What some tests need that no dependency brings everywhere, and why they are skipped without it."""

import importlib.util
import signal
import sys
from typing import Any

import pytest

from tests.viz.chromium import BINARY

NO_BROWSER = "a browser is needed and no dependency brings one: apt-get install chromium"
BROWSER = pytest.mark.skipif(BINARY is None, reason=NO_BROWSER)
CHIPS = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for described chips, has no wheel for this Python",
)
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has /proc, which says what memory is in use"
)
KILLS = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL: processes are killed otherwise there"
)


def torch_bridge() -> tuple[Any, Any]:
    """PyTorch and transformers, for a test module of the bridge; the module is skipped without them, or torchax."""
    why = "the bridge needs PyTorch, transformers and torchax, which the extra `test` installs on Python 3.11 only"
    found = tuple(pytest.importorskip(name, reason=why) for name in ("torch", "transformers"))
    if importlib.util.find_spec("torchax") is None:  # it cannot be imported by itself beside this torch
        pytest.skip(why, allow_module_level=True)
    return found
