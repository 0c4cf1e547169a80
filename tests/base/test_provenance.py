"""Where results come from: what is told, what never is, and that it comes back."""

import getpass
import hashlib
import json
import os
import re
import socket
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mechjax as mj
from mechjax.base import provenance as module
from mechjax.base.digests import arrays_digest, parts_digest, tree_digest
from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.base.prompts import Prompts
from mechjax.base.provenance import Provenance, code_digest, provenance_of, read_provenance
from mechjax.base.signed import signed, unsigned
from mechjax.tasks.vocabulary import build_tokenizer

PROMPTS = Prompts(jnp.arange(6).reshape(2, 3), jnp.ones((2, 3), bool))


def source(**given):
    return provenance_of(**given).made_from[0]


def test_provenance__of_this_process__says_versions_devices_and_settings():
    found = provenance_of()
    assert dict(found.versions)["jax"] == jax.__version__
    assert dict(found.versions)["numpy"] == np.__version__
    assert dict(found.versions)["python"].count(".") == 2
    assert (found.platform, found.devices, found.processes) == (jax.default_backend(), jax.device_count(), 1)
    assert dict(found.settings)["numpy_dtype_promotion"] == "strict"
    assert dict(found.settings)["enable_x64"] == "False"
    with jax.enable_x64(True):
        assert dict(provenance_of().settings)["enable_x64"] == "True"
    with jax.default_matmul_precision("highest"):
        assert dict(provenance_of().settings)["default_matmul_precision"] == "highest"


def test_code_digest__of_mechjax__is_that_of_its_files():
    root, total = Path(mj.__file__).parent, hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        data = (root / name).read_bytes()
        total.update(f"{name} {len(data)};".encode() + data)
    assert code_digest() == total.hexdigest()


def test_source__of_a_model__has_the_checksums_that_stores_and_sweeps_have(tiny_model):
    found = source(model=tiny_model)
    assert (found.digest, found.arrays) == (tree_digest(tiny_model), arrays_digest(tiny_model))
    assert (found.kind, found.dtypes, found.mesh, found.held) == ("Decoder", ("float32",), (), "")


@pytest.mark.parametrize("spec", [("model", None), (None, "data"), (("data", "model"),), ()])
def test_source__of_arrays_on_a_mesh__has_the_checksum_of_whole_ones_and_names_the_mesh(spec):
    whole = jnp.arange(64.0).reshape(8, 8)
    mesh = mj.make_mesh(data=2, model=4)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    found = source(x={"w": jax.device_put(whole, place), "b": jnp.ones(3)})
    assert found.digest == tree_digest({"w": whole, "b": jnp.ones(3)})
    assert found.mesh == (("data", 2), ("model", 4))
    assert "mesh data=2 model=4" in str(found)


def test_source__of_arrays_spread_over_processes__tells_the_parts_of_this_one(monkeypatch):
    mesh = mj.make_mesh(data=8)
    row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(16.0), row)
    monkeypatch.setattr("mechjax.base.digests.is_within_reach", lambda array: False)
    monkeypatch.setattr(module, "is_within_reach", lambda array: False)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    found = source(x=x)
    assert (found.digest, found.arrays, found.held) == (None, parts_digest(x), "process 0 of 4")
    assert "of the parts of process 0 of 4" in str(found)
    assert parts_digest(x) != parts_digest(jax.device_put(x, jax.devices()[0]))
    assert parts_digest(x) != parts_digest(x + 1)


@pytest.mark.parametrize(
    ("value", "told"),
    [(3, 3), (True, True), (1e-3, 1e-3), (float("inf"), "inf"), ("tasks-4l", "tasks-4l"), (None, "null"),
     (("layer", "pos"), '["layer", "pos"]'), ({"k": 2}, '{"k": 2}'), (["org/name"], '["org/name"]'),
     ("https://a.b/c", "https://a.b/c")],
)  # fmt: skip
def test_source__of_numbers_and_short_text__is_told_as_it_is(value, told):
    assert source(x=value).value == told


def test_source__of_long_text__is_told_by_checksum():
    text = "secret plans " * 99
    found = source(x=text)
    assert found.value is None and found.digest == hashlib.sha256(text.encode()).hexdigest()
    assert found.kind == f"text of {len(text)} characters"


def test_source__of_a_key__is_told_as_it_is():
    assert source(key=jax.random.key(7)).value == "threefry2x32 0 7"
    keys = jax.random.split(jax.random.key(7), 3)
    assert source(keys=keys).arrays != source(keys=keys[::-1]).arrays


def test_source__of_tokenizers_metrics_and_functions__has_a_checksum():
    tokenizer = build_tokenizer()
    assert source(x=tokenizer).digest == tokenizer.digest
    assert source(x=mj.metrics.logit_diff(1, 2)).digest != source(x=mj.metrics.logit_diff(2, 1)).digest
    found = source(x=source)
    assert found.kind.endswith(".source") and re.fullmatch("[0-9a-f]{64}", found.digest)
    assert source(x=len).digest is None


