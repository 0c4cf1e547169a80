"""What holds for every method: nothing where nothing differs, the first bad site named, one program for new numbers.

Beside the tests of each method, which hold some of this by default; here are all, in one table.
"""

import inspect
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import GIM
from mechjax.base.errors import ArgumentError
from tests.attribution import transcoded
from tests.compilations import nothing_compiles
from tests.tolerances import TOL

KEY = jax.random.key(3)


def places(pair):
    """A position of each prompt, not the same for all."""
    return jnp.arange(len(pair[0])) % 2 + 1


def of_edges(method, model, pair, metric, graph, **how):
    return method(model, *pair, metric, graph=graph, **how).scores


def of_site(method, model, pair, metric, graph, **how):
    return method(model, *pair, metric, site="z", over=("layer", "pos", "head"), **how).scores


def of_nodes(model, pair, metric, graph, **how):
    return mj.attribution.atp_star(model, *pair, metric, **how).flat()


def diagnosed(model, pair, metric, graph):
    found = mj.attribution.atp_star(model, *pair, metric)
    diagnosis = mj.attribution.diagnose(
        model, *pair, metric, found=found, verify=3, subsets=12, share=0.5, chunk_size=15, key=KEY
    )
    return jnp.concatenate((diagnosis.exact, diagnosis.effects))


def swept(model, pair, metric, graph, mode="noise"):
    return mj.patching.activation_patch(model, *pair, metric, site="z", over=("layer", "head"), mode=mode)


def patched(model, pair, metric, graph):
    found = swept(model, pair, metric, graph)
    return found.clean.mean() - found.scores


def mediated(model, pair, metric, graph):
    both = [swept(model, pair, metric, graph, mode) for mode in ("denoise", "noise")]
    return mj.patching.mediation_effects(*both, key=KEY).values


def flow(model, pair, metric, graph):
    return mj.attribution.information_flow(model, pair[0], graph=graph).importance


def traced(model, pair, metric, graph):
    trace = partial(mj.patching.causal_trace, subject=places(pair), n_samples=2, key=KEY)
    return trace(model, pair[0], metric).scores


def knocked_out(model, pair, metric, graph):
    return mj.patching.attention_knockout(model, pair[0], metric, queries=-1, keys=places(pair)).scores


ABLATED = {
    "exact edges": partial(of_edges, mj.attribution.exact),
    "exact nodes": partial(of_edges, mj.attribution.exact, over="node"),
    "eap": partial(of_edges, mj.attribution.eap),
    "eap under rules": partial(of_edges, mj.attribution.eap, rules=GIM),
    "eap_ig on inputs": partial(of_edges, mj.attribution.eap_ig, steps=2),
    "eap_ig on activations": partial(of_edges, mj.attribution.eap_ig, steps=2, path="activations"),
    "eap_ig on the mask": partial(of_edges, mj.attribution.eap_ig, steps=2, path="mask"),
    "contextual_decomposition": partial(of_edges, mj.attribution.contextual_decomposition),
    "attribution_patch": partial(of_site, mj.attribution.attribution_patch),
    "integrated_gradients": partial(of_site, mj.attribution.integrated_gradients),
    "direct_logit_attribution": partial(of_site, mj.attribution.direct_logit_attribution),
    "atp_star": of_nodes,
}
"""What ablates in several ways."""
WHOLE = ("exact edges", "exact nodes", "eap", "eap_ig on inputs", "eap_ig on activations", "contextual_decomposition",
         "activation_patch", "path_patching", "information_flow")  # fmt: skip
"""Scores of which none is a position's."""
PAIRED = ABLATED | {
    "diagnose": diagnosed,
    "activation_patch": patched,
    "mediation_effects": mediated,
    "path_patching": partial(of_edges, mj.patching.path_patching),
}
"""What compares two prompts."""
EVERY = PAIRED | {"information_flow": flow, "causal_trace": traced, "attention_knockout": knocked_out}


def test_every_method__of_both_packages__is_in_these_tables():
    functions = {
        name
        for package in (mj.attribution, mj.patching)
        for name, value in vars(package).items()
        if inspect.isfunction(value)
    }
    assert functions - transcoded.METHODS == {name.partition(" ")[0] for name in EVERY}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.slow
def test_every_method__clean_equals_corrupt__gives_zero(name, model, graph, pair, metric):
    found = PAIRED[name](model, (pair[0], pair[0]), metric, graph)
    assert found.size > 3
    np.testing.assert_allclose(found, np.zeros(found.shape), **TOL["float32", "law"])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.slow
def test_every_method__other_prompts_and_answers__compile_nothing(name, model, graph, pair, metric, caplog):
    EVERY[name](model, pair, metric, graph)
    other = mj.metrics.logit_diff(np.array([6, 7, 8], np.int32), np.array([9, 5, 1], np.int32))
    with nothing_compiles(caplog):
        found = EVERY[name](model, tuple(ids[::-1].copy() for ids in pair[::-1]), other, graph)
    assert np.abs(found).max() > 1e-3


@pytest.mark.parametrize("name", ABLATED)
@pytest.mark.slow
def test_every_method__the_mean_over_one_prompt__is_what_resampling_from_it_gives(
    name, model, graph, pair, metric, caplog
):
    """New numbers of an ablation compile nothing either."""
    one = np.tile(pair[1][:1], (3, 1))
    ablate = partial(ABLATED[name], model, metric=metric, graph=graph)
    expected = ablate((pair[0], one))
    found = ablate((pair[0], None), ablation="mean_per_pos", reference=one)
    np.testing.assert_allclose(found, expected, **TOL["float32", "gradient"])
    with nothing_compiles(caplog):
        other = ablate((pair[0], None), ablation="mean_per_pos", reference=pair[1])
    assert np.abs(other - found).max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.slow
def test_every_method__activations_that_are_not_finite__names_the_first_site(
    name, model, graph, pair, metric, as_a_user
):
    broken = eqx.tree_at(lambda m: m.blocks.attn.W_V, model, model.blocks.attn.W_V.at[1].set(jnp.inf))
    with pytest.raises(ArgumentError, match="`z` of layer 1 is not finite in this run"):
        EVERY[name](broken, pair, metric, graph)


class Total(mj.metrics.Metric):
    """One number for the whole batch."""

    def of(self, logits):
        return logits.sum()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "information_flow"])
@pytest.mark.slow
def test_every_method__a_metric_of_the_whole_batch__is_refused(name, model, graph, pair, as_a_user):
    with pytest.raises(ArgumentError, match=r"Total gives shape \(\) for a batch of 3: a metric gives one"):
        EVERY[name](model, pair, Total(jnp.int32(-1)), graph)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.slow
def test_every_method__padding_between_tokens__changes_nothing(name, model, graph, pair, metric):
    at = np.array([0, 1, 4, 5, 6])
    mask = jnp.asarray(np.tile(np.isin(np.arange(7), at), (3, 1)))
    padded = []
    for ids in pair:
        wider = np.full((3, 7), 9, np.int32)
        wider[:, at] = ids
        padded.append(mj.Prompts(jnp.asarray(wider), mask))
    found, expected = (EVERY[name](model, prompts, metric, graph) for prompts in (tuple(padded), pair))
    np.testing.assert_allclose(found, expected, **TOL["float32", "gradient"])
