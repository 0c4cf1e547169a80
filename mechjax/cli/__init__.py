"""The command line: `mechjax tour`, `patch`, `sites`, `check`, `plan`, `doctor`, `sweep`. One verb, one file."""

from mechjax.cli.main import main as main
