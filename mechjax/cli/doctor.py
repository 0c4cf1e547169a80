"""`mechjax doctor`: is this machine set up, and is everything in it used."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechjax.base.units import in_bytes

ROOT = Path("/")
PACKAGES = (
    "jax", "jaxlib", "equinox", "optax", "flax", "orbax-checkpoint", "numpy", "scipy", "safetensors", "tokenizers",
    "huggingface_hub", "tensorstore", "jaxtyping", "rich", "tyro",
)  # fmt: skip
EXTRAS = {
    "torch": ("torch", "torchax", "transformers"), "viz": ("plotly", "matplotlib"), "chat": ("jinja2",),
    "tpu-aot": ("libtpu",),
}  # fmt: skip
_TPU_IDS = {
    "0x0027",
    "0x0056",
    "0x005e",
    "0x0062",
    "0x0063",
    "0x006f",
    "0x0076",
}  # v2 to 7x; Google sells NICs too
_LEAST_MEMORY, _LEAST_DISK = 2 << 30, 5 << 30


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        ok: Whether all is well.
        said: What was found, in words.
    """

    ok: bool
    said: str


def doctor(*, online: bool = False) -> int:
    """Check versions, devices, memory, disk, caches and extras; say what to do about each problem.

    Exits with 0 where all is well, 1 otherwise. Uses no network unless asked.

    Args:
        online: Try to reach the Hub, too.
    """
    checks = CHECKS if online else [check for check in CHECKS if check[1] is not _reach]
    found = [(name, look(), advice) for name, look, advice in checks]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, finding, advice in found:
        mark = ("ok", "green") if finding.ok else ("problem", "bold red")
        table.add_row(Text(name, style="bold"), Text(*mark), Text(finding.said))
        if not finding.ok:
            table.add_row("", "", Text(advice, style="yellow"))
    problems = sum(not finding.ok for _, finding, _ in found)
    console = Console()
    console.print(table)
    console.print(
        Text("\nall is well", style="green")
        if not problems
        else Text(f"\n{problems} problem{'s' if problems > 1 else ''}", style="bold red")
    )
    return min(problems, 1)


def version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[Any]:
    """The devices that JAX uses by default.

    Raises:
        RuntimeError: A platform that was asked for cannot start.
    """
    return jax.devices()


def _python() -> Finding:
    return Finding(sys.version_info >= (3, 11), f"{sys.version.split()[0]} at {sys.executable}")


def _versions() -> Finding:
    found = {package: version(package) for package in PACKAGES}
    listed = [f"{package} {n or 'is missing'}" for package, n in found.items()]
    return Finding(
        None not in found.values(), ", ".join([f"mechjax {version('mechjax') or 'from source'}", *listed])
    )


def _match() -> Finding:
    """`jaxlib` within the bounds that jax's own metadata states, plugins of the version of `jaxlib`."""
    core, lib = version("jax"), version("jaxlib")
    bounds = next((r for r in metadata.requires("jax") or () if re.match(r"jaxlib\b[^;]*$", r)), "jaxlib")
    wrong = (
        []
        if lib is not None and _within(lib, bounds)
        else [f"jaxlib {lib}, but jax {core} asks for {bounds}"]
    )
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        plugin = version(name)
        if plugin is not None and plugin != lib:
            wrong.append(f"{name} {plugin}, but jaxlib {lib}: JAX would leave the GPU unused")
    return Finding(not wrong, "; ".join(wrong) or f"jax {core} and jaxlib {lib}")


def _within(found: str, bounds: str) -> bool:
    number = _number(found)
    for sign, bound in re.findall(r"([<>=!]=?|~=)\s*([\d.]+)", bounds):
        right = _number(bound)
        holds = {"<=": number <= right, "<": number < right, ">=": number >= right, ">": number > right,
                 "==": number == right, "!=": number != right}  # fmt: skip
        if not holds.get(sign, True):
            return False
    return True


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def _devices() -> Finding:
    try:
        found = devices()
    except RuntimeError as error:
        return Finding(False, f"JAX cannot start: {' '.join(str(error).split())[:300]}")
    kinds = [device.device_kind for device in found]
    listed = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    limits = [
        (device.memory_stats() or {}).get("bytes_limit") for device in found if device.platform != "cpu"
    ]
    return Finding(True, listed + (f", {in_bytes(limits[0])} each" if limits and limits[0] else ""))


def _compute() -> Finding:
    try:
        x = np.arange(64, dtype=np.float32).reshape(8, 8)
        right = bool(jnp.array_equal(jnp.matmul(x, x, precision="highest"), x @ x))
    except RuntimeError as error:
        return Finding(False, f"a product of two matrices failed: {' '.join(str(error).split())[:300]}")
    return Finding(right, f"a product of two matrices is {'right' if right else 'wrong'}")


def _platform(name: str) -> bool:
    try:
        return any(device.platform == name for device in devices())
    except RuntimeError:
        return False


def _n_tpus() -> int:
    """TPU chips of this machine, by what the kernel shows."""
    ids = [_read(device / "device") for device in ROOT.glob("sys/bus/pci/devices/*")
           if _read(device / "vendor") == "0x1ae0"]  # fmt: skip
    nodes = [node for pattern in ("accel[0-9]*", "vfio/[0-9]*") for node in (ROOT / "dev").glob(pattern)]
    on_bus = sum(i in _TPU_IDS for i in ids)
    # A group of vfio may be anybody's; /dev/accelN is a TPU's, other makers' are in a folder /dev/accel.
    return (
        on_bus or sum("vfio" not in node.parts for node in nodes) or (len(nodes) if version("libtpu") else 0)
    )


