"""Write tiny dictionaries in the formats of other libraries, with what those libraries compute from them.

    python tests/oracles/make_dictionaries.py saelens       # where sae-lens is installed
    python tests/oracles/make_dictionaries.py eleuther      # dictionary-learning and eai-sparsify
    python tests/oracles/make_dictionaries.py circuits      # circuit-tracer
    python tests/oracles/make_dictionaries.py read          # sae-lens: what it computes from folders that mechjax wrote

The three environments cannot be one: their requirements of transformers and nnsight exclude each other.
`dictionaries/versions.json` says what was installed. Beside each folder (or file) `<case>` lies `<case>.npz`: inputs `x`,
latents `f`, what they decode to `made`, and the whole forward pass `y`.

Who writes, and who is the oracle:

- saelens, sparsify, dictionary_learning, circuit_tracer: written by the library itself, which is the oracle too. The
  configs named `old...` are of SAELens before 6, written by hand; SAELens reads them.
- gemma_scope, gemma_scope_2, llama_scope: no library writes these, so they are written here as they are published.
  SAELens' loaders are the oracle; for the cross-layer transcoder circuit-tracer's. Given paths {0, ..., L - 1},
  circuit-tracer leaves out the last layer and fails; one more path, which it does not open, mends that.
- openai: its package is on no registry, so the file is written here by its layout. The oracle is SAELens' own class of
  the same formula (standard; topk with layer_norm), given the same numbers.
- llama_scope/transcoder and llama_scope/uneven: SAELens has one scale for both ends and leaves lengths of the decoder
  out, where the authors' library (Language-Model-SAEs, 2024) has two scales and compares thresholds with a latent times
  the length. `llama_scope_reference` below is that rule in torch: a reference written by us, and no peer.

Not asked: SAELens' reader of sparsify (it transposes the decoder and subtracts the bias by the wrong key), its sum of a
cross-layer transcoder's decoders, `AutoEncoder.from_pretrained` of dictionary_learning with its default (it rescales
latents to unit rows of the decoder; the file says no such thing).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_records import BATCH, HERE, OUT, D, F, K, draw, fill, inputs, note, record
from safetensors.torch import save_file

# ---- SAELens ---------------------------------------------------------------------------------------------------------


def saelens() -> None:
    import sae_lens as sl

    note("saelens", "sae-lens", "torch", "numpy", "safetensors")
    sizes = {"d_in": D, "d_sae": F}
    raw = {"apply_b_dec_to_input": False}
    across = sizes | raw | {"d_out": OUT}
    square = sizes | raw | {"d_out": D}
    meta = lambda **more: {"metadata": sl.saes.sae.SAEMetadata(model_name="tiny", **more)}
    plain = {
        "standard": sl.StandardSAE(
            sl.StandardSAEConfig(**sizes, **meta(hook_name="blocks.1.hook_resid_post"))
        ),
        "standard_raw": sl.StandardSAE(sl.StandardSAEConfig(**sizes, **raw)),
        "topk": sl.TopKSAE(sl.TopKSAEConfig(**sizes, k=K)),
        "topk_raw": sl.TopKSAE(sl.TopKSAEConfig(**sizes, **raw, k=9)),
        "topk_by_norm": sl.TopKSAE(sl.TopKSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**sizes)),
        "jumprelu_raw": sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**sizes, **raw)),
        "gated": sl.GatedSAE(sl.GatedSAEConfig(**sizes)),
        "gated_raw": sl.GatedSAE(sl.GatedSAEConfig(**sizes, **raw)),
        "layer_norm": sl.TopKSAE(sl.TopKSAEConfig(**sizes, k=K, normalize_activations="layer_norm")),
        "constant_norm": sl.StandardSAE(
            sl.StandardSAEConfig(**sizes, normalize_activations="constant_norm_rescale")
        ),
        "hook_z": sl.JumpReLUSAE(
            sl.JumpReLUSAEConfig(
                **sizes, reshape_activations="hook_z", **meta(hook_name="blocks.0.attn.hook_z")
            )
        ),
        "transcoder": sl.Transcoder(sl.TranscoderConfig(**across)),
        "transcoder_layer_norm": sl.SkipTranscoder(
            sl.SkipTranscoderConfig(**square, normalize_activations="layer_norm")
        ),
        "skip_transcoder": sl.SkipTranscoder(sl.SkipTranscoderConfig(**across)),
        "jumprelu_transcoder": sl.JumpReLUTranscoder(sl.saes.transcoder.JumpReLUTranscoderConfig(**across)),
        "jumprelu_skip_transcoder": sl.JumpReLUSkipTranscoder(
            sl.saes.transcoder.JumpReLUSkipTranscoderConfig(**across)
        ),
    }
    for seed, (case, sae) in enumerate(plain.items()):
        fill(sae, seed)
        sae.save_model(HERE / "saelens" / case)
        outputs(HERE / "saelens" / case, seed)
    trained(sl, sizes)
    before_six(sl, sizes)
    low_precision(sl, sizes)
    gemma_scope(sl)
    llama_scope(sl)
    openai(sl)


def outputs(folder: Path, seed: int, sae: Any = None) -> None:
    """What SAELens computes from what lies in `folder`, read anew."""
    import sae_lens as sl

    sae = sl.SAE.load_from_disk(folder) if sae is None else sae
    x = inputs(seed, BATCH, sae.cfg.d_in).to(sae.dtype)
    if sae.cfg.reshape_activations == "hook_z":
        x = x.reshape(BATCH, 2, D // 2)
    f = sae.encode(x)
    if sae.cfg.normalize_activations == "none" or hasattr(sae.cfg, "d_out"):
        made = sae.decode(f)
    else:  # decoding undoes the normalisation of the input that came last, and forgets it
        made = f @ sae.W_dec + sae.b_dec
    record(folder, x, f, made, sae(x))


def trained(sl: Any, sizes: dict[str, int]) -> None:
    """What training writes: inference models, and checkpoints to go on from."""
    kinds = {
        "trained_topk": sl.TopKTrainingSAE(sl.TopKTrainingSAEConfig(**sizes, k=K)),
        "trained_batchtopk": sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(**sizes, k=K)),
        "trained_matryoshka": sl.MatryoshkaBatchTopKTrainingSAE(
            sl.MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=K, matryoshka_widths=[3, 6, F])
        ),
        "trained_gated": sl.GatedTrainingSAE(sl.GatedTrainingSAEConfig(**sizes)),
    }
    for seed, (case, sae) in enumerate(kinds.items(), 50):
        fill(sae, seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.35)
        folder = HERE / "saelens" / case
        sae.save_inference_model(folder)
        outputs(folder, seed)
        if case in ("trained_topk", "trained_batchtopk", "trained_matryoshka"):
            checkpoint = folder.with_name(case.replace("trained", "checkpoint"))
            sae.save_model(checkpoint)
            outputs(checkpoint, seed, sl.SAE.load_from_disk(folder))
    scaler = sl.training.activation_scaler.ActivationScaler(scaling_factor=0.37)
    sae = sl.BatchTopKTrainingSAE(
        sl.BatchTopKTrainingSAEConfig(**sizes, k=K, normalize_activations="expected_average_only_in")
    )
    fill(sae, 60)
    sae.topk_threshold.fill_(0.3)
    folder = HERE / "saelens" / "checkpoint_scaled"
    sae.save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))
    sae.fold_activation_norm_scaling_factor(0.37)
    scratch = Path("/tmp/mechjax-oracle-scaled")
    sae.save_inference_model(scratch)
    outputs(folder, 60, sl.SAE.load_from_disk(scratch))


def before_six(sl: Any, sizes: dict[str, int]) -> None:
    """Configs as SAELens wrote them before version 6."""
    old = {
        "old_relu": {"hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "relu"},
        "old_topk": {
            "architecture": "standard",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "hook_name": "blocks.0.hook_resid_mid",
            "normalize_activations": "layer_norm",
            "apply_b_dec_to_input": True,
        },
        "old_jumprelu": {
            "architecture": "jumprelu",
            "activation_fn_str": "relu",
            "apply_b_dec_to_input": False,
            "normalize_activations": False,
            "finetuning_scaling_factor": False,
            "hook_name": "blocks.0.hook_resid_post",
        },
    }
    for seed, (case, config) in enumerate(old.items(), 70):
        folder = HERE / "saelens" / case
        folder.mkdir(parents=True, exist_ok=True)
        tensors = draw(seed, W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,), threshold=(F,))
        if case != "old_jumprelu":
            del tensors["threshold"]
        if case == "old_relu":
            tensors["scaling_factor"] = torch.ones(F)  # was always written for a while
        save_file(tensors, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(
            json.dumps(sizes | {"dtype": "float32", "model_name": "gpt2", "prepend_bos": True} | config)
        )
        outputs(folder, seed)


def low_precision(sl: Any, sizes: dict[str, int]) -> None:
    """Weights in bfloat16, computed with in float32."""
    sae = sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**sizes, dtype="bfloat16"))
    fill(sae, 80)
    folder = HERE / "saelens" / "bfloat16"
    sae.save_model(folder)
    outputs(folder, 80, sl.SAE.load_from_disk(folder, dtype="float32"))


# ---- published, and read by SAELens ----------------------------------------------------------------------------------


def at_home(sl: Any, root: Path) -> Any:
    """SAELens' loaders, reading the folder `root` where they would fetch from the Hub."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    def local(repo_id: str, filename: str, subfolder: str | None = None, **more: Any) -> str:
        return str(root / (subfolder or "") / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(root / filename, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    return loaders


def built(sl: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The object that SAELens makes of what its loader gave."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    sae = sl.SAE.from_dict(handle_config_defaulting(config))
    sae.load_state_dict(tensors)
    return sae


def gemma_scope(sl: Any) -> None:
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    root = HERE / "gemma_scope"
    loaders = at_home(sl, root)
    for seed, (case, lower) in enumerate({"upper": False, "lower": True}.items(), 100):
        folder = root / case / "layer_3/width_16k/average_l0_5"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = draw(seed, **shapes)
        renamed = {name.replace("W_", "w_") if lower else name: x.numpy() for name, x in tensors.items()}
        np.savez(folder / "params.npz", **renamed)
        found = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", str(folder.relative_to(root)), "cpu",
            cfg_overrides={"d_in": D, "d_sae": F},
        )  # fmt: skip
        outputs(root / case, seed, built(sl, *found[:2]))
    root = HERE / "gemma_scope_2"
    loaders = at_home(sl, root)
    cases = {
        "resid_post/layer_1_width_16k_l0_small": (D, False),
        "transcoder/layer_1_width_16k_l0_small": (D, False),
        "transcoder/layer_2_width_16k_l0_small_affine": (D, True),
    }
    for seed, (case, (out, affine)) in enumerate(cases.items(), 110):
        folder = root / case
        folder.mkdir(parents=True, exist_ok=True)
        tensors = draw(seed, w_enc=(D, F), w_dec=(F, out), b_enc=(F,), b_dec=(out,), threshold=(F,))
        if affine:
            tensors |= draw(seed + 500, affine_skip_connection=(D, out))
        save_file(tensors, folder / "params.safetensors")
        point = "model.layers.1.{}layernorm.output".format
        there = "transcoder" in case
        config = {
            "width": F, "model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "l0": 4,
            "affine_connection": affine, "type": "transcoder" if there else "sae",
            "hf_hook_point_in": point("pre_feedforward_") if there else "model.layers.1.output",
            "hf_hook_point_out": point("post_feedforward_") if there else "model.layers.1.output",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        found = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", case, "cpu")
        outputs(folder, seed, built(sl, *found[:2]))


def llama_scope(sl: Any) -> None:
    root = HERE / "llama_scope"
    loaders = at_home(sl, root)
    published = {
        "hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": "blocks.2.hook_resid_post",
        "d_model": D, "d_sae": F, "expansion_factor": 2, "act_fn": "jumprelu", "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 3.5, "out": 3.5},
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": 50, "dtype": "torch.bfloat16",
    }  # fmt: skip
    across = {
        "hook_point_in": "blocks.2.ln2.hook_normalized",
        "hook_point_out": "blocks.2.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 3.5, "out": 1.2},
    }
    names = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    for seed, (case, more) in enumerate({"even": {}, "uneven": {}, "transcoder": across}.items(), 120):
        folder, config = root / case, published | more
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        tensors = {
            name.replace("_", "."): x
            for name, x in draw(seed, **{n.replace(".", "_"): s for n, s in names.items()}).items()
        }
        if case == "even":
            tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
        save_file(tensors, folder / "checkpoints" / "final.safetensors")
        (folder / "hyperparams.json").write_text(json.dumps(config))
        if case == "even":
            found = loaders.llama_scope_sae_huggingface_loader(
                "fnlp/tiny", case, "cpu", cfg_overrides={"dtype": "float32"}
            )
            sae = built(sl, *found[:2])
            sae.fold_activation_norm_scaling_factor(
                D**0.5 / 3.5
            )  # as `from_pretrained` does, from its own table
            outputs(folder, seed, sae)
        else:
            llama_scope_reference(folder, seed, config, tensors)


def llama_scope_reference(
    folder: Path, seed: int, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """The authors' rule at inference; latents in the units of training, as SAELens gives them."""
    norms = config["dataset_average_activation_norm"]
    read, written = (D**0.5 / norms[side] for side in ("in", "out"))
    x = inputs(seed, BATCH, D)
    W, length = tensors["decoder.weight"].T, tensors["decoder.weight"].norm(dim=0)
    z = x * read @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    # Their weights at inference: encoder bias / read, decoder weight * read / written, then rows of length 1.
    score = z / read * length * read / written
    f = torch.where(score > config["jump_relu_threshold"], z, 0).relu()
    made = (f @ W + tensors["decoder.bias"]) / written
    record(folder, x, f, made, made)


def openai(sl: Any) -> None:
    root = HERE / "openai"
    root.mkdir(parents=True, exist_ok=True)
    for seed, case in enumerate(("relu", "topk"), 130):
        t = draw(seed, W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,))
        state: dict[str, Any] = {
            "pre_bias": t["b_dec"], "latent_bias": t["b_enc"],
            "stats_last_nonzero": torch.arange(F), "latents_activation_frequency": torch.ones(F),
            "latents_mean_square": torch.zeros(F),
            "encoder.weight": t["W_enc"].T.contiguous(), "decoder.weight": t["W_dec"].T.contiguous(),
        }  # fmt: skip
        if case == "topk":
            state |= {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
            sae = sl.TopKSAE(sl.TopKSAEConfig(d_in=D, d_sae=F, k=K, normalize_activations="layer_norm"))
        else:
            state |= {"activation": "ReLU", "activation_state_dict": {}}
            sae = sl.StandardSAE(sl.StandardSAEConfig(d_in=D, d_sae=F))
        torch.save(state, root / f"{case}.pt")
        sae.load_state_dict(t)
        outputs(root / case, seed, sae)


def read() -> None:
    """What SAELens computes from folders that mechjax wrote."""
    note("read", "sae-lens", "torch", "numpy", "safetensors")
    for seed, path in enumerate(sorted((HERE / "ours").glob("*/cfg.json")), 200):
        outputs(path.parent, seed)


# ---- dictionary_learning and sparsify --------------------------------------------------------------------------------


def eleuther() -> None:
    from dictionary_learning import dictionary as dl
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sparsify import SparseCoder, SparseCoderConfig

    note("eleuther", "dictionary-learning", "eai-sparsify", "torch", "numpy", "safetensors")
    root = HERE / "dictionary_learning"
    kinds = {
        "auto_encoder": dl.AutoEncoder(D, F),
        "auto_encoder_new": dl.AutoEncoderNew(D, F),
        "gated": dl.GatedAutoEncoder(D, F),
        "jump_relu": dl.JumpReluAutoEncoder(D, F),
        "top_k": AutoEncoderTopK(D, F, K),
        "batch_top_k": BatchTopKSAE(D, F, K),
        "batch_top_k_young": BatchTopKSAE(D, F, K),
        "matryoshka": MatryoshkaBatchTopKSAE(D, F, K, [3, 3, 6]),
    }
    for seed, (case, ae) in enumerate(kinds.items(), 300):
        fill(ae, seed)
        if case in ("batch_top_k", "matryoshka", "top_k"):
            ae.threshold.fill_(0.4)
        folder = root / case
        folder.mkdir(parents=True, exist_ok=True)
        # The two lines by which `trainSAE` writes its results, for a dictionary that was not trained.
        torch.save({name: x.cpu() for name, x in ae.state_dict().items()}, folder / "ae.pt")
        trainer = {"dict_class": type(ae).__name__, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "tiny",
                   "submodule_name": "resid_post_layer_3"} | ({"k": K} if hasattr(ae, "k") else {})  # fmt: skip
        (folder / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 8}}, indent=4)
        )
        x = inputs(seed, BATCH, D)
        f = ae.encode(x)
        record(folder, x, f, ae.decode(f), ae(x))
    cases = {
        "plain": {},
        "transcode": {"transcode": True},
        "skip": {"transcode": True, "skip_connection": True},
        "skip_centred": {"skip_connection": True},
    }
    for seed, (case, more) in enumerate(cases.items(), 320):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **more))
        fill(coder, seed)
        folder = HERE / "sparsify" / case
        coder.save_to_disk(folder)
        coder = SparseCoder.load_from_disk(folder)
        x = inputs(seed, BATCH, D)
        acts, at, _ = coder.encode(x)
        f = torch.zeros(BATCH, F).scatter_(-1, at, acts)
        record(folder, x, f, coder.decode(acts, at), coder(x).sae_out)


