"""Sites read by hooks; what they hold is compared in `tests/parity`."""

import numpy as np
import pytest

from mechjax.base.errors import UnsupportedModelError
from mechjax.studies.hf_sites import hf_sites
from tests.parity.cases import pair, torch


def test_hf_sites__of_a_model_of_no_family__is_refused():
    class Other(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError, match=r"A Other has no family whose modules are known; known are GPT2"
    ):
        hf_sites(Other(), pair("gpt2").model.config, np.zeros((1, 2), int))


def test_hf_sites__as_many_positions_as_heads__leave_out_what_may_be_either():
    one = pair("phi")  # whose norms on queries and keys see heads before positions
    config = one.model.config
    found = hf_sites(one.hf, config, one.tokens[:, : config.n_heads])
    assert config.n_heads != config.n_kv_heads
    assert {"q_norm.normalized", "k_norm.normalized"} & {site for site, _ in found} == {"k_norm.normalized"}
