"""Encoder-decoders, images and state space models in few bits, held to transformers with weights that torch rounded.

The reference knows neither our layouts nor which axes are summed: it rounds rows of `nn.Linear`, as they are stored.
"""

import copy

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from tests.parity import test_mambas, test_t5, test_vision
from tests.parity.cases import torch
from tests.tolerances import TOL

KINDS = {
    **dict.fromkeys(("t5_v1_1", "t5_encoder", "umt5"), test_t5),
    **dict.fromkeys(("vit", "deit_distilled", "clip_projection", "dinov2_gated"), test_vision),
    **dict.fromkeys(("mamba", "falcon", "mamba_biases", "mamba2", "mamba2_limits"), test_mambas),
}
"""Name -> whose pairs of models have it."""
GROUP = 2
LOST = {
    "t5_v1_1": (0.02, 0.15), "t5_encoder": (0.02, 0.15), "umt5": (0.05, 0.4), "vit": (0.004, 0.05),
    "deit_distilled": (0.004, 0.04), "clip_projection": (0.01, 0.04), "dinov2_gated": (0.01, 0.12),
    "mamba": (0.01, 0.15), "falcon": (0.05, 0.4), "mamba_biases": (0.02, 0.1), "mamba2": (0.06, 0.4),
    "mamba2_limits": (0.02, 0.12),
}  # fmt: skip
"""How far the largest number may be off, of the largest there is, in 8 bits and in 4; measured: about two thirds."""
QUICK = {("t5_v1_1", 8), ("clip_projection", 4), ("mamba2", 4)}
CASES = [
    pytest.param(name, bits, marks=() if (name, bits) in QUICK else pytest.mark.slow)
    for name in KINDS
    for bits in (8, 4)
]
every_case = pytest.mark.parametrize(("name", "bits"), CASES)


def kept(name, hf, n_rows):
    """Rows of a linear map that stay: those of rates, all of a Mamba's `dt_proj`, the last of a Mamba-2's `in_proj`."""
    mixer, own = hf.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    n_kept = {"dt_proj": n_rows, "in_proj": getattr(mixer, "num_heads", 0)}.get(own, 0)
    return slice(n_rows - n_kept, None)


def rounded_by_torch(hf, bits):
    """The model with every linear map of its blocks rounded: rows of outputs, or groups of neighbours in these."""
    hf, limit = copy.deepcopy(hf), 127 if bits == 8 else 7
    for name, module in hf.named_modules():
        if not isinstance(module, torch.nn.Linear) or not any(map(str.isdigit, name.split("."))):
            continue
        W, stays = module.weight.data, kept(name, hf, len(module.weight))
        rows = W.double().reshape(len(W), -1, W.shape[1] if bits == 8 or W.shape[1] % GROUP else GROUP)
        scale = rows.abs().amax(-1, keepdim=True) / limit
        own = (torch.round(rows / scale) * scale).reshape(W.shape).to(W.dtype)
        own[stays] = W[stays]
        module.weight.data = own
    return hf


def of_transformers(name, hf):
    """What the model says of the case's inputs, as a call of ours gives it."""
    given = KINDS[name].pair(name)[2]
    if KINDS[name] is test_t5:
        return test_t5.theirs(hf, given)
    with torch.no_grad():
        out = hf(torch.from_numpy(given))
    first = next(key for key in ("logits", "image_embeds", "last_hidden_state") if key in out)
    return out[first].numpy()


def inputs(name):
    given = KINDS[name].pair(name)[2]
    return given if isinstance(given, list) else [given]


@every_case
def test_load__in_few_bits__equals_transformers_with_rows_rounded_by_torch(name, bits, tmp_path):
    hf, model = KINDS[name].pair(name)[:2]
    group = None if bits == 8 else GROUP
    hf.save_pretrained(tmp_path)
    held = mj.load(tmp_path, weights=f"int{bits}", group=group)[0]
    jax.tree.map(assert_array_equal, held, mj.models.quantize(model, bits, group=group))
    ours, right = np.asarray(held(*inputs(name))), of_transformers(name, rounded_by_torch(hf, bits))
    unit = np.abs(right).max()
    assert_allclose(ours / unit, right / unit, **TOL["float32", "parity"])
    lost, most = np.abs(ours - of_transformers(name, hf)).max() / unit, LOST[name][bits == 4]
    assert most / 10 < lost < most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5_v1_1", "vit", "mamba", "mamba2"])
def test_load__in_few_bits_onto_a_mesh__is_split_and_the_same_model(name, tmp_path):
    KINDS[name].pair(name)[0].save_pretrained(tmp_path)
    mesh = mj.make_mesh(data=2, fsdp=4)
    here, there = (mj.load(tmp_path, weights="int4", group=GROUP, mesh=on)[0] for on in (None, mesh))
    jax.tree.map(assert_array_equal, here, there)
    few = [leaf for leaf in mj.models.parameters(there).values() if isinstance(leaf, mj.models.Quantized)]
    assert few and all("fsdp" in leaf.q.sharding.spec for leaf in few if 24 in leaf.shape)
    ours, right = (np.asarray(model(*inputs(name))) for model in (there, here))
    assert_allclose(ours, right, **TOL["float32", "mesh"])
