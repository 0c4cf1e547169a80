"""What all workers of a store must agree on before any of them does a unit: what is being done."""

import hashlib
import json
from typing import Any

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.workers.store import Store

SPECIFICATION = "sweep.json"


def agree(store: Store, wanted: dict[str, Any], *, units: str) -> str:
    """Write what is to be done, or compare it with what whoever was first has written; its checksum.

    Args:
        store: Of the sweep.
        wanted: What this worker would do, as JSON.
        units: With what the names of units begin.

    Raises:
        ArgumentError: The store is another sweep's; what differs is named.
        CheckpointError: What was written is not whole, or units are there without it.
        WriteError: The store cannot be written.
    """
    path, digest = store.path(SPECIFICATION), digest_of(wanted)
    there = store.read(SPECIFICATION)
    if there.value is None:
        if _has(store, units):
            raise CheckpointError(
                f"`{store.place}` holds units, but no `{SPECIFICATION}` that says of which sweep. Choose another "
                "folder."
            )
        page = json.dumps({**wanted, "sha256": digest}, indent=1).encode()
        if store.write(SPECIFICATION, page, over=there) is not None:
            return digest
        there = store.read(SPECIFICATION)  # somebody was quicker
    found = specification_of(there.value or b"", path)
    differs = [
        f"`{name}` is {_brief(found.get(name))} there and {_brief(wanted.get(name))} here"
        for name in (*wanted, *(found.keys() - wanted.keys()))
        if found.get(name) != wanted.get(name)
    ]
    if differs:
        raise ArgumentError(
            f"`{store.place}` holds another sweep: {'; '.join(differs)}. Go on with what it was begun with, or choose "
            "another folder."
        )
    return digest


def specification_of(data: bytes, path: str) -> dict[str, Any]:
    """What is being done, of the file's bytes.

    Raises:
        CheckpointError: It is not whole.
    """
    try:
        found: Any = json.loads(data)
        whole = isinstance(found, dict) and found.pop("sha256", None) == digest_of(found)
    except (ValueError, RecursionError):
        found, whole = {}, False
    if not whole:
        raise CheckpointError(
            f"`{path}` is not whole, or was changed: its checksum differs. Choose another folder, or delete it to "
            "sweep again."
        )
    return found


def digest_of(page: dict[str, Any]) -> str:
    """Checksum of what is being done."""
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _has(store: Store, units: str) -> bool:
    try:
        return bool(store.names(units))
    except CheckpointError:  # it cannot be written either, and that says what is wrong
        return False


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 33 else f"{text[:29]}...{text[-1]}"
