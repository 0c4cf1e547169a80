"""The table of kernels: each limit keeps away what it is there for, and only that."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mechjax as mj
from mechjax.models import Config
from mechjax.models.kernels.choice import KERNELS, Asked, kernels_for, placed_by_hand, refused

PLAIN = Config(d_vocab=31, n_ctx=4096, d_model=64, n_layers=1, n_heads=4)
TAKEN = Asked(PLAIN, jnp.dtype("bfloat16"), n_pos=1024, d_head=64, d_value=64)


def _config(**choices):
    return {"config": dataclasses.replace(PLAIN, **choices)}


CASES = {  # what is asked -> the limit that keeps each kernel away, None where it takes it
    "bfloat16": ({}, None, None),
    "float16": ({"dtype": jnp.dtype("float16")}, "precision", None),
    "float32": ({"dtype": jnp.dtype("float32")}, "precision", "precision"),
    "float32, fast": ({"dtype": jnp.dtype("float32"), **_config(precision="default")}, None, "precision"),
    "a cache, or tokens that see all": ({"causal": False}, "causal", "causal"),
    "alibi": (_config(positions="alibi"), "alibi", "alibi"),
    "sinks": ({"sinks": True}, "sinks", "sinks"),
    "manual and explicit axes": ({"by_hand": True}, "mesh", "mesh"),
    "a short text": ({"n_pos": 512}, "long", "long"),
    "soft-cap": (_config(attn_softcap=2.0), None, "softcap"),
    "an odd width": ({"d_head": 20, "d_value": 20}, None, "width"),
    "too wide": ({"d_head": 264, "d_value": 264}, None, "width"),
    "latent attention": ({"d_head": 192, "d_value": 128}, None, "values"),
    "windows, grouped keys": (_config(windows=(5,), n_kv_heads=2), None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_choice__each_case__is_kept_away_by_the_limit_for_it(name):
    changes, *limits = CASES[name]
    asked = dataclasses.replace(TAKEN, **changes)
    expected = dict(zip(KERNELS, limits, strict=True))
    assert refused(asked) == {k: () if limit is None else (limit,) for k, limit in expected.items()}
    assert kernels_for(asked) == tuple(k for k, limit in expected.items() if limit is None)


def test_choice__every_limit__has_a_case():
    for i, kernel in enumerate(KERNELS.values()):
        assert {limit.name for limit in kernel.limits} == {case[1 + i] for case in CASES.values()} - {None}


def test_placed_by_hand__only_of_manual_and_explicit_axes():
    x, found = jnp.ones((8, 8)), {}
    auto = mj.make_mesh(data=2, model=4)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def ask(name, x):
        found[name] = placed_by_hand(x)
        return x

    ask("nowhere", x)
    for name, mesh in (("auto", auto), ("explicit", explicit)):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        jax.eval_shape(lambda x, name=name: ask(name, x), placed)
    split = lambda x: ask("manual", x)
    spec = PartitionSpec("data")
    jax.eval_shape(jax.shard_map(split, mesh=auto, in_specs=spec, out_specs=spec), x)
    assert found == {"nowhere": False, "auto": False, "explicit": True, "manual": True}