def _n_gpus() -> int:
    by_driver = list(ROOT.glob("proc/driver/nvidia/gpus/*"))
    return len(by_driver) or len(list((ROOT / "dev").glob("nvidia[0-9]*")))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _hidden(platform: str) -> bool:
    """Whether the environment keeps JAX from a platform."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    names = {"gpu": {"gpu", "cuda"}}.get(platform, {platform})
    return bool(asked) and not names & set(asked.split(","))


def _hiding() -> Finding:
    present = {"tpu": _n_tpus(), "gpu": _n_gpus()}
    unseen = [name.upper() for name, n in present.items() if n and _hidden(name)]
    asked = os.environ.get("JAX_PLATFORMS")
    said = f"JAX_PLATFORMS={asked}" if asked else "JAX_PLATFORMS is not set: JAX takes the fastest"
    return Finding(
        not unseen, said + (f" hides the {' and the '.join(unseen)} of this machine" if unseen else "")
    )


def _accelerator(platform: str, n: int) -> Finding:
    if not n:
        return Finding(True, "none here")
    used = _platform(platform)
    said = "used by JAX" if used else "hidden by JAX_PLATFORMS" if _hidden(platform) else "not used by JAX"
    return Finding(used or _hidden(platform), f"{n} here, {said}")


def _memory() -> Finding:
    free = re.search(r"MemAvailable:\s*(\d+) kB", _read(ROOT / "proc/meminfo"))
    if free is None:
        return Finding(True, "free memory cannot be seen on this system")
    size = int(free.group(1)) << 10
    limit, taken = (_read(ROOT / "sys/fs/cgroup" / name) for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and taken.isdecimal():  # a container's own share
        size = min(size, max(0, int(limit) - int(taken)))
    return Finding(size >= _LEAST_MEMORY, f"{in_bytes(size)} free")


def hub_cache() -> Path:
    """Where the Hub's files are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _disk() -> Finding:
    folder = hub_cache()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    return Finding(free >= _LEAST_DISK, f"{in_bytes(free)} free where models are kept, {folder}")


def _compiled() -> Finding:
    settings: Any = jax.config
    folder = settings.jax_compilation_cache_dir
    if not folder:
        return Finding(
            True, "none: every process compiles again (JAX_COMPILATION_CACHE_DIR=FOLDER keeps programs)"
        )
    if "://" in folder:
        return Finding(True, folder)
    there = next(p for p in (Path(folder), *Path(folder).absolute().parents) if p.exists())
    right = there.is_dir() and os.access(there, os.W_OK)
    return Finding(right, folder + ("" if right else " cannot be written"))


def _hub() -> Finding:
    from huggingface_hub import constants

    folder = hub_cache()
    state = (
        "offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "online when a name asks for it"
    )
    kept = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    return Finding(True, f"{state}; {kept} model{'' if kept == 1 else 's'} in its cache")


def _reach() -> Finding:
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError as error:
        return Finding(False, f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})")
    return Finding(True, f"{constants.ENDPOINT} can be reached")


def _extras() -> Finding:
    missing = {extra: [n for n in names if util.find_spec(n) is None] for extra, names in EXTRAS.items()}
    told = {
        extra: f"lacks {', '.join(absent)}" if absent else "is installed" for extra, absent in missing.items()
    }
    return Finding(True, "; ".join(f"{extra} {state}" for extra, state in told.items()))


CHECKS: tuple[tuple[str, Callable[[], Finding], str], ...] = (
    ("python", _python, "mechjax needs Python 3.11 or newer."),
    ("packages", _versions, "pip install -U mechjax"),
    ("jax and jaxlib", _match, "pip install -U jax jaxlib, with the extra that the device needs, as below."),
    ("devices", _devices, "Unset JAX_PLATFORMS, or install what it names; see the lines below."),
    ("arithmetic", _compute, "pip install --force-reinstall jax jaxlib"),
    ("platforms", _hiding, "unset JAX_PLATFORMS"),
    ("TPU", lambda: _accelerator("tpu", _n_tpus()),
     'pip install -U "jax[tpu]"    (where it is installed already, another process holds the TPU: end that one)'),
    ("GPU", lambda: _accelerator("gpu", _n_gpus()),
     'pip install -U "jax[cuda13]"    (with a driver older than 580: "jax[cuda12]")'),
    ("memory", _memory, "Models below 1 billion parameters want 2 GiB: end other programs, or use a larger machine."),
    ("disk", _disk, "Delete models that are not needed (hf cache ls), or set HF_HOME to a folder with more room."),
    ("compile cache", _compiled, "Set JAX_COMPILATION_CACHE_DIR to a folder that can be written, or unset it."),
    ("Hub", _hub, ""),
    ("Hub's server", _reach, "Check the network and proxies; folders and models in the cache load without it."),
    ("extras", _extras, ""),
)  # fmt: skip
"""One row per check: its name, what looks, and what to do where that finds a problem."""
