"""Configs and tensors that do not belong together, or that mechjax has no word for: each is refused by name."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mechjax.base.errors import CheckpointError, MechjaxError, UnsupportedModelError
from mechjax.dictionaries.formats import FORMATS, load
from tests.dictionaries.hostile import state, tensor, text, torch_zip, whole
from tests.dictionaries.places import format_of, place


@pytest.fixture
def copied(tmp_path):
    """A copy of a fixture, with its config and tensors changed."""

    def copy(case, config=None, values=None, tensors=None, weights="sae_weights.safetensors"):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        folder = shutil.copytree(place(case), tmp_path / "x")
        if values is not None:
            said = json.loads((folder / config).read_text())
            (folder / config).write_text(json.dumps({k: v for k, v in (said | values).items() if v != "-"}))
        if tensors is not None:
            held = load_file(folder / weights) | tensors
            save_file({name: x for name, x in held.items() if x is not None}, folder / weights)
        return folder

    return copy


CONFIGS = [
    ("saelens/topk", "cfg.json", {"architecture": "temporal"}, UnsupportedModelError, "architecture='temporal'"),
    ("saelens/topk", "cfg.json", {"architecture": "-"}, CheckpointError, "does not say `architecture`"),
    ("saelens/topk", "cfg.json", {"architecture": 3}, CheckpointError, "architecture='3'; text was expected"),
    ("saelens/topk", "cfg.json", {"k": "-"}, CheckpointError, "does not say `k`"),
    ("saelens/topk", "cfg.json", {"k": 13}, CheckpointError, "keeps k=13 latents of 12"),
    ("saelens/topk", "cfg.json", {"k": -1}, CheckpointError, "a positive whole number"),
    ("saelens/topk", "cfg.json", {"k": True}, CheckpointError, "a positive whole number"),
    ("saelens/topk", "cfg.json", {"d_in": 7}, CheckpointError, r"`W_enc`.* has the shape \(6, 12\); \(d_in=7"),
    ("saelens/topk", "cfg.json", {"apply_b_dec_to_input": "no"}, CheckpointError, "true or false was expected"),
    ("saelens/topk", "cfg.json", {"metadata": [1]}, CheckpointError, "an object was expected"),
    ("saelens/topk", "cfg.json", {"metadata": {"sae_lens_version": "new"}}, CheckpointError, "a version was expected"),
    (
        "saelens/topk", "cfg.json", {"normalize_activations": "covariance_whitening"}, UnsupportedModelError,
        "normalize_activations='covariance_whitening'",
    ),
    ("saelens/topk", "cfg.json", {"reshape_activations": "x"}, UnsupportedModelError, "reshape_activations='x'"),
    (
        "saelens/topk", "cfg.json", {"normalize_activations": "expected_average_only_in"}, CheckpointError,
        r"not by how much: `activation_scaler\.json` is not there. Pass `scale=`",
    ),
    (
        "saelens/checkpoint_scaled", "activation_scaler.json", {"has_whitening": True}, UnsupportedModelError,
        "whitens inputs",
    ),
    (
        "saelens/checkpoint_scaled", "activation_scaler.json", {"scaling_factor": None}, CheckpointError,
        "does not say `scaling_factor`",
    ),
    (
        "saelens/checkpoint_batchtopk", "cfg.json", {"k": 2.5}, UnsupportedModelError,
        r"keeps k=2\.5 latents; mechjax keeps a whole number",
    ),
    (
        "saelens/checkpoint_matryoshka", "cfg.json", {"matryoshka_widths": [6, 3, 12]}, CheckpointError,
        "lengths that rise to all 12",
    ),
    (
        "saelens/checkpoint_matryoshka", "cfg.json", {"matryoshka_widths": "x"}, CheckpointError,
        "a list of sizes was expected",
    ),
    (
        "saelens/old_relu", "cfg.json", {"activation_fn_str": "tanh-relu"}, UnsupportedModelError,
        "activation_fn='tanh-relu'",
    ),
    ("sparsify/plain", "cfg.json", {"activation": "groupmax"}, UnsupportedModelError, "activation='groupmax'"),
    ("sparsify/plain", "cfg.json", {"signed": True}, UnsupportedModelError, "signed=True"),
    ("sparsify/plain", "cfg.json", {"d_in": "-"}, CheckpointError, "does not say `d_in`"),
    ("sparsify/plain", "cfg.json", {"num_latents": 0, "expansion_factor": 3}, CheckpointError, "num_latents=18"),
    ("sparsify/plain", "cfg.json", {"skip_connection": True}, CheckpointError, "lacks the tensor `W_skip`"),
    ("sparsify/skip", "cfg.json", {"skip_connection": False}, CheckpointError, "holds `W_skip` besides"),
    (
        "dictionary_learning/top_k", "config.json", {"trainer": {"dict_class": "IdentityDict"}}, UnsupportedModelError,
        "dict_class='IdentityDict'",
    ),
    (
        "dictionary_learning/top_k", "config.json", {"trainer": {"dict_class": "GatedAutoEncoder"}}, CheckpointError,
        "lacks the tensor `decoder_bias`; it holds `b_dec`, .*Did you mean `encoder.bias` or `decoder.weight`",
    ),
    (
        "dictionary_learning/top_k", "config.json", {"trainer": {"dict_class": "AutoEncoderTopK", "k": 3}},
        CheckpointError, "has k=3, .* has k=4: they do not belong together",
    ),
    (
        "gemma_scope_2/resid_post/layer_1_width_16k_l0_small", "config.json", {"architecture": "topk"},
        UnsupportedModelError, "architecture='topk'",
    ),
    (
        "gemma_scope_2/resid_post/layer_1_width_16k_l0_small", "config.json", {"type": "crosscoder"},
        UnsupportedModelError, "type='crosscoder'",
    ),
    ("llama_scope/even", "hyperparams.json", {"act_fn": "topk"}, UnsupportedModelError, "act_fn='topk'"),
    (
        "llama_scope/even", "hyperparams.json", {"norm_activation": "token-wise"}, UnsupportedModelError,
        "norm_activation='token-wise'",
    ),
    (
        "llama_scope/even", "hyperparams.json", {"apply_decoder_bias_to_pre_encoder": "-"}, CheckpointError,
        "does not say `apply_decoder_bias_to_pre_encoder`",
    ),
    (
        "llama_scope/even", "hyperparams.json", {"dataset_average_activation_norm": {"in": 0, "out": 1}},
        CheckpointError, "two positive lengths were expected",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "config", "values", "error", "said"), CONFIGS)
def test_load__of_a_config_that_says_something_else__is_refused(copied, case, config, values, error, said):
    with pytest.raises(error, match=said):
        load(copied(case, config, values))


ONES = np.ones((12, 6), np.float32)
TENSORS = [
    ({"W_dec": None}, CheckpointError, "lacks the tensor `W_dec`"),
    ({"W_dec": ONES.T.copy()}, CheckpointError, r"shape \(6, 12\); \(d_sae=12, d_out=6\) was expected"),
    ({"W_dec": ONES.astype(np.int32)}, CheckpointError, "`W_dec` of .* is of int32; numbers of float16"),
    ({"extra": ONES}, CheckpointError, "holds `extra` besides .*the load is refused"),
    (
        {"scaling_factor": ONES[:, 0] * 2},
        UnsupportedModelError,
        "a `scaling_factor` that is not 1 everywhere",
    ),
]


@pytest.mark.parametrize(("tensors", "error", "said"), TENSORS)
def test_load__of_tensors_that_do_not_fit__is_refused(copied, tensors, error, said):
    with pytest.raises(error, match=said):
        load(copied("saelens/topk", tensors=tensors))


def test_load__of_rows_of_zeros_by_which_latents_are_measured__is_refused(copied):
    decoder = load_file(place("saelens/topk_by_norm") / "sae_weights.safetensors")["W_dec"]
    decoder[3] = 0
    with pytest.raises(CheckpointError, match="row 3 is zero"):
        load(copied("saelens/topk_by_norm", tensors={"W_dec": decoder}))
    wide = load_file(place("llama_scope/even") / "checkpoints" / "final.safetensors")["decoder.weight"]
    wide[:, 0] = 0
    folder = copied(
        "llama_scope/even", tensors={"decoder.weight": wide}, weights="checkpoints/final.safetensors"
    )
    with pytest.raises(CheckpointError, match="a row of zeros"):
        load(folder)


@pytest.mark.parametrize("left", ["W_enc", "threshold"])
def test_load__of_arrays_that_are_missing_in_an_npz__is_refused(left, tmp_path):
    arrays = {
        name: x for name, x in np.load(place("gemma_scope/upper") / "params.npz").items() if name != left
    }
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(CheckpointError, match=f"lacks the tensor `{left}`"):
        load(tmp_path)


def test_load__of_pt_files_that_hold_something_else__is_refused(tmp_path):
    torch_zip(tmp_path / "6.pt", b"\x80\x02].")
    with pytest.raises(CheckpointError, match="holds a list; a dict of tensors was expected"):
        load(tmp_path)
    torch_zip(tmp_path / "6.pt", b"\x80\x02}" + whole(3) + whole(4) + b"s.")
    with pytest.raises(CheckpointError, match="keys that are no text"):
        load(tmp_path)
    torch_zip(tmp_path / "6.pt", state(activation=text("GELU")))
    with pytest.raises(UnsupportedModelError, match="activation='GELU'"):
        load(tmp_path)
    torch_zip(tmp_path / "7.pt", state(a=tensor()))
    with pytest.raises(CheckpointError, match=r"holds 2 \.pt files; name the one to load"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks the tensor `encoder\.weight`"):
        load(tmp_path / "7.pt")
    folder = shutil.copytree(place("dictionary_learning/top_k"), tmp_path / "ae")
    torch_zip(folder / "ae.pt", b"\x80\x02].")
    with pytest.raises(CheckpointError, match="holds a list; a dict of tensors was expected"):
        load(folder)
    torch_zip(folder / "ae.pt", state(k=text("4")))
    with pytest.raises(CheckpointError, match="lacks the tensor `b_dec`; it holds `k`"):
        load(folder)


def test_load__of_numbers_that_are_none_in_a_pt__is_refused(tmp_path):
    for case, key, said in (
        ("batch_top_k", "threshold", "has no number `threshold`"),
        ("matryoshka", "group_sizes", "has no positive whole numbers `group_sizes`"),
    ):
        folder = shutil.copytree(place(f"dictionary_learning/{case}"), tmp_path / case)
        with zipfile.ZipFile(folder / "ae.pt") as archive:
            members = {n.split("/", 1)[1]: archive.read(n) for n in archive.namelist()}
        members["data.pkl"] = members["data.pkl"].replace(key.encode(), b"x" * len(key))
        torch_zip(folder / "ae.pt", members["data.pkl"], members=members)
        with pytest.raises(CheckpointError, match=said):
            load(folder)


def test_load__of_layers_that_do_not_belong_together__is_refused(tmp_path):
    folder = shutil.copytree(place("circuit_tracer/plt_relu"), tmp_path / "x")
    shutil.copy(place("circuit_tracer/plt_jump") / "layer_1.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"Layer 1 of .* differs from layer 0 in kind or size"):
        load(folder)
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has 2 layers but not layer 1"):
        load(folder)
    (folder / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    with pytest.raises(CheckpointError, match="model_kind='cross_layer_transcoder', but the files"):
        load(folder)


EXAMPLES = (
    "saelens/topk", "sparsify/plain", "dictionary_learning/top_k", "openai/topk", "gemma_scope/upper",
    "gemma_scope_2/resid_post/layer_1_width_16k_l0_small", "gemma_scope_2/clt/width_1k", "circuit_tracer/plt_jump",
    "circuit_tracer/clt_jump", "llama_scope/even",
)  # fmt: skip


@pytest.mark.parametrize("case", EXAMPLES)
def test_load__with_another_format_named__is_refused(case):
    for other in FORMATS.keys() - {format_of(case)}:
        with pytest.raises(MechjaxError, match=r"`|\.pt files"):
            load(place(case), format=other)


def test_load__of_parts_of_a_transcoder_across_layers__is_refused(tmp_path):
    folder = shutil.copytree(place("circuit_tracer/clt_jump"), tmp_path / "a")
    (folder / "W_dec_2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has 3 encoders and 2 decoders"):
        load(folder)
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has 2 layers but not layer 1"):
        load(folder)
    folder = shutil.copytree(place("gemma_scope_2/clt/width_1k"), tmp_path / "b")
    held = load_file(folder / "params_layer_2.safetensors")
    (tmp_path / "c").mkdir()
    for file in folder.iterdir():
        shutil.copy(file, tmp_path / "c")
    skips = held | {"affine_skip_connection": np.ones((6, 6), np.float32)}
    save_file(skips, tmp_path / "c" / "params_layer_2.safetensors")
    with pytest.raises(CheckpointError, match="adds what 1 of 3 layers read; either all skip or none"):
        load(tmp_path / "c")
    held["w_dec"][3, 1, 0] = 1
    save_file(held, folder / "params_layer_2.safetensors")
    with pytest.raises(CheckpointError, match="writes to layers before 2, which it is of"):
        load(folder)
    (folder / "params_layer_2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"`w_dec` of .* \(12, 3, 6\); \(width=12, n_layers=2"):
        load(folder)


def test_load__of_thresholds_below_zero_that_let_negative_latents_through__is_refused(copied):
    held = load_file(place("circuit_tracer/plt_jump") / "layer_0.safetensors")
    threshold = held["activation_function.threshold"] - 1
    folder = copied(
        "circuit_tracer/plt_jump",
        tensors={"activation_function.threshold": threshold},
        weights="layer_0.safetensors",
    )
    with pytest.raises(UnsupportedModelError, match=r"thresholds below 0, down to .*negative latents"):
        load(folder, layer=0)


@pytest.mark.parametrize("case", ["saelens/topk", "dictionary_learning/top_k", "gemma_scope/upper"])
def test_load__of_a_link_out_of_the_folder__is_refused(case, tmp_path):
    (tmp_path / "x").mkdir()
    for path in place(case).iterdir():
        (tmp_path / "x" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        load(tmp_path / "x")
