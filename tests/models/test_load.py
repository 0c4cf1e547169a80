"""Checkpoints as models: equal to transformers, streamed, and refused by name where anything does not fit."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mechjax.base.errors import (
    ArgumentError,
    CheckpointError,
    HubError,
    MechjaxError,
    UnsupportedModelError,
)
from mechjax.models.config import Config
from mechjax.models.export import export
from mechjax.models.families import Family, Rule, known
from mechjax.models.families.gpt2 import GPT2
from mechjax.models.load import load, zoo
from mechjax.models.params import assemble, parameters
from mechjax.parallel import buffers as host
from tests.hub.hub_server import Hub, Model, run_against
from tests.models.tiny_checkpoints import FAMILIES, tiny
from tests.tolerances import TOL

MODULE = sys.modules["mechjax.models.load"]  # the package may offer the function under the module's name
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family saved by transformers, whole and in shards: folders["gpt2"], folders["gpt2-sharded"]."""
    home = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        tiny(family).save_pretrained(home / family)
        tiny(family).save_pretrained(home / f"{family}-sharded", max_shard_size="10KB")
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A random GPT-2 in one file, made without transformers."""
    config = Config(d_vocab=50, n_ctx=32, d_model=16, n_layers=3, n_heads=4, activation="gelu_new")
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in config.shapes.items()
    }
    return export(assemble(config, params), tmp_path_factory.mktemp("pristine") / "gpt2", family="gpt2")


@pytest.fixture
def gpt2(pristine, tmp_path):
    """A copy of `pristine` to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "gpt2"))


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_weights(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same_bits(one, other) -> None:
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), np.asarray(other[path]).view(np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_load__checkpoint_of_transformers__gives_its_logits(folders, family):
    import torch

    model, tokenizer = load(folders[family])
    with torch.no_grad():
        expected = tiny(family)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), expected, **TOL["float32", "parity"])
    assert tokenizer is None


@pytest.mark.parametrize("family", FAMILIES)
def test_load__shards__equal_the_single_file(folders, family):
    assert len(list(folders[f"{family}-sharded"].glob("*.safetensors"))) > 2
    assert_same_bits(load(folders[family])[0], load(folders[f"{family}-sharded"])[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load__dtype__is_the_checkpoints_own_unless_asked_for(gpt2, dtype):
    asked = load(gpt2, dtype=dtype)[0]
    assert {leaf.dtype.name for leaf in parameters(asked).values()} == {dtype}
    edit_weights(gpt2, lambda tensors: tensors.update({n: t.astype(dtype) for n, t in tensors.items()}))
    assert_same_bits(load(gpt2)[0], asked)
    assert parameters(load(gpt2, dtype=jnp.float32)[0])["W_E"].dtype == jnp.float32


def test_load__precision__is_the_configs(pristine):
    assert load(pristine)[0].config.precision == "highest"
    assert load(pristine, precision="default")[0].config.precision == "default"


def test_load__bare_model__has_the_same_weights(pristine, gpt2):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert_same_bits(load(edit_weights(gpt2, strip))[0], load(pristine)[0])


def test_load__name_of_a_shipped_model__is_that_folder(gpt2, monkeypatch):
    monkeypatch.setattr(MODULE, "zoo", lambda: {"tasks-4l": gpt2})
    assert_same_bits(load("tasks-4l")[0], load(gpt2)[0])
    with pytest.raises(
        CheckpointError, match=r"`task-4l` is neither a model that ships.*nor a folder. Did you mean `ta"
    ):
        load("task-4l")


def test_zoo__folders__hold_a_config():
    assert all((folder / "config.json").is_file() for folder in zoo().values())


@pytest.mark.parametrize("name", ["gpt2", "no/such/folder", "./nowhere", "/nowhere/at/all"])
def test_load__unknown_name__explains_the_three_spellings(name):
    with pytest.raises(
        CheckpointError, match=r"nor a folder.*spelled `org/name`, such as `openai-community/gpt2`"
    ):
        load(name)


def test_load__hub_name_offline__says_how():
    with pytest.raises(
        HubError, match=r"`org/model` is not in the local cache.*There is no folder `org/model` here"
    ):
        load("org/model")


def test_load__revision_of_a_folder__is_refused(gpt2):
    with pytest.raises(ArgumentError, match=r"revision='main' is for names on the Hub"):
        load(gpt2, revision="main")


@pytest.mark.parametrize("dtype", ["float31", "int32", 7, "torch.float32"])
def test_load__dtype_that_is_no_float__is_refused(gpt2, dtype):
    with pytest.raises(ArgumentError, match=r"is not one of float32, bfloat16, float16, float64"):
        load(gpt2, dtype=dtype)


def test_load__float64_without_x64__is_refused_rather_than_cut(gpt2):
    edit_weights(gpt2, lambda tensors: tensors.update({n: t.astype(np.float64) for n, t in tensors.items()}))
    with pytest.raises(ArgumentError, match=r"would be float64, which JAX cuts to float32"):
        load(gpt2)
    assert load(gpt2, dtype="float32")[0].W_E.dtype == jnp.float32


def test_load__mixed_dtypes__asks_which(gpt2):
    edit_weights(
        gpt2, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].astype(np.float16)})
    )
    with pytest.raises(CheckpointError, match=r"mixes dtypes: float16 \(`transformer.wpe.weight`\), float32"):
        load(gpt2)


