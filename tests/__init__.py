"""The tests mirror the tree of mechjax; `laws`, `parity` and `architecture` stand beside it."""
