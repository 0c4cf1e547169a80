"""The check of a checkpoint: what is right is called so, and one altered weight is found where it is."""

import shutil
import sys
from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, ShapeError
from mechjax.cli import main
from mechjax.studies import check as module
from mechjax.studies.check import CHECKS, Run, check
from mechjax.studies.checked import TOLERANCES, Checked, tolerances_of, verdict_of
from tests.parity.cases import pair, redraw, transformers

CASES = ("gpt2", "pythia", "llama_gqa", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Case -> its checkpoint, as transformers writes it."""
    root = tmp_path_factory.mktemp("check")
    for name in CASES:
        pair(name).hf.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def run(folders):
    """The tiny GPT-2 on a few prompts."""
    model, _ = mj.load(folders / "gpt2")
    return module._run(model, np.random.default_rng(0).integers(0, 31, (3, 8)))


def altered(folders, case, tensor, index, tmp_path):
    """A copy of a checkpoint in which one number of one weight is larger by 1e-2."""
    copy = shutil.copytree(folders / case, tmp_path / "altered")
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    tensors[tensor][index] += 1e-2
    safetensors.numpy.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case != "gpt2")) for case in CASES],
)
def test_check__of_a_right_checkpoint__supports_every_row(folders, case):
    found = check(folders / case)
    assert found.ok and found.first is None
    assert set(found.verdicts) == {"supported"}
    assert found.reference.startswith("transformers ")
    assert found.checks[0] == "logits" and found.checks[-len(CHECKS) :] == tuple(CHECKS)
    assert {"q", "k", "v", "pattern", "z", "mlp_post", "resid_post"} < set(found.checks)
    assert (found.dtype, found.tolerance, found.notes) == ("float32", 1e-5, ())
    assert 0 < found.difference.max() < 1e-5


@pytest.mark.parametrize(
    ("case", "tensor", "index", "first"),
    [
        ("gpt2", "transformer.wpe.weight", (2, 3), "pos_embed"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (5, 30), "k in layer 1"),
        ("gpt2", "transformer.h.0.mlp.c_proj.bias", (4,), "mlp_out in layer 0"),
        ("gpt2", "transformer.h.1.ln_2.weight", (0,), "ln2.normalized in layer 1"),
        ("gpt2", "transformer.ln_f.bias", (7,), "ln_final.normalized"),
        ("llama_gqa", "model.layers.0.self_attn.v_proj.weight", (3, 3), "v in layer 0"),
        ("llama_gqa", "model.layers.1.mlp.up_proj.weight", (1, 2), "mlp_pre_linear in layer 1"),
        ("llama_gqa", "lm_head.weight", (6, 6), "logits"),
        pytest.param(
            "pythia",
            "gpt_neox.layers.1.attention.query_key_value.bias",
            (0,),
            "q in layer 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "pythia",
            "gpt_neox.layers.1.attention.dense.weight",
            (2, 0),
            "attn_out in layer 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_check__of_one_weight_altered__names_the_site_and_layer(
    folders, tmp_path, case, tensor, index, first
):
    copy = altered(folders, case, tensor, index, tmp_path)
    ours, theirs = (
        (copy, folders / case) if "1" in first else (folders / case, copy)
    )  # either side may be altered
    found = check(ours, against=theirs)
    assert not found.ok
    assert found.first == first
    assert f"The first site that differs is {first}." in repr(found)
    assert set(found.verdicts[-len(CHECKS) :]) == {"supported"}  # either copy is a consistent model


def test_check__without_transformers__says_so_and_checks_the_rest(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check(folders / "gpt2")
    assert found.ok and found.reference is None
    assert found.checks == ("transformers", *CHECKS)
    assert found.verdicts == ("skipped", *["supported"] * len(CHECKS))
    assert "pip install 'mechjax[torch]'" in found.where[0]
    assert np.isnan(found.difference[0])


def test_check__of_what_transformers_fails_on__says_why(folders, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "_in_transformers", fails)
    found = check(folders / "gpt2")
    assert found.where[0] == "transformers cannot run it: RuntimeError: no such kernel"
    assert found.verdicts[0] == "skipped"


@pytest.mark.slow
def test_check__in_bfloat16__has_its_own_tolerance_and_float32_none_of_its_rounding(folders, tmp_path):
    half = pair("llama_gqa").hf.__class__.from_pretrained(folders / "llama_gqa", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    found = check(tmp_path / "half")
    assert (found.dtype, found.tolerance) == ("bfloat16", 2e-2)
    assert found.ok and found.difference.max() > 1e-4
    exact = check(tmp_path / "half", dtype="float32")
    assert exact.ok and exact.dtype == "float32" and exact.difference.max() < 1e-5


@pytest.mark.parametrize("n_layers", [12, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_check__of_a_deep_checkpoint__tells_rounding_from_an_altered_weight(tmp_path, n_layers):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_hidden_layers=n_layers,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config)
    redraw(hf, np.random.default_rng(n_layers))
    hf.save_pretrained(tmp_path / "whole")
    half = check(tmp_path / "whole", dtype="bfloat16")
    assert half.ok
    assert half.tolerance == tolerances_of("bfloat16", n_layers)[0]
    assert half.difference.max() > TOLERANCES["bfloat16"][0]  # what two layers would not be let through with
    weight = "model.layers.5.self_attn.v_proj.weight"
    copy = altered(tmp_path, "whole", weight, (3, 3), tmp_path)
    found = check(tmp_path / "whole", against=copy)
    assert not found.ok
    assert found.first == "v in layer 5"
    assert found.tolerance == TOLERANCES["float32"][0]


@pytest.mark.slow
def test_check__of_windows_that_the_prompts_do_not_reach__notes_it(folders):
    found = check(folders / "mistral", tokens=[[1, 2, 3], [4, 5, 6]])
    assert found.notes == ("Windows of 3 positions are longer than the prompts of 3: not exercised.",)


def test_sum_of_writes__of_a_stream_that_something_else_writes_to__is_wrong(run):
    assert worst(run, "sum of writes") < 1e-6
    for place in (("resid_post", 0), ("resid_pre", 1), ("resid_pre", 0)):
        changed = run.sites | {place: run.sites[place] + 1e-2}
        assert worst(replace(run, sites=changed), "sum of writes") > 1e-4


def test_padding__of_a_model_that_ignores_its_mask__is_wrong(run):
    careless = replace(run, model=lambda tokens, mask=None: run.model(tokens))
    assert worst(run, "padding left and right") < 1e-5
    assert worst(careless, "padding left and right") > 1e-2


def test_batch__of_a_model_whose_examples_mix__is_wrong(run):
    mixed = replace(run, logits=run.logits + 1e-2 * run.logits.mean(0))
    assert worst(run, "batch of one") < 1e-5
    assert worst(mixed, "batch of one") > 1e-3


def test_cache__of_a_model_that_forgets_its_keys__is_wrong(run):
    class Forgetful(type(run.model)):
        """A decoder whose cache loses the first layer's keys."""

        def __call__(self, tokens, *, cache):
            lost = eqx.tree_at(lambda c: c.keys, cache, cache.keys.at[0].set(0.0))
            return super().__call__(tokens, cache=lost)

    parts = {name: getattr(run.model, name) for name in run.model.__dataclass_fields__}
    assert worst(run, "cache against full forward") < 1e-5
    assert worst(replace(run, model=Forgetful(**parts)), "cache against full forward") > 1e-2


def test_cache__where_it_does_not_apply__has_no_row(run):
    switching = pair("phi_3_long").model
    assert not CHECKS["cache against full forward"](replace(run, model=switching))
    assert CHECKS["cache against full forward"](replace(run, model=switching, tokens=run.tokens[:, :4]))


def test_checks__a_row_that_is_not_finite__is_wrong(folders, monkeypatch):
    monkeypatch.setitem(CHECKS, "nothing", lambda run: [("everywhere", run.logits * np.nan, run.logits)])
    found = check(folders / "gpt2")
    assert found.rows()[-1] == {
        "check": "nothing",
        "verdict": "wrong",
        "difference": float("inf"),
        "where": "everywhere",
    }
    assert not found.ok


def worst(run: Run, name: str) -> float:
    return module._worst(name, CHECKS[name](run), "float32", 2).difference


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tokens": [1, 2, 3]}, ShapeError, r"`tokens` must be integer ids of shape .*got int64 of shape \(3,\)"),
        ({"tokens": [[1], [2]]}, ShapeError, r"at least two positions and no padding; got int64 of shape \(2, 1\)"),
        ({"tokens": [[1, 2], [3]]}, ShapeError, r"Pass prompts of equal length, or none for random ids"),
        ({"tokens": [[0.5, 1.0]]}, ShapeError, r"got float64"),
        ({"seed": -1}, ArgumentError, r"seed=-1 is negative: pass a whole number from 0"),
        ({"dtype": "int8"}, ArgumentError, r"dtype='int8' is not one of float32"),
        ({"against": "no-such"}, CheckpointError, r"`no-such` is neither a model that ships"),
    ],
)  # fmt: skip
def test_check__of_what_cannot_be__is_refused(folders, given, error, message):
    with pytest.raises(error, match=message):
        check(folders / "gpt2", **given)


