"""Attention by a device's own kernel, where nobody asks to see its scores or pattern."""
