"""The command line: argv in, exit status out. One verb, one file."""

from mechjax.cli.main import main as main
