"""Files of other libraries (`tests/oracles/make_dictionaries.py`): latents and reconstructions are what those compute."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from mechjax.base.errors import (
    ArgumentError,
    CheckpointError,
    HubError,
    UnsupportedModelError,
    WriteError,
)
from mechjax.dictionaries import CrossLayerTranscoder, JumpReLU
from mechjax.dictionaries.formats import FORMATS, load, write_saelens
from mechjax.dictionaries.normalized import Normalized
from tests.dictionaries.places import KINDS, ORACLES, cases, format_of, place
from tests.dictionaries.written import ours, top_k
from tests.hub.hub_server import Hub, Model, run_against
from tests.tolerances import TOL

CLOSE = TOL["float32", "parity"]


def outcomes(dictionary, x):
    """Latents, what they decode to, and the whole, of one dictionary, of layers of them, or of one across layers."""

    def run(d, x):
        f = d.encode(x)
        return f, d.decode(f), d(x)

    if isinstance(dictionary, CrossLayerTranscoder):
        return [jnp.moveaxis(out, -2, 0) for out in run(dictionary, jnp.moveaxis(x, 0, -2))]
    several = dictionary.W_enc.ndim > 2 if hasattr(dictionary, "W_enc") else False
    return (eqx.filter_vmap(run) if several else run)(dictionary, x)


def recorded(case):
    found = np.load(ORACLES / f"{case}.npz")
    x = found["x"]
    if "hook_z" in case:  # heads side by side
        return (
            x.reshape(len(x), -1),
            found["f"],
            found["made"].reshape(len(x), -1),
            found["y"].reshape(len(x), -1),
        )
    return x, found["f"], found["made"], found["y"]


def check(dictionary, case):
    x, *expected = recorded(case)
    for ours_, theirs in zip(outcomes(dictionary, jnp.asarray(x)), expected, strict=True):
        assert_allclose(ours_, theirs, **CLOSE)


@pytest.mark.parametrize("case", cases())
def test_load__of_a_file_that_another_library_wrote__gives_its_latents_and_reconstruction(case):
    dictionary = load(place(case))
    check(dictionary, case)
    assert type(dictionary).__name__ == KINDS.get(case, type(dictionary).__name__)


@pytest.mark.parametrize("case", KINDS)
def test_load__with_the_format_named__gives_the_same(case):
    named, found = load(place(case), format=format_of(case)), load(place(case))
    assert jax.tree.structure(named) == jax.tree.structure(found)
    jax.tree.map(assert_array_equal, named, found)


def test_formats__each__has_a_fixture():
    assert {format_of(case) for case in cases()} == set(FORMATS)


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("saelens/gated", "sae_weights.safetensors"),
        ("saelens/gated", "cfg.json"),
        ("sparsify/skip", "sae.safetensors"),
        ("dictionary_learning/gated", "ae.pt"),
        ("gemma_scope/upper", "params.npz"),
        ("gemma_scope_2/resid_post/layer_1_width_16k_l0_small", "params.safetensors"),
    ],
)
def test_load__of_a_file_of_the_folder__is_the_folder(case, file):
    check(load(place(case) / file), case)


def test_load__of_one_layer_by_name_or_number__is_that_of_the_stack():
    folder = place("circuit_tracer/plt_skip")
    every = load(folder)
    assert every.W_enc.shape == (3, 6, 12)
    for i in range(3):
        for one in (load(folder, layer=i), load(folder / f"layer_{i}.safetensors")):
            jax.tree.map(lambda a, b: assert_array_equal(a, b[i]), one, every)  # noqa: B023


def test_load__with_a_scale__reads_inputs_so_much_larger_and_gives_them_back():
    plain, scaled = (load(place("gemma_scope/upper"), scale=s) for s in (None, 2.5))
    x = jnp.asarray(recorded("gemma_scope/upper")[0])
    assert_allclose(scaled.encode(x), plain.encode(2.5 * x), **CLOSE)
    assert_allclose(scaled(x), plain(2.5 * x) / 2.5, **CLOSE)


def test_load__in_bfloat16__keeps_thresholds_wide():
    dictionary = load(place("saelens/jumprelu"), dtype="bfloat16")
    assert dictionary.W_enc.dtype == dictionary.b_dec.dtype == jnp.bfloat16
    assert dictionary.threshold.dtype == jnp.float32
    x, f, *_ = recorded("saelens/jumprelu")
    near = np.asarray(dictionary.encode(jnp.asarray(x, jnp.bfloat16)), np.float32)
    assert np.abs(near - f).mean() < 0.05


def test_load__in_float64__folds_in_float64():
    with jax.enable_x64(True):
        dictionary = load(place("saelens/topk_by_norm"), dtype="float64")
        assert dictionary.W_dec.dtype == np.float64
        lengths = np.asarray(dictionary.decoder_norms())
    assert_allclose(lengths, 1, rtol=1e-14)


def test_load__of_a_batch_top_k_checkpoint__has_the_threshold_and_k_of_its_training():
    dictionary = load(place("saelens/checkpoint_matryoshka"))
    assert dictionary.k == 4 and dictionary.prefixes == (3, 6, 12)
    assert_allclose(dictionary.threshold, 0.35, **CLOSE)
    assert load(place("dictionary_learning/matryoshka")).prefixes == (3, 6, 12)


def test_load__compiled__gives_the_same():
    for case in ("saelens/layer_norm", "saelens/constant_norm"):
        dictionary = load(place(case))
        x = jnp.asarray(recorded(case)[0])
        assert_allclose(eqx.filter_jit(dictionary)(x), dictionary(x), **CLOSE)


def test_normalized__of_a_token_of_zeros__is_finite():
    dictionary = load(place("saelens/constant_norm"))
    assert np.isfinite(np.asarray(dictionary(jnp.zeros((2, 6))))).all()
    assert dictionary.n_features == 12 and dictionary.d_model == 6


# ---- to SAELens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ours())
def test_write_saelens__of_each_kind__is_what_sae_lens_was_given_and_computes_the_same(case, tmp_path):
    dictionary, theirs = ours()[case], ORACLES / "ours" / case
    folder = write_saelens(dictionary, tmp_path / "x", model_name="tiny", hook_name="blocks.1.hook_mlp_in")
    assert json.loads((folder / "cfg.json").read_text()) == json.loads((theirs / "cfg.json").read_text())
    written, known = (load_file(at / "sae_weights.safetensors") for at in (folder, theirs))
    assert written.keys() == known.keys()
    for name, array in written.items():
        assert_allclose(array, known[name], **TOL["float32", "law"])
    check(dictionary, f"ours/{case}")  # SAELens' numbers, from the dictionary itself
    check(load(folder), f"ours/{case}")


@pytest.mark.parametrize(
    "case", [c for c in cases() if c.startswith("saelens/") and "checkpoint" not in c and "hook_z" not in c]
)
def test_write_saelens__of_what_was_read__gives_the_same_bits(case, tmp_path):
    if "bfloat16" in case:
        dictionary = load(place(case), dtype="bfloat16")
        again = load(write_saelens(dictionary, tmp_path / "x"), dtype="bfloat16")
    else:
        dictionary = load(place(case))
        again = load(write_saelens(dictionary, tmp_path / "x"))
    assert type(again) is type(dictionary)
    if "centred" not in case:
        jax.tree.map(assert_array_equal, again, dictionary)


def test_write_saelens__of_a_centred_transcoder__moves_the_bias_into_the_encoder(tmp_path):
    dictionary = ours()["skip_centred"]
    again = load(write_saelens(dictionary, tmp_path / "x"))
    x = jnp.asarray(recorded("ours/skip_centred")[0])
    assert dictionary.centred and not again.centred
    assert_allclose(again(x), dictionary(x), **CLOSE)


def test_write_saelens__of_what_it_has_no_word_for__is_refused(tmp_path):
    across = load(place("sparsify/skip"))
    with pytest.raises(UnsupportedModelError, match="SAELens has no transcoders of the kind TopK"):
        write_saelens(across, tmp_path / "x")
    with pytest.raises(UnsupportedModelError, match="SAELens has no dictionaries of the kind CrossLayer"):
        write_saelens(load(place("circuit_tracer/clt_jump")), tmp_path / "x")
    several = load(place("circuit_tracer/plt_relu"))
    with pytest.raises(ArgumentError, match=r"holds \(3,\) dictionaries.*one by one"):
        write_saelens(several, tmp_path / "x")
    with pytest.raises(
        UnsupportedModelError, match=r"does not bring what a transcoder makes .* back to their units"
    ):
        write_saelens(Normalized(ours()["skip_centred"], "length"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_write_saelens__to_a_folder_that_is_taken__leaves_it(tmp_path):
    (tmp_path / "x").write_text("mine")
    for where in (tmp_path, tmp_path / "x"):
        with pytest.raises(WriteError, match="exists and is not empty"):
            write_saelens(top_k(0), where)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(WriteError, match="Cannot write to"):
        write_saelens(top_k(0), tmp_path / "x" / "y")


# ---- arguments and places ------------------------------------------------------------------------------------------------


def test_load__of_files_of_no_known_format__names_what_is_there_and_what_is_known(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"no known format\. The folder holds: model\.bin\. Known are: saelens"
    ):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"`.*model\.bin` is in no known format"):
        load(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="There is no file or folder"):
        load(tmp_path / "none")


def test_load__of_a_config_of_transcoders_that_lie_elsewhere__says_where(tmp_path):
    lines = "".join(f"- hf://google/scope/layer_{i}/params.npz\n" for i in range(3))
    (tmp_path / "config.yaml").write_text(f"model_kind: transcoder_set\ntranscoders:\n{lines}")
    with pytest.raises(
        CheckpointError, match=r"lie elsewhere, at hf://google/scope/layer_0/params\.npz, hf.*without `hf://`"
    ):
        load(tmp_path)


def test_load__of_files_of_two_formats__asks_which(tmp_path):
    for case in ("saelens/topk", "sparsify/plain"):
        for path in place(case).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="could be saelens or sparsify: say which"):
        load(tmp_path)
    check(load(tmp_path, format="sparsify"), "sparsify/plain")


def test_load__with_arguments_that_do_not_apply__is_refused():
    folder = place("saelens/topk")
    with pytest.raises(ArgumentError, match=r"format='saelense' is not known; .*Did you mean `saelens`"):
        load(folder, format="saelense")
    with pytest.raises(ArgumentError, match="layer=1: files of saelens hold one dictionary"):
        load(folder, layer=1)
    with pytest.raises(ArgumentError, match=r"layer=9: .* has the layers 0, 1, 2"):
        load(place("circuit_tracer/plt_relu"), layer=9)
    with pytest.raises(ArgumentError, match="files of llama_scope say how inputs are scaled"):
        load(place("llama_scope/even"), scale=2.0)
    with pytest.raises(ArgumentError, match=r"normalises each token \(layer_norm\), so inputs have no scale"):
        load(place("saelens/layer_norm"), scale=2.0)
    with pytest.raises(ArgumentError, match="both must be positive"):
        load(place("gemma_scope/upper"), scale=-1.0)
    with pytest.raises(ArgumentError, match="dtype='int8' is not one of"):
        load(folder, dtype="int8")
    with pytest.raises(ArgumentError, match="would be cut to float32"):
        load(folder, dtype="float64")
    with pytest.raises(ArgumentError, match="revision='main' is for names on the Hub"):
        load(folder, revision="main")


@pytest.mark.parametrize("name", ["org/name/../x", "org/name//x", "org/name/*", "org/name/a[0]"])
def test_load__of_a_path_in_a_repository_that_is_no_plain_path__is_refused(name):
    with pytest.raises(ArgumentError, match="plain names of folders"):
        load(name)


def test_load__of_a_name_that_cannot_be_fetched__says_so():
    with pytest.raises(
        HubError, match=r"not in the local cache.*There is no folder `org/name/x` here either"
    ):
        load("org/name/x")


HUB = """
import json
import numpy as np
from mechjax.base.errors import HubError
from mechjax.dictionaries.formats import load
answers = []
for name, more in CASES:
    try:
        made = load(name, **more)
        answers.append(float(np.abs(np.asarray(made.W_enc)).sum()))
    except HubError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_load__of_names_on_the_hub__fetches_what_the_folder_needs_and_nothing_else(tmp_path):
    files = {}
    for case, at in {
        "saelens/topk": "a/blocks.1.hook_z",
        "saelens/gated": "a/blocks.1.hook_z/deeper",
        "gemma_scope/upper": "layer_3/width_16k",
        "llama_scope/even": "L1R-8x",
        "circuit_tracer/plt_relu": "",
    }.items():
        base = place(case)
        for path in (p for p in base.rglob("*") if p.is_file()):
            files["/".join(filter(None, [at, str(path.relative_to(base))]))] = path.read_bytes()
    files["openai/6.pt"] = place("openai/relu").read_bytes()
    names = {
        "org/saes/a/blocks.1.hook_z": ("saelens/topk", {}),
        "org/saes/layer_3/width_16k/params.npz": ("gemma_scope/upper", {}),
        "org/saes/L1R-8x": ("llama_scope/even", {}),
        "org/saes": ("circuit_tracer/plt_relu", {}),
        "org/saes/openai/6.pt": ("openai/relu", {}),
    }
    asked = [(name, more) for name, (_, more) in names.items()] + [("org/saes/nowhere", {})]
    hub = Hub({"org/saes": Model({"main": files})})
    *found, refusal = json.loads(run_against(hub.endpoint, tmp_path, HUB.replace("CASES", repr(asked))))
    expected = [float(np.abs(np.asarray(load(place(case)).W_enc)).sum()) for case, _ in names.values()]
    assert_allclose(found, expected, **CLOSE)
    assert "has no dictionary at `nowhere`" in refusal
    assert not [path for path in hub.requests if "deeper" in path]
    one = [("org/saes", {"layer": 1})]
    apart = Hub({"org/saes": Model({"main": files})})
    run_against(apart.endpoint, tmp_path / "apart", HUB.replace("CASES", repr(one)))
    fetched = {path.rsplit("/", 1)[1] for path in apart.requests if path.endswith(".safetensors")}
    assert fetched == {"layer_1.safetensors"}


def test_load__of_each_fixture__has_no_arrays_that_are_not_finite():
    for case in cases():
        jax.tree.map(lambda x: assert_array_equal(np.isfinite(np.asarray(x)), True), load(place(case)))
    assert isinstance(load(place("saelens/jumprelu")), JumpReLU)