# ---- circuit-tracer --------------------------------------------------------------------------------------------------


def circuits() -> None:
    import yaml
    from circuit_tracer.transcoder import cross_layer_transcoder as clt
    from circuit_tracer.transcoder import single_layer_transcoder as plt
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    note("circuits", "circuit-tracer", "torch", "numpy", "safetensors")
    cpu, L = torch.device("cpu"), 3
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    for seed, (case, jumps, skip) in enumerate(
        (("plt_relu", False, False), ("plt_skip", False, True), ("plt_jump", True, True)), 400
    ):
        layers = {}
        for i in range(L):
            act = JumpReLU(torch.zeros(F), 0.1) if jumps else torch.nn.functional.relu
            layers[i] = plt.SingleLayerTranscoder(D, F, act, i, skip, device=cpu, dtype=torch.float32)
            fill(layers[i], 10 * seed + i)
        folder = HERE / "circuit_tracer" / case
        plt.TranscoderSet(layers, **hooks).to_safetensors(str(folder))
        write_yaml(
            yaml,
            folder,
            {"model_name": "google/tiny", "model_kind": "transcoder_set", "scan": "tiny"} | hooks,
        )
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(L)}
        found = plt.load_transcoder_set(
            paths, "tiny", **hooks, device=cpu, lazy_encoder=False, lazy_decoder=False
        )
        x = inputs(seed, L, BATCH, D)
        f = found.encode(x)
        made = torch.stack([f[i] @ found[i].W_dec + found[i].b_dec for i in range(L)])
        record(folder, x, f, made, found.decode(f, x))
    for seed, (case, act) in enumerate((("clt_relu", "relu"), ("clt_jump", "jump_relu")), 410):
        made = clt.CrossLayerTranscoder(L, F, D, act, lazy_decoder=False, device=cpu, dtype=torch.float32)
        fill(made, seed)
        folder = HERE / "circuit_tracer" / case
        made.to_safetensors(str(folder))
        write_yaml(
            yaml,
            folder,
            {"model_name": "google/tiny", "model_kind": "cross_layer_transcoder", "scan": ["a", "b"]} | hooks,
        )
        found = clt.load_clt(str(folder), **hooks, device=cpu, dtype=torch.float32, lazy_decoder=False)
        x = inputs(seed, L, BATCH, D)
        f = found.encode(x)
        record(folder, x, f, found.decode(f), found(x))
    for seed, (case, affine) in enumerate((("clt/width_1k", False), ("clt/width_1k_affine", True)), 420):
        folder = HERE / "gemma_scope_2" / case
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(L):
            tensors = draw(
                10 * seed + i, w_enc=(D, F), w_dec=(F, L, D), b_enc=(F,), b_dec=(D,), threshold=(F,)
            )
            tensors["w_dec"][:, :i] = 0  # nothing is written to earlier layers
            if affine:
                tensors |= draw(10 * seed + i + 500, affine_skip_connection=(D, D))
            save_file(tensors, folder / f"params_layer_{i}.safetensors")
        point = "model.layers.{all}.%s_feedforward_layernorm.output"
        config = {
            "hf_hook_point_in": point % "pre", "hf_hook_point_out": point % "post", "width": L * F, "l0": 4,
            "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "affine_connection": affine,
            "type": "clt",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        paths = {i: str(folder / f"params_layer_{i}.safetensors") for i in range(L)}
        found = clt.load_gemma_scope_2_clt(paths | {L: ""}, **hooks, device=cpu, dtype=torch.float32)
        x = inputs(seed, L, BATCH, D)
        f = found.encode(x)
        skip = torch.stack([found.compute_skip(i, x[i]) for i in range(L)]) if affine else 0
        record(folder, x, f, found.decode(f, x) - skip, found.decode(f, x))


def write_yaml(yaml: Any, folder: Path, config: dict[str, Any]) -> None:
    with (folder / "config.yaml").open("w") as file:
        yaml.dump(config, file)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    {"saelens": saelens, "eleuther": eleuther, "circuits": circuits, "read": read}[sys.argv[1]]()
