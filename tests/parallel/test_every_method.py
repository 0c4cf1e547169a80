"""Everything sharded equals everything unsharded: every public method on one device, on eight, and in two processes."""

import inspect
from functools import cache

import equinox as eqx
import jax
import numpy as np
import pytest

import mechjax as mj
from tests.parallel import apart, placements
from tests.parallel.rows import QUICK, ROWS, found

PLACEMENTS = {"automatic": placements.automatic, "explicit": placements.explicit}
ELSEWHERE = {
    "site", "add", "apply", "clamp", "mean_ablate", "project_out", "replace", "resample", "scale", "zero", "per_example",
    "capture", "intervene",
    "compile_log", "make_mesh", "shard", "restore", "provenance", "init", "assemble", "parameters", "at_steps",
    "shuffled", "load", "write_saelens", "read", "verify", "repair", "repeated_tokens", "stack_transcoders",
    "composition_scores", "agreement", "build", "gate", "from_mib", "to_mib", "planted", "with_dictionary", "load_config", "plan", "export",
}  # fmt: skip
"""Edits, which `edit` has; what makes or reads things of the host; and what rows above use on the way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def expected(folder):
    """What a row gives on one device."""
    case = placements.alone(folder)
    return cache(lambda name: found(name, case))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return cache(lambda name: PLACEMENTS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def in_two_processes(request, tmp_path_factory):
    """What two processes found, of the rows that are to be tested."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.name.startswith("test_row__in_two_processes")]  # fmt: skip
    return apart.together(tmp_path_factory.mktemp("apart"), chosen)


def marked(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_rows__of_all_packages__are_in_the_table():
    functions = {
        name
        for package in (mj, mj.attribution, mj.patching, mj.heads, mj.dicteval, mj.decompose, mj.graph, mj.transform,
                        mj.dictlearn, mj.dictionaries, mj.store, mj.models, mj.metrics, mj.parallel)
        for name, value in vars(package).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }  # fmt: skip
    assert functions - ELSEWHERE == {name.partition(" ")[0] for name in ROWS} & (functions - ELSEWHERE)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", marked(ROWS, QUICK))
def test_row__on_eight_devices__equals_one(name, placement, cases, expected):
    case = cases(placement)
    placements.assert_split(case)
    if placement == "explicit":
        with jax.set_mesh(case.mesh):
            given = found(name, case)
    else:
        given = found(name, case)
    placements.same(given, expected(name))


@pytest.mark.timeout(apart.SECONDS)  # the first waits for all
@pytest.mark.parametrize(
    "name", marked(ROWS, [name for name in QUICK if name != "exact edges"])
)  # long in two
def test_row__in_two_processes__equals_one(name, in_two_processes, expected):
    given = in_two_processes[name]
    assert isinstance(given, list), given
    for process in given:
        placements.same(process, expected(name))


def test_forward__inside_a_users_jit_on_an_explicit_mesh__equals_one_device(cases, expected):
    case = cases("explicit")
    with jax.set_mesh(case.mesh):
        logits = eqx.filter_jit(lambda model, ids: model(ids) * 2)(case.model, case.pair[0])
    np.testing.assert_allclose(logits / 2, expected("forward")[0], **placements.TOL["float32", "mesh"])