def test_check__against_another_config__is_refused(folders):
    with pytest.raises(ArgumentError, match=r"is a model of another config than .*config.json says the same"):
        check(folders / "gpt2", against=folders / "mistral")


@pytest.mark.parametrize(
    ("difference", "dtype", "n_layers", "verdict"),
    [
        (1e-6, "float32", 2, "supported"),
        (5e-5, "float32", 2, "degraded"),
        (5e-5, "bfloat16", 2, "supported"),
        (2e-4, "float32", 48, "wrong"),
        (float("nan"), "float32", 2, "wrong"),
        (3e-2, "bfloat16", 1, "degraded"),
        (3e-2, "bfloat16", 12, "supported"),
        (7e-2, "bfloat16", 12, "degraded"),
        (3e-1, "bfloat16", 24, "wrong"),
        (float("nan"), "float16", 24, "wrong"),
    ],
)
def test_verdict_of__a_difference__depends_on_dtype_and_depth(difference, dtype, n_layers, verdict):
    assert verdict_of(difference, dtype, n_layers) == verdict


def test_checked__with_much_that_is_wrong__prints_briefly_and_comes_back_from_disk(tmp_path):
    n = 30
    record = Checked(
        difference=jnp.full(n, 0.5),
        checks=tuple(f"site{i}" for i in range(n)),
        verdicts=("supported", "degraded", *["wrong"] * (n - 2)),
        where=("<b>",) * n,
        first="site1 in layer 2",
        tolerance=1e-5,
        dtype="float32",
        model="m",
        reference="transformers 5",
        notes=("One.", "Two."),
    )
    shown = repr(record)
    assert len(shown.splitlines()) < 20
    assert "m (float32) against transformers 5: 1 supported, 1 degraded, 28 wrong. The first site" in shown
    assert "  degraded: site1  5.0e-01 <b>" in shown and "… and 23 more rows" in shown
    assert "<b>" not in record._repr_html_()
    mj.save(record, tmp_path)
    assert repr(mj.restore(tmp_path)) == shown


def test_cli__of_a_right_checkpoint__prints_a_table_and_exits_0(folders, capsys):
    assert main(["check", str(folders / "gpt2")]) == 0
    said = capsys.readouterr().out
    assert "resid_post" in said and "padding left and right" in said
    assert "gpt2 (float32) against transformers" in said and "supported." in said


def test_cli__of_an_altered_weight__names_the_site_and_exits_1(folders, tmp_path, capsys):
    copy = altered(folders, "gpt2", "transformer.h.1.attn.c_proj.bias", (0,), tmp_path)
    assert main(["check", str(folders / "gpt2"), "--against", str(copy)]) == 1
    assert "The first site that differs is attn_out in layer 1." in capsys.readouterr().out.replace("\n", " ")


def test_cli__of_what_cannot_be_checked__exits_2_without_a_traceback(folders, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["RwkvForCausalLM"]}')
    for argv in (["/no/such"], [str(tmp_path)], [str(folders / "gpt2"), "--seed", "-3"]):
        assert main(["check", *argv]) == 2
    err = capsys.readouterr().err
    assert "CheckpointError" in err and "RwkvForCausalLM is not implemented" in err and "seed=-3" in err
    assert "Traceback" not in err
