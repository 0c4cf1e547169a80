"""The same numbers on eight simulated devices; programs for chips that are not here."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mechjax as mj
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL

MESH = TOL["float32", "mesh"]


@pytest.fixture(scope="module")
def mesh():
    return mj.make_mesh(data=2, model=4)


@pytest.fixture(scope="module")
def sharded(mesh, tiny_model):
    """Heads and neurons over `model`, everything else whole."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = PartitionSpec()
        if any(w in name for w in (".W_Q", ".W_K", ".W_V")):
            spec = PartitionSpec(None, None, "model", None)
        elif ".W_O" in name or ".W_out" in name:
            spec = PartitionSpec(None, "model", None)
        elif ".W_in" in name:
            spec = PartitionSpec(None, None, "model")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tiny_model)


def test_mesh__forward_capture_edit_and_sweep__equal_one_device(mesh, sharded, tiny_model, tiny_tokens):
    tokens = jax.device_put(tiny_tokens, NamedSharding(mesh, PartitionSpec("data")))
    sites = ["z", "mlp_post", "resid_post"]
    edits = [mj.replace("z", np.ones(4), layer=1, head=3, pos=-1), mj.scale("mlp_post", 0.5, layer=2)]
    logits, acts = mj.capture(sharded, sites)(tokens)
    expected, whole = mj.capture(tiny_model, sites)(tiny_tokens)
    np.testing.assert_allclose(logits, expected, **MESH)
    for site in sites:
        np.testing.assert_allclose(acts[site], whole[site], **MESH)
    assert "data" in str(acts["z"].sharding) and len(acts["z"].sharding.device_set) == 8
    np.testing.assert_allclose(
        mj.intervene(sharded, edits)(tokens), mj.intervene(tiny_model, edits)(tiny_tokens), **MESH
    )
    metric = mj.metrics.logit_diff(1, 2)
    other = tiny_tokens[::-1]
    swept = mj.patching.activation_patch(
        sharded, tokens, jax.device_put(other, tokens.sharding), metric, site="resid_pre"
    )
    alone = mj.patching.activation_patch(tiny_model, tiny_tokens, other, metric, site="resid_pre")
    np.testing.assert_allclose(swept.per_example, alone.per_example, **MESH)


def test_make_mesh__axes_and_refusals(mesh):
    assert mesh.shape == {"data": 2, "model": 4}
    assert mj.make_mesh(model=2).shape == {"data": 4, "model": 2}
    with pytest.raises(ArgumentError, match="sizes must be positive"):
        mj.make_mesh(data=0)
    with pytest.raises(ArgumentError, match="8 devices cannot be split into rows of 3"):
        mj.make_mesh(model=3)
    with pytest.raises(ArgumentError, match="needs 16 devices; 8 are here"):
        mj.make_mesh(data=4, model=4)


FOR_TPU = textwrap.dedent("""
    import re
    import equinox as eqx, jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import mechjax as mj
    from mechjax.models import Config, init

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(chips.devices).reshape(2, 4), ("data", "model"))
    config = Config(d_vocab=128, n_ctx=32, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=128)
    model = init(config, key=jax.random.key(0))

    def there(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    arrays, static = eqx.partition(model, eqx.is_array)
    arrays = jax.tree.map(lambda x: there(x, P()), arrays)
    tokens = there(jnp.zeros((8, 16), jnp.int32), P("data"))
    metric, graph = mj.metrics.logit_diff(1, 2), mj.graph.build(model)
    programs = {
        "forward": lambda model, t: model(t),
        "capture": lambda model, t: mj.capture(model, ["z", "resid_post"], layers=[1])(t),
        "edit": lambda model, t: mj.intervene(model, [mj.zero("z", layer=1, head=2)])(t),
        "sweep": lambda model, t: mj.patching.activation_patch(model, t, t, metric, site="resid_pre").per_example,
        "eap": lambda model, t: mj.attribution.eap(model, t, t, metric, graph=graph).scores,
    }
    for name, fn in programs.items():
        run = jax.jit(lambda arrays, t, fn=fn: jax.tree.leaves(fn(eqx.combine(arrays, static), t)))
        lowered = run.lower(arrays, tokens)
        dots = re.findall(r"stablehlo.dot_general[^\\n]*", lowered.as_text())
        assert dots, name
        loose = [d for d in dots if "f32" in d and "precision = [HIGHEST, HIGHEST]" not in d]
        assert not loose, (name, loose[:2])
        lowered.compile()
        print("compiled", name, len(dots))
""")


def test_described_tpu__forward_capture_edit_sweep_and_attribution__compile_at_highest_precision():
    pytest.importorskip(
        "libtpu", reason="libtpu, which compiles for described chips, has no wheel for this Python"
    )
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost", "PYTHONPATH": str(Path(mj.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FOR_TPU], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] and done.stdout.count("compiled") == 5, done.stdout
