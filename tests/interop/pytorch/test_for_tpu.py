"""A bridged decoder for described TPUs: the compiler takes it, and its text has none of the faults that none may have."""

import pytest

from tests.interop.pytorch.for_tpu import PROGRAMS
from tests.needs import CHIPS, torch_bridge
from tests.parallel import for_tpu
from tests.parallel.test_for_tpu import faults

torch_bridge()


@CHIPS
@pytest.mark.slow
def test_for_four_chips__of_a_bridged_decoder__has_no_fault_and_divides_examples():
    found, said = for_tpu.compiled("v5e:2x2", "4x1", *PROGRAMS, script="tests.interop.pytorch.for_tpu")
    assert set(found) == set(PROGRAMS), said
    for name, facts in found.items():
        assert faults(facts) == [], (name, facts)
        assert facts["collectives"] == [{}], name  # examples do not interact