def test_load__quantized_weights__are_refused(gpt2):
    edit_weights(
        gpt2, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].astype(np.int8)})
    )
    with pytest.raises(
        CheckpointError, match=r"`transformer.wpe.weight` of .* is int8: quantized weights are not"
    ):
        load(gpt2)


def test_load__missing_weights__are_named_with_what_is_there_instead(gpt2):
    edit_weights(
        gpt2, lambda t: t.update({"transformer.h.1.ln_7.weight": t.pop("transformer.h.1.ln_2.weight")})
    )
    message = r"lacks 1 tensor that its config calls for: `transformer.h.1.ln_2.weight`. Did you mean `.*ln_7.weight`"
    with pytest.raises(CheckpointError, match=message):
        load(gpt2)


def test_load__left_over_weights__are_named(gpt2):
    edit_weights(gpt2, lambda t: t.update({"transformer.h.1.lora_A": np.zeros(3, np.float32)}))
    with pytest.raises(
        CheckpointError, match=r"holds 1 tensor that a gpt2 model .* not have: `transformer.h.1.lora_A`"
    ):
        load(gpt2)


@pytest.mark.parametrize(
    ("layers", "message"), [(2, r"holds 12 tensors that"), (4, r"lacks 12 tensors that its")]
)
def test_load__other_number_of_layers__is_refused(gpt2, layers, message):
    with pytest.raises(CheckpointError, match=message):
        load(edit_config(gpt2, n_layer=layers))


def test_load__wrong_shape__names_both(gpt2):
    with pytest.raises(
        CheckpointError, match=r"`transformer.wte.weight` of .* shape \(50, 16\); its .* for \(51, 16\)"
    ):
        load(edit_config(gpt2, vocab_size=51))


def test_load__tied_model_that_stores_another_unembedding__is_refused(pristine, gpt2):
    edit_weights(gpt2, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    assert_same_bits(load(gpt2)[0], load(pristine)[0])
    edit_weights(gpt2, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(
        CheckpointError, match=r"ties the unembedding .* `lm_head.weight` differs from `transformer.wte"
    ):
        load(gpt2)


def test_load__unknown_architecture__lists_the_known(gpt2):
    with pytest.raises(
        UnsupportedModelError, match=r"GPT2LMHeadModle is not implemented.*Did you mean `GPT2LMHeadModel"
    ):
        load(edit_config(gpt2, architectures=["GPT2LMHeadModle"]))


def test_load__unknown_config_key__is_named(gpt2):
    with pytest.raises(UnsupportedModelError, match=r"keys that are unknown for gpt2: `multi_query` = True"):
        load(edit_config(gpt2, multi_query=True))


def test_load__bin_only__names_the_converter(gpt2):
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"weights only as pytorch_model.bin.*save_pretrained"):
        load(gpt2)


ABSURD = [
    {"n_layer": 10**9},
    {"n_layer": 10**5},
    {"vocab_size": 2**40},
    {"n_embd": 0},
    {"n_head": -1},
    {"n_embd": 1e3},
]
ABSURD += [
    {"architectures": 5},
    {"architectures": [[]]},
    {"activation_function": []},
    {"layer_norm_epsilon": "x"},
]
ABSURD += [{"layer_norm_epsilon": float("nan")}, {"n_inner": 2**62}, {"n_layer": None}]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_load__absurd_config__is_refused_before_allocating(gpt2, change, monkeypatch):
    def allocate(*_):
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(host, "_aligned", allocate)
    with pytest.raises(MechjaxError, match=r"\w+"):
        load(edit_config(gpt2, **change))


def test_load__mistral_of_a_billion_layers__is_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "m"))
    change = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4}
    with pytest.raises(MechjaxError, match=r"num_hidden_layers|n_layers|parameters"):
        load(edit_config(folder, **change, num_hidden_layers=10**12))


