"""What every method of this package runs, under the name by which they know it."""

from mechjax.metrics.measured import FromStart, Measured, measured

__all__ = ["FromStart", "Measured", "measured"]
