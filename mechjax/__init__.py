"""mechjax: mechanistic interpretability for language models as pure JAX functions.

`site` names an activation, `capture` and `intervene` are transforms like `grad` and `vmap`, and `load` brings a model.
"""

import importlib
from typing import Any

from mechjax.base.prompts import Prompts as Prompts
from mechjax.base.records import provenance as provenance
from mechjax.base.records import restore as restore
from mechjax.base.records import save as save
from mechjax.models import init as init
from mechjax.models import resume as resume
from mechjax.parallel.mesh import make_mesh as make_mesh
from mechjax.parallel.shard import shard as shard
from mechjax.transform import add as add
from mechjax.transform import apply as apply
from mechjax.transform import capture as capture
from mechjax.transform import clamp as clamp
from mechjax.transform import compile_log as compile_log
from mechjax.transform import intervene as intervene
from mechjax.transform import list_sites as list_sites
from mechjax.transform import mean_ablate as mean_ablate
from mechjax.transform import means as means
from mechjax.transform import per_example as per_example
from mechjax.transform import project_out as project_out
from mechjax.transform import replace as replace
from mechjax.transform import resample as resample
from mechjax.transform import run as run
from mechjax.transform import scale as scale
from mechjax.transform import site as site
from mechjax.transform import value_and_grad_at as value_and_grad_at
from mechjax.transform import zero as zero

_LAZY = {
    "load": "mechjax.models.load",
    "export": "mechjax.models.export",
    "dry_run": "mechjax.models.dry_run",
    "generate": "mechjax.models.generate",
    "plan": "mechjax.models.plan",
    "check": "mechjax.studies.check",
    "tour": "mechjax.studies.tour",
    "verify": "mechjax.artefacts",
}
_PACKAGES = frozenset(
    {
        "artefacts",
        "attribution",
        "decompose",
        "dictionaries",
        "dicteval",
        "dictlearn",
        "fit",
        "graph",
        "heads",
        "hub",
        "interop",
        "metrics",
        "models",
        "parallel",
        "patching",
        "rasp",
        "studies",
        "store",
        "tasks",
        "text",
        "transform",
        "viz",
        "workers",
    }
)


def __getattr__(name: str) -> Any:
    """Import what is heavy or seldom needed on first use."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("mechjax")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"mechjax.{name}")
    raise AttributeError(f"module 'mechjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_PACKAGES})