JSON = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just([])
)
JSON |= st.dictionaries(st.text(max_size=5), st.integers(), max_size=2) | st.lists(
    st.text(max_size=3), max_size=2
)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in FAMILIES]
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_load__drawn_config_values__load_or_fail_typed(folders, tmp_path, family, data):
    folder = tmp_path / family
    if not folder.exists():
        shutil.copytree(folders[family], folder)
    original = (folders[family] / "config.json").read_text()
    key = data.draw(st.sampled_from(sorted(json.loads(original))))
    (folder / "config.json").write_text(original)
    with contextlib.suppress(MechjaxError):  # anything else is a failure
        load(edit_config(folder, **{key: data.draw(JSON)}))


def test_load__from_the_hub__is_checked_before_its_weights_are_fetched(folders, tmp_path):
    files = {path.name: path.read_bytes() for path in folders["neox-sharded"].iterdir()}
    config = json.loads(files["config.json"]) | {"architectures": ["RwkvForCausalLM"]}
    other = {**files, "config.json": json.dumps(config).encode()}
    code = """
from mechjax.models.config import Config
from mechjax.models.export import export
from mechjax.models.families import Family, Rule, known
from mechjax.models.families.gpt2 import GPT2
from mechjax.models.load import load, load_config
from mechjax.parallel import buffers as host
print(load_config("org/bare").n_layers)
model, tokenizer = load("org/neox")
print(float(abs(model.W_E).sum()), tokenizer)
try:
    load("org/mamba", revision="main")
except ValueError as error:
    print(error)
"""
    bare = {"config.json": files["config.json"]}
    models = {"org/neox": files, "org/mamba": other, "org/bare": bare}
    with Hub({name: Model({"main": held}) for name, held in models.items()}) as hub:
        n_layers, first, second = run_against(hub.endpoint, tmp_path, code).splitlines()
        hub.shutdown()
    expected = np.abs(tiny("neox").get_input_embeddings().weight.detach().numpy()).sum()
    assert float(first.split()[0]) == pytest.approx(float(expected), rel=1e-6)
    assert int(n_layers) == json.loads(bare["config.json"])["num_hidden_layers"]
    assert first.endswith("None")
    assert "RwkvForCausalLM is not implemented" in second
    assert not any("mamba" in request and request.endswith(".safetensors") for request in hub.requests)


def test_load__on_cpu__takes_buffers_over_without_a_copy(gpt2, monkeypatch):
    buffers = []
    original = host._aligned
    monkeypatch.setattr(host, "_aligned", lambda *args: buffers.append(original(*args)) or buffers[-1])
    model, _ = load(gpt2)
    if jax.default_backend() == "cpu":
        pointers = {leaf.unsafe_buffer_pointer() for leaf in parameters(model).values()}
        assert pointers == {buffer.ctypes.data for buffer in buffers}


def test_load__family_that_makes_its_rules_anew__is_filled_all_the_same(pristine, monkeypatch):
    class Anew(Family):
        def rules_for(self, config):
            return tuple(map(replace, super().rules_for(config)))

    parts = {field: getattr(GPT2, field) for field in GPT2.__dataclass_fields__}
    expected = load(pristine)[0]
    monkeypatch.setattr(known, "EVERY", (Anew(**parts),))
    assert_same_bits(load(pristine)[0], expected)


class _HalfFilled(Rule):
    """A rule that forgets the last layer."""

    def places(self, config):
        return list(super().places(config))[:-1]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda rule: [], r"fill 0 of the 48 numbers of `blocks\.ln2\.b`: the rest would be whatever memory held"),
        (
            lambda rule: [_HalfFilled(rule.name, rule.paths, rule.layout)],
            r"fill 32 of the 48 numbers of `blocks\.ln2\.b`: .* Give the family's table one rule for it",
        ),
        (lambda rule: [rule, rule], r"lacks 3 tensors that its config calls for: `transformer\.h\.0\.ln_2\.bias`"),
    ],
)  # fmt: skip
def test_load__family_whose_rules_leave_numbers_out__is_refused(gpt2, monkeypatch, spoilt, message):
    def dropped(rule):
        return spoilt(rule) if rule.paths == ("blocks.ln2.b",) else [rule]

    table = replace(
        GPT2,
        weights=tuple(new for rule in GPT2.weights for new in dropped(rule)),
        ignored_weights=(*GPT2.ignored_weights, r".*ln_2\.bias"),
    )
    monkeypatch.setattr(known, "EVERY", (table,))
    with pytest.raises(MechjaxError, match=message):
        load(gpt2)
