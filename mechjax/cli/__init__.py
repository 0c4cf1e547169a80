"""The command line: `mechjax tour`, `mechjax patch`, `mechjax sites`. One verb, one file."""

from mechjax.cli.main import main as main
