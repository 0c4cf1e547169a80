"""What some tests need that no dependency brings everywhere, and why they are skipped without it."""

import importlib.util
import signal
import sys

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
