"""Our own layout: any decoder goes out and comes back bit for bit, and what a file should not hold is refused."""

import json

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import CheckpointError, UnsupportedModelError
from mechjax.models import Config, init, parameters
from mechjax.models.experts import Experts
from mechjax.models.families import NATIVE, config_from_hf
from mechjax.models.families.family import read_config, write_config
from mechjax.models.latent import Latent
from mechjax.models.rope import LongRope, Rope, Yarn

_SMALL = {"d_vocab": 11, "n_ctx": 8, "d_model": 8, "n_layers": 2, "n_heads": 2}
_YARN = Yarn(factor=2.0, trained=8, fast=16.0)
_LONG = LongRope(short=(1.0, 1.5), long=(2.0, 3.0), trained=4)
CONFIGS = {
    "attention_only": {"mlp": "none", "tied": False},
    "windows": {"windows": (None, 3), "norm": "rms", "attn_scale": 0.3, "final_softcap": 5.0},
    "rope_per_layer": {"positions": "rotary", "rope": (Rope(base=50.0, stretch=_YARN), None), "rotary_dim": 4},
    "long_rope": {"positions": "rotary", "rope": Rope(stretch=_LONG), "rotary_dim": 4, "mlp": "gated"},
    "experts": {
        "norm": "rms", "mlp": "gated",
        "experts": Experts(n_experts=4, top_k=2, d_expert=3, biases=True, swiglu_limit=7.0, d_shared=3, layers=(1,)),
    },
    "latent": {
        "norm": "rms", "positions": "rotary", "d_head": 5, "rotary_dim": 2, "qkv_bias": False, "mlp": "gated",
        "latent": Latent(q_rank=3, kv_rank=4, d_nope=3, d_rope=2, d_value=6),
        "experts": Experts(
            n_experts=4, top_k=1, d_expert=3, scoring="sigmoid", choice_bias=True, n_groups=2, group_score="top2"
        ),
    },
}  # fmt: skip


def _bits(model):
    return {path: np.asarray(leaf).tobytes() for path, leaf in parameters(model).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_export__of_any_decoder__comes_back_bit_for_bit(name, tmp_path):
    model = init(Config(**_SMALL, **CONFIGS[name]), key=jax.random.key(0))
    folder = mj.export(model, tmp_path / "m", family="mechjax")
    again, tokenizer = mj.load(folder)
    assert again.config == model.config
    assert _bits(again) == _bits(model)
    assert tokenizer is None
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MechjaxDecoder"]


def test_config__without_a_field__has_its_default():
    hf = write_config(Config(**_SMALL), NATIVE)
    del hf["residual_scale"]
    config, family = config_from_hf(json.loads(json.dumps(hf)))
    assert family is NATIVE
    assert config == Config(**_SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "blue"}, "keys that are unknown for mechjax: `colour` = 'blue'"),
        ({"rope": {"kind": "Ropes", "base": 5.0}}, "`rope` of the `kind` 'Ropes'; known are Rope. Did you mean `Rope`"),
        ({"rope": {"base": 5.0}}, "`rope` of the `kind` None; known are Rope"),
        ({"rope": {"kind": "Rope", "bases": 5.0}}, "`rope` with 'bases'; a Rope has base, stretch. Did you mean `base`"),
        ({"rope": {"kind": "Rope", "stretch": {"kind": "Cut"}}}, r"`rope\.stretch` of the `kind` 'Cut'; known are .*Yarn"),
    ],
)  # fmt: skip
def test_config__of_what_is_not_known__is_refused_by_name(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(write_config(Config(**_SMALL), NATIVE) | change, NATIVE)


def test_load__of_tensors_that_do_not_fit__is_refused(tmp_path):
    folder = mj.export(init(Config(**_SMALL), key=jax.random.key(0)), tmp_path / "m", family="mechjax")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_mlp": 5}))
    with pytest.raises(CheckpointError, match=r"Tensor `blocks\.mlp\.W_in` .* has the shape"):
        mj.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"mlp": "none"}))
    with pytest.raises(CheckpointError, match="that a mechjax model of its config does not have"):
        mj.load(folder)
