"""What one device of eight computes and what crosses between them, from the text of compiled programs."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mechjax as mj
from mechjax.models import attention
from mechjax.transform.cost import cost
from tests.attribution.conftest import redrawn
from tests.parallel import compiled, placements
from tests.parallel.rows import CONFIG, PROMPTS

WIDE = mj.models.Config(
    d_vocab=256, n_ctx=32, d_model=64, n_layers=3, n_heads=8, n_kv_heads=8, d_head=8, d_mlp=256
)
IDS = jnp.zeros((8, 16), jnp.int32)
MESHES = {"2x4": {"data": 2, "model": 4}, "1x8": {"data": 1, "model": 8}}
WRITTEN = "...i,im->...m"  # what heads write together
SLOW = pytest.mark.slow


def programs(model):
    """Name -> a function of the model and prompts."""
    metric, graph = mj.metrics.logit_diff(1, 2), mj.graph.build(model)
    # Were both sides the same prompts, one device would run them once.
    pair = lambda ids: (ids, (ids + 1) % WIDE.d_vocab)
    patching, attribution = mj.patching, mj.attribution
    return {
        "forward": lambda m, ids: m(ids),
        "capture": lambda m, ids: mj.capture(m, ["z", "resid_post"])(ids),
        "sweep": lambda m, ids: (
            patching.activation_patch(m, *pair(ids), metric, site="resid_pre").per_example
        ),
        "eap": lambda m, ids: attribution.eap(m, *pair(ids), metric, graph=graph).scores,
        "attribution_patch": lambda m, ids: (
            attribution.attribution_patch(m, *pair(ids), metric, site="z").per_example
        ),
    }


@pytest.fixture(scope="module")
def text():
    """The text of a program on one device, or on a mesh."""
    model = jax.eval_shape(lambda key: mj.init(WIDE, key=key), jax.random.key(0))
    known = programs(model)
    return cache(
        lambda name, mesh: compiled.text_of(known[name], model, IDS, mesh and mj.make_mesh(**MESHES[mesh]))
    )


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "capture",
        "sweep",
        pytest.param("eap", marks=SLOW),
        pytest.param("attribution_patch", marks=SLOW),
    ],
)
def test_flops__of_eight_devices_together__are_at_most_a_tenth_more_than_those_of_one(name, mesh, text):
    assert 8 * compiled.flops(text(name, mesh)) <= 1.1 * compiled.flops(text(name, None))


def test_flops__from_the_text__are_those_counted_from_the_trace(text):
    model = jax.eval_shape(lambda key: mj.init(WIDE, key=key), jax.random.key(0))
    assert compiled.flops(text("forward", None)) == cost(model, IDS).contractions


def test_flops__of_weights_that_are_whole_everywhere__are_many_more():
    """The control: what is not split is computed by all."""
    model = jax.eval_shape(lambda key: mj.init(WIDE, key=key), jax.random.key(0))
    mesh = mj.make_mesh(data=2, model=4)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
    whole = jax.tree.map(lambda x: mj.shard(x, mesh, axes=" ".join(["any"] * len(x.shape))), shapes)
    ids = mj.shard(jax.ShapeDtypeStruct(IDS.shape, IDS.dtype), mesh, axes="batch pos")
    found = jax.jit(lambda m, t: m(t)).lower(whole, ids).compile().as_text()
    assert 8 * compiled.flops(found) > 3 * compiled.flops(compiled.text_of(lambda m, t: m(t), model, IDS))


@pytest.mark.parametrize("mesh", MESHES)
def test_collectives__of_a_block__are_two_sums_and_nothing_is_gathered(mesh, text):
    crossing = compiled.crossing(text("forward", mesh))
    assert {kind for kind, _, _ in crossing} == {"all-reduce"}
    in_blocks = [shapes for _, depth, shapes in crossing if depth == 1]
    assert len(in_blocks) == 2 and max(depth for _, depth, _ in crossing) == 1
    stream = 8 // MESHES[mesh]["data"] * 16 * 64
    assert all(sum(math.prod(x) for x in shapes) == stream for shapes in in_blocks)


def test_collectives__of_a_capture__gather_nothing_that_is_captured():
    model = jax.eval_shape(lambda key: mj.init(WIDE, key=key), jax.random.key(0))
    take = lambda model, ids: mj.capture(model, ["z", "pattern", "mlp_post", "resid_post"])(ids)
    found = compiled.crossing(compiled.text_of(take, model, IDS, mj.make_mesh(data=2, model=4)))
    assert {kind for kind, _, _ in found} == {"all-reduce"} and sum(depth == 1 for _, depth, _ in found) == 2


def test_captured_and_edited__values__stay_split(tmp_path):
    case = placements.automatic(tmp_path)
    spec = lambda x: tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    logits, acts = mj.capture(case.model, ["z", "pattern", "mlp_post", "resid_post"])(case.pair[0])
    assert spec(logits) == ("data", None, "model")
    assert spec(acts["z"]) == (None, "data", None, "model", None)
    assert spec(acts["pattern"]) == (None, "data", "model", None, None)
    assert spec(acts["mlp_post"]) == (None, "data", None, "model")
    assert spec(acts["resid_post"])[:2] == (None, "data")
    edited = mj.intervene(case.model, mj.replace("z", acts["z"][1], layer=1, head=3))(case.pair[1])
    assert spec(edited) == ("data", None, "model")


@pytest.mark.parametrize("summed", [True, False])
def test_control__a_block_without_one_of_its_sums__is_caught(summed, monkeypatch):
    """What heads write, summed over devices by hand: with the sum the same logits, and without it others."""
    config = dataclasses.replace(CONFIG, n_ctx=16 + summed)  # a program of its own
    model, mesh = redrawn(config), mj.make_mesh(**placements.SIZES)
    expected = model(PROMPTS[0])
    sharded, ids = mj.shard(model, mesh), mj.shard(jnp.asarray(PROMPTS[0]), mesh, axes="batch pos")
    contract, summed_here = attention.contract, []

    def by_hand(terms, *operands):
        if terms != WRITTEN:
            return contract(terms, *operands)
        summed_here.append(terms)
        *arrays, config = operands

        def own(z, W):
            part = contract(terms, z, W, config)
            return jax.lax.psum(part, "model") if summed else part

        specs = P("data", None, "model"), P("model")
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(*arrays)

    monkeypatch.setattr(attention, "contract", by_hand)
    found = sharded(ids)
    assert summed_here
    if summed:
        placements.same([np.asarray(found)], [np.asarray(expected)])
        return
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        placements.same([np.asarray(found)], [np.asarray(expected)])
