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