def test_source__of_a_module_with_functions__is_told_by_its_arrays_alone():
    found = source(x=eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)))
    assert found.digest is None and found.arrays is not None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Path("x"), "it is a path.*give what lies there"),
        ("/home/alice/model", "it is a path"),
        ("~/model", "it is a path"),
        ("C:\\models\\x", "it is a path"),
        ({"from": ["./here"]}, "it is a path"),
        ("hf_" + "a" * 30, "text that looks like a key or a token"),
        ({"token": "ghp_" + "B1" * 18}, "text that looks like a key or a token"),
        ("https://me:pass@host/x", "text that looks like a key or a token"),
        (optax.adam(1e-3), "without arrays, which no checksum tells"),
        (object(), "a object without arrays"),
    ],
)
def test_source__of_what_is_not_to_be_passed_on__is_refused(value, said, tmp_path):
    with pytest.raises(
        ArgumentError, match=rf"`x` cannot be told in the provenance of a result: .*{said}"
    ) as caught:
        mj.save(PROMPTS, tmp_path / "a", x=value)
    assert not (tmp_path / "a").exists()
    assert "a" * 30 not in str(caught.value) and "B1B1" not in str(caught.value)


def test_provenance__with_secrets_in_the_environment__keeps_none(monkeypatch, tmp_path):
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "HOME",
        "USER",
        "JAX_COMPILATION_CACHE_DIR",
    ):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    flags = (
        "--xla_dump_to=/tmp/hush-hush --xla_gpu_deterministic_ops=true --xla_cpu_enable_fast_math=/hush-hush"
    )
    monkeypatch.setenv("XLA_FLAGS", f"{flags} {os.environ['XLA_FLAGS']}")
    folder = mj.save(PROMPTS, tmp_path / "hush-hush", prompts=PROMPTS)
    text = (folder / "record.json").read_text()
    for hidden in (
        "hush-hush",
        str(Path(mj.__file__).parent),
        str(Path.home()),
        socket.gethostname(),
        str(tmp_path),
    ):
        assert hidden not in text
    assert getpass.getuser() not in re.findall(r"\w+", text.partition('"provenance"')[2])
    found = dict(mj.provenance(folder).settings)
    assert (found["xla_gpu_deterministic_ops"], found["NVIDIA_TF32_OVERRIDE"]) == ("true", "0")
    assert "xla_cpu_enable_fast_math" not in found


def test_provenance__written_and_read__is_the_same(tiny_model):
    found = provenance_of(
        model=tiny_model, n=1, x=0.5, flag=False, text="t", key=jax.random.key(0), fn=source,
        mesh=jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mj.make_mesh(), jax.sharding.PartitionSpec("data"))),
    )  # fmt: skip
    assert read_provenance(json.loads(json.dumps(found.page()))) == found
    assert hash(found) == hash(read_provenance(found.page()))


def test_provenance__in_print__has_fewer_than_twenty_lines():
    found = provenance_of(**{f"x{i}": i for i in range(40)})
    lines = repr(found).splitlines()
    assert len(lines) < 20 and lines[0] == "Provenance" and lines[-1].endswith("… and 28 more")
    assert all(len(line) < 200 for line in lines)


@pytest.mark.parametrize(
    ("page", "said"),
    [(None, "has schema None"), ({"schema": 2}, "has schema 2, and this mechjax reads 1"), ({"schema": 1}, "none that"),
     ({**provenance_of().page(), "made_from": [{"name": "x"}]}, "none that mechjax writes"),
     ({**provenance_of().page(), "mechjax": 3}, "a word is no text")],
)  # fmt: skip
def test_read_provenance__of_what_it_cannot_read__says_so(page, said):
    with pytest.raises(CheckpointError, match=said):
        read_provenance(page)


def test_provenance__without_a_platform__still_says_the_rest(monkeypatch):
    def fails():
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", fails)
    found = provenance_of()
    assert (found.platform, found.devices) == ("none", 0) and found.mechjax


def test_save__with_what_it_was_made_from__gives_it_back(tmp_path, tiny_model):
    folder = mj.save(PROMPTS, tmp_path, model=tiny_model, seed=0)
    found = mj.provenance(folder)
    assert isinstance(found, Provenance)
    assert [(one.name, one.value, one.digest) for one in found.made_from] == [
        ("model", None, tree_digest(tiny_model)), ("seed", 0, None)
    ]  # fmt: skip
    assert eqx.tree_equal(mj.restore(folder), PROMPTS)


def test_record__of_before_there_was_provenance__restores_and_says_that_it_has_none(tmp_path):
    folder = mj.save(PROMPTS, tmp_path)
    page = unsigned((folder / "record.json").read_bytes())
    old = {name: page[name] for name in ("format", "arrays", "record")}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    (folder / "record.json").write_text(json.dumps({"sha256": digest, **old}, indent=1))
    assert eqx.tree_equal(mj.restore(folder), PROMPTS)
    with pytest.raises(CheckpointError, match="says nothing of where it comes from: it was saved before"):
        mj.provenance(folder)
    found = mj.verify(folder)
    assert found.ok and found.provenance == () and "says nothing of where it comes from" in found.notes[0]


def test_record__with_provenance_of_the_future__still_restores(tmp_path):
    folder = mj.save(PROMPTS, tmp_path)
    page = unsigned((folder / "record.json").read_bytes())
    (folder / "record.json").write_bytes(signed({**page, "provenance": {"schema": 9}}, "indented"))
    assert eqx.tree_equal(mj.restore(folder), PROMPTS)
    assert mj.verify(folder).ok and "has schema 9" in mj.verify(folder).notes[0]
    with pytest.raises(CheckpointError, match="has schema 9"):
        mj.provenance(folder)
