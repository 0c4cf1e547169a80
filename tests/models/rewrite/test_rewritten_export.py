"""Rewritten models as Hugging Face folders: what transformers computes from them, or which choice no folder can say."""

import numpy as np
import pytest

from mechjax.base.errors import UnsupportedModelError
from mechjax.models import parameters
from mechjax.models.export import export
from mechjax.models.load import load
from mechjax.models.rewrite import (
    center_unembed,
    center_writing,
    fold_norm,
    fold_value_bias,
    refactor_qk_ov,
    ungroup_kv,
)
from tests.models.rewrite.subjects import assert_close

transformers = pytest.importorskip("transformers", reason="needs transformers to open what was written")
torch = pytest.importorskip("torch", reason="needs PyTorch to open what was written")

EXPRESSIBLE = [
    ("llama_mqa", "llama", fold_norm),  # untied by it
    ("llama_gqa", "llama", ungroup_kv),
    ("llama_mha", "llama", fold_value_bias),
    ("gpt2", "gpt2", center_writing),
    ("gpt2", "gpt2", refactor_qk_ov),
]


@pytest.mark.parametrize(("name", "family", "rewrite"), EXPRESSIBLE)
def test_export__rewritten__computes_the_same_in_transformers(tmp_path, name, family, rewrite):
    from tests.parity.cases import pair

    case = pair(name)
    rewritten = rewrite(case.model)
    folder = export(rewritten, tmp_path / name, family=family)
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert_close(opened(torch.from_numpy(case.tokens)).logits.numpy(), case.hf_logits())
    back = load(folder)[0]
    assert back.config == rewritten.config
    for path, leaf in parameters(back).items():
        np.testing.assert_array_equal(leaf, parameters(rewritten)[path])


@pytest.mark.parametrize(
    ("name", "family", "rewrites", "choice"),
    [
        ("gpt2", "gpt2", [fold_norm], "unembed_bias"),
        ("neox_serial", "neox", [fold_value_bias, fold_norm, center_unembed], "unembed_bias"),
    ],
)
def test_export__what_no_folder_can_say__is_refused_by_name(tmp_path, name, family, rewrites, choice):
    from tests.parity.cases import pair

    model = pair(name).model
    for rewrite in rewrites:
        model = rewrite(model)
    with pytest.raises(UnsupportedModelError, match=rf"`{choice}` = True"):
        export(model, tmp_path / "m", family=family)
    assert not list(tmp_path.iterdir())
