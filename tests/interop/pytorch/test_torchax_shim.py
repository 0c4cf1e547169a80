"""torchax beside the torch that is installed: whether the shim is still needed, and that it leaves nothing behind."""

import subprocess
import sys

from mechjax.interop.pytorch.torchax_shim import lowerings
from tests.interop.pytorch.networks import torch


def test_torchax__by_itself__cannot_be_imported_yet():
    """When this fails, torchax has caught up with torch: delete `_named_tensor_overloads`."""
    code = "import torchax.ops.jaten, torchax.decompositions"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no overload name 'dim_Dimname'" in done.stderr


def test_lowerings__of_torchax__are_functions_of_arrays():
    known = lowerings()
    assert torch.ops.aten.mm in known.functions and torch.ops.aten.gelu in known.functions
    assert all(callable(function) for function in known.functions.values())
    assert len(known.decompositions) > 100
