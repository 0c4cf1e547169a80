"""Typed errors. Each is also a builtin, so that `except LookupError` keeps working.

Every message says four things: what was asked, what was found, what would be right, how to fix it.
"""

import difflib
from collections.abc import Iterable


class MechjaxError(Exception):
    """Base of every error that mechjax raises on purpose; the command line prints it without a traceback."""


class SiteError(MechjaxError, LookupError):
    """A site, layer, head or position that is not there, or a site used where it cannot work."""


class ShapeError(MechjaxError, ValueError):
    """A shape or dtype that cannot be used, or that can be read in two ways."""


class PairingError(MechjaxError, ValueError):
    """Clean and corrupt prompts that do not line up."""


class TokenError(MechjaxError, ValueError):
    """Text or token ids that the tokenizer or the model cannot take."""


class UnsupportedModelError(MechjaxError, ValueError):
    """An architecture, config key or weight layout that mechjax does not implement."""


class StructureError(MechjaxError, AttributeError):
    """What models of another structure have, asked of one that does not, as methods for decoders ask."""


class CheckpointError(MechjaxError, ValueError):
    """A folder or file that is missing, truncated, hostile or inconsistent."""


class HubError(MechjaxError, OSError):
    """A Hub name that cannot be fetched."""


class MissingExtraError(MechjaxError, ImportError):
    """An optional package that is not installed."""


class JitError(MechjaxError, TypeError):
    """A model or transformed callable handed to a JAX transform that would bake its weights in."""


class WriteError(MechjaxError, OSError):
    """A path that cannot be written."""


class SweepError(MechjaxError, RuntimeError):
    """Units of a sweep that failed."""


class RoomError(MechjaxError, MemoryError):
    """A program that does not fit into a device's memory, whatever is run at once."""


class ArgumentError(MechjaxError, ValueError):
    """An argument outside its range, or two arguments that contradict each other."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known names, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
