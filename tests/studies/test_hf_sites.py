"""Sites read by hooks: the weight rules and the catalogue's spellings name the same modules."""

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from mechjax.base.catalogue import SITES, canonical
from mechjax.base.errors import UnsupportedModelError
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import N_BATCH, N_POS, pair, torch


@pytest.mark.parametrize("case", ["gpt2", "pythia", "neox_serial", "llama_gqa"])
def test_spellings__paths_of_modules__hold_the_sites_numbers(case):
    one = pair(case)
    seen = {}

    def hook(path, _module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        for end, value in (("input", inputs[0] if inputs else None), ("output", first)):
            if isinstance(value, torch.Tensor):
                seen[f"{path}.{end}"] = value.numpy().copy()

    handles = [m.register_forward_hook(partial(hook, path)) for path, m in one.hf.named_modules() if path]
    theirs = hf_sites(one.hf, one.model.config, one.tokens)
    for handle in handles:
        handle.remove()
    spelled = {path: canonical(path) for path in seen if canonical(path)[0] in SITES}
    assert {site for site, _ in spelled.values()} >= {"embed", "resid_pre", "z", "mlp_out", "logits"}
    for path, place in spelled.items():
        value = theirs[place].reshape(N_BATCH, N_POS, -1)  # heads merged, as the module has them
        assert_array_equal(np.broadcast_to(seen[path], value.shape), value, err_msg=path)


def test_hf_sites__of_a_model_of_no_family__is_refused():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError, match=r"A Other has no family whose modules are known; known are GPT2"
    ):
        hf_sites(Other(), pair("gpt2").model.config, np.zeros((1, 2), int))
