"""What calls of methods take, beside what they take when they are made."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models import Config
from mechjax.models.dry_run import dry_run
from mechjax.models.plan import plan
from mechjax.parallel.hardware import FREE, MEMORY

WIDE = Config(d_vocab=1024, n_ctx=64, d_model=64, n_layers=4, n_heads=8, d_mlp=512)
LARGE = Config(
    d_vocab=128256, n_ctx=8192, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_head=128, d_mlp=28672,
    norm="rms", positions="rotary", mlp="gated", activation="silu", qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=False,
)  # fmt: skip
METRIC = mj.metrics.logit_diff(1, 2)


@pytest.fixture(scope="module")
def llama():
    return LARGE


def test_share__of_parameters__is_what_devices_hold():
    model = mj.init(WIDE, key=jax.random.key(0))
    mesh = mj.make_mesh(data=2, model=2, fsdp=2)
    found = plan(WIDE, (4, 16), devices="v5e-8", mesh=dict(mesh.shape)).share
    first = jax.devices()[0]
    held = [
        s.data.nbytes
        for x in jax.tree.leaves(mj.shard(model, mesh))
        for s in x.addressable_shards
        if s.device == first
    ]
    assert found.params == sum(held)
    assert found.fits and found.largest is None and "fits, about" in repr(found)


def test_share__of_what_lies_between__is_a_part_of_it():
    whole = plan(WIDE, (8, 16), devices="v5e-1").share
    by_batch, by_model = (plan(WIDE, (8, 16), devices="v5e-8", mesh=mesh).share for mesh in ((8, 1), (1, 8)))
    assert whole.between == plan(WIDE, (8, 16)).cost.peak_bytes
    assert by_batch.between <= 1.05 * whole.between / 8  # the masks and positions of all are small
    assert whole.between / 8 <= by_model.between < 0.5 * whole.between


def test_plan__that_does_not_fit__says_which_batch_would(llama):
    start = time.process_time()
    found = plan(llama, (256, 8192), capture="resid_post", dtype="bfloat16", devices="8xH200")
    assert time.process_time() - start < 10
    assert not found.share.fits and 0 < found.share.largest < 256
    assert "per device  does not fit, about" in repr(found)
    assert f"batch={found.share.largest} would" in repr(found)
    again = plan(llama, (found.share.largest, 8192), capture="resid_post", dtype="bfloat16", devices="8xH200")
    assert again.share.fits
    assert (
        plan(llama, (8, 64), dtype="float32", devices="v5e-8").share.largest == 0
    )  # the weights alone do not fit


def test_plan__on_devices__says_what_splits_each_site():
    rows = {r["site"]: r for r in plan(WIDE, (4, 16), devices="v5e-8", mesh=(2, 4)).rows()}
    assert rows["z"]["split"] == (None, "data", None, "model", None)
    assert rows["logits"]["split"] == ("data", None, "model")
    assert "split" not in plan(WIDE, (4, 16)).rows()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "v5e-8", "mesh": (2, 2)}, r"mesh=\(2, 2\) has 4 devices, devices='v5e-8' has 8"),
        ({"devices": "v5e-8", "mesh": {"data": 2, "rows": 4}}, "`rows` is no axis; there are expert, model"),
        (
            {"devices": "v5e-8", "mesh": (8, 1), "tokens": (4, 6)},
            "A batch of 4 cannot be divided over 8 devices",
        ),
        ({"devices": "v5e-16", "mesh": (1, 16)}, "`head` has 8, which model=16 devices cannot share equally"),
        ({"devices": "v5e-8", "tokens": (6,)}, r"give tokens as \(batch, pos\)"),
        ({"chip": "v5e:2x4", "mesh": {"fsdp": 2, "model": 4}}, "compiles for the axes data and model alone"),
    ],
)
def test_plan__on_devices_that_do_not_divide__is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        plan(WIDE, **{"tokens": (8, 16), **options})


def test_dry_run__of_a_sweep__is_what_runs(tiny_model, tiny_tokens):
    other, how = tiny_tokens[::-1], {"site": "z", "over": ("layer", "head"), "chunk_size": 2}
    found = dry_run(mj.patching.activation_patch, tiny_model, tiny_tokens, other, METRIC, **how)
    real = mj.patching.activation_patch(tiny_model, tiny_tokens, other, METRIC, **how)
    assert {(shape, dtype) for _, shape, dtype in found.outputs} == {
        (x.shape, str(x.dtype)) for x in jax.tree.leaves(real)
    }
    assert found.output_bytes == sum(x.nbytes for x in jax.tree.leaves(real))
    assert found.programs == 1 and found.n_params == sum(x.size for x in jax.tree.leaves(tiny_model))
    assert "Dry run of activation_patch on Decoder" in repr(found) and len(repr(found).splitlines()) < 20


def test_dry_run__operations_of_a_longer_sweep__grow_with_its_cells(tiny_model, tiny_tokens):
    one = dry_run(
        mj.patching.activation_patch, tiny_model, tiny_tokens, tiny_tokens, METRIC, site="z", over=("layer",)
    )
    four = dry_run(mj.patching.activation_patch, tiny_model, tiny_tokens, tiny_tokens, METRIC, site="z")
    runs = plan(tiny_model, tiny_tokens).flops
    assert four.cost.flops - one.cost.flops > 3 * runs


def test_dry_run__of_every_kind_of_call__makes_no_weights(llama):
    before = sum(x.nbytes for x in jax.live_arrays())
    ids, graph = (
        np.ones((4, 64), np.int32),
        mj.graph.build(jax.eval_shape(lambda: mj.init(WIDE, key=jax.random.key(0)))),
    )
    start = time.process_time()
    found = dry_run(
        mj.patching.activation_patch, llama, ids, ids, METRIC, site="resid_pre", dtype="bfloat16", devices="v5e-256",
        mesh={"fsdp": 4, "model": 64},
    )  # fmt: skip
    assert time.process_time() - start < 10
    assert found.share.fits and found.n_params == 70_553_706_496
    eap = dry_run(mj.attribution.eap, WIDE, ids[:, :16], ids[:, :16], METRIC, graph=graph)
    own = dry_run(lambda model, t: model(t).sum(), WIDE, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert eap.cost.flops > 0 and own.output_bytes == 4
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1e6


@pytest.mark.slow
def test_dry_run__that_does_not_fit__says_which_chunk_would(llama, monkeypatch):
    ids = np.ones((1, 1024), np.int32)
    how = {"site": "resid_pre", "over": ("pos",), "dtype": "bfloat16", "devices": "8xH200"}
    one, all_at_once = (
        dry_run(mj.patching.activation_patch, llama, ids, ids, METRIC, chunk_size=n, **how).share
        for n in (1, 1024)
    )
    room = one.params + one.between + 0.4 * (all_at_once.between - one.between)
    monkeypatch.setitem(MEMORY, "H200", room / FREE)
    tight = dry_run(mj.patching.activation_patch, llama, ids, ids, METRIC, chunk_size=1024, **how)
    assert not tight.share.fits and 1 <= tight.share.largest < 1024
    assert f"chunk_size={tight.share.largest} would" in repr(tight)
    again = dry_run(
        mj.patching.activation_patch, llama, ids, ids, METRIC, chunk_size=tight.share.largest, **how
    )
    assert again.share.fits
    with pytest.raises(ArgumentError, match=r"mesh=\(1, 8\) divides devices, but none were named"):
        dry_run(mj.patching.activation_patch, llama, ids, ids, METRIC, site="z", mesh=(1, 8))
