"""Controls: with one rule broken, the law that it serves must fail. A law that cannot fail says nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import batching, mlir

from mechjax.transform import changes, edits, evaluate, request, rules, select, transforms
from mechjax.transform.site import _batch, site_p
from tests.laws import test_free, test_laws
from tests.laws.subjects import Nesting, build


@pytest.fixture(autouse=True)
def fresh_programs():
    """Programs traced under a broken rule must not be found again."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_control__law_1__a_site_that_computes():
    def costs(ctx, x, *layer, **_):
        return mlir.lower_fun(lambda x, *_: x * jnp.float32(1.0000001), multiple_results=False)(
            ctx, x, *layer
        )

    mlir.register_lowering(site_p, costs)
    try:
        with pytest.raises(AssertionError):
            test_free.law_1(Nesting(), "forward")
    finally:
        mlir.register_lowering(site_p, lambda ctx, x, *layer, **_: [x])


def test_control__law_2__an_edit_of_every_position(monkeypatch):
    monkeypatch.setattr(changes, "axis_mask", lambda *_: jnp.bool_(True))
    with pytest.raises(AssertionError):
        test_laws.law_2(build(), "hidden", 1, 0)


def test_control__law_3__a_capture_of_what_enters_the_site(monkeypatch):
    def before(request, eqn, operands, env, state):
        read = request.reads_here
        request.reads_here = lambda eqn: False
        outs, state = at_site(request, eqn, operands, env, state)
        request.reads_here = read
        info = request.sites[eqn.params["name"]]
        for r in request.asked(env.numbers)[1]:
            if r.site == info.name and read(eqn):
                kept = state.buffers[r.site], state.counts[r.site]
                put = partial(evaluate.write_row, r, info, None)
                written = evaluate._written(r, put, operands[0], operands[1], info, (), *kept)
                state.buffers[r.site], state.counts[r.site] = written
        return outs, state

    at_site = evaluate._at_site
    monkeypatch.setattr(evaluate, "_at_site", before)
    with pytest.raises(AssertionError):
        test_laws.law_3(build(), "hidden", 1)


def test_control__law_4__edits_in_reverse_order(monkeypatch):
    asked = request.Request.asked

    def reversed_edits(self, numbers):
        edits, reads = asked(self, numbers)
        return edits[::-1], reads

    monkeypatch.setattr(request.Request, "asked", reversed_edits)
    with pytest.raises(AssertionError):
        test_laws.law_4(build(), ("hidden", 1), ("hidden", 1))


def test_control__law_5__batching_that_forgets_the_axis():
    def forgets(args, dims, **params):
        return site_p.bind(*args, **params), dims[0]

    batching.primitive_batchers[site_p] = forgets
    try:
        with pytest.raises((AssertionError, ValueError, LookupError)):
            test_laws.law_5_vmap(build(), "hidden", 1)
    finally:
        batching.primitive_batchers[site_p] = _batch


def test_control__law_5__an_edit_that_stops_gradients(monkeypatch):
    monkeypatch.setitem(changes.CHANGES, "replace", lambda x, value: jax.lax.stop_gradient(value))
    with pytest.raises(AssertionError):
        test_laws.law_5_grad(build(), "hidden", 1)


def test_control__law_6__the_loops_counter_in_place_of_the_layer(monkeypatch):
    at_site = evaluate._at_site

    def counts(request, eqn, operands, env, state):
        layer = [] if env.counter is None else [env.counter]
        return at_site(request, eqn, [operands[0], *layer], env, state)

    monkeypatch.setattr(evaluate, "_at_site", counts)
    test_laws.law_6(build(Nesting("scanned")))  # there the two are the same
    with pytest.raises(AssertionError):
        test_laws.law_6(build(Nesting("segments")))


def test_control__law_7__no_poison(monkeypatch):
    monkeypatch.setattr(transforms, "settle", lambda edits, hits, outs: outs)
    with pytest.raises(AssertionError):
        test_laws.law_7(build(), 9)


def test_control__law_7__no_look_at_concrete_numbers(monkeypatch):
    monkeypatch.setattr(transforms, "check", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_laws.law_7(build(), 9)


def test_control__law_8__numbers_that_are_static(monkeypatch):
    monkeypatch.setattr(edits, "as_index", lambda x, what: x)  # a Python int is structure, not data
    monkeypatch.setattr(select, "as_index", lambda x, what: x)
    with pytest.raises((AssertionError, AttributeError)):
        test_laws.law_8(build())


def test_controls__rules_are_whole_again():
    assert rules.RULES["scan"] is rules._scan
    test_laws.law_6(build())
