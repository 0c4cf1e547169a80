"""The command line: `mechjax tour`, `mechjax patch`, `mechjax sites`. One verb, one file."""
