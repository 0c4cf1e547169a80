from collections import Counter

import jax
import pytest

import mechjax as mj
from mechjax.base.catalogue import SITES, canonical
from mechjax.models import Config, EncoderConfig, MambaConfig, T5Config, ViTConfig
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent
from mechjax.models.structures import build


def test_sites__of_models_that_have_them__stand_in_the_tables_order_with_its_axes():
    seen = {}
    for choices in (
        {"embed_norm": True},
        {"residual": "parallel", "positions": "rotary", "mlp": "gated", "norms": "both", "qk_norm": "joint"},
        {"residual": "parallel_shared", "qk_norm": "per_head"},
        {
            "mlp": "gated", "positions": "rotary", "n_kv_heads": 2, "d_head": 4, "rotary_dim": 2,
            "experts": Experts(n_experts=3, top_k=2, d_expert=5, d_shared=6),
            "latent": Latent(q_rank=3, kv_rank=3, d_nope=2, d_rope=2, d_value=4),
        },
    ):  # fmt: skip
        config = Config(d_vocab=7, n_ctx=5, d_model=4, n_layers=2, n_heads=2, **{"n_kv_heads": 1} | choices)
        model = mj.init(config, key=jax.random.key(0))
        table = mj.list_sites(model, jax.numpy.zeros((1, 3), int))
        if config.latent is None:  # whose queries are whole before its keys are begun
            assert list(table) == [name for name in SITES if name in set(table)]
        seen |= dict(table)
    config = EncoderConfig(d_vocab=7, n_ctx=5, d_model=4, n_layers=2, n_heads=2, pooler=True, nsp=True)
    encoder = build(config, {path: jax.numpy.zeros(shape) for path, shape in config.shapes.items()})
    seen |= dict(mj.list_sites(encoder, jax.numpy.zeros((1, 3), int)))
    config = T5Config(d_vocab=7, d_model=4, n_layers=2, n_decoder_layers=3, n_heads=2, mlp="gated")
    both = build(config, {path: jax.numpy.zeros(shape) for path, shape in config.shapes.items()})
    table = mj.list_sites(both, jax.numpy.zeros((1, 3), int), jax.numpy.zeros((1, 2), int))
    assert list(table) == [name for name in SITES if name in set(table)]
    seen |= {name: info for name, info in table.items() if name not in seen}
    sizes = {"image_size": (4, 4), "patch_size": (2, 2), "d_model": 4, "n_layers": 2, "n_heads": 2}
    for heads in (
        {"last_norm": "class", "pooler": "class", "d_proj": 3, "embed_norm": True},
        {"head": "class_mean", "classes": ("cat", "dog")},
        {"head": "class_distillation", "classes": ("cat", "dog"), "distilled": True},
    ):
        config = ViTConfig(**sizes, **heads)
        vit = build(config, {path: jax.numpy.zeros(shape) for path, shape in config.shapes.items()})
        seen |= dict(mj.list_sites(vit, jax.numpy.zeros((1, 3, 4, 4))))
    heads = {}
    for choices in ({"mixer_norm_eps": 1.0}, {"mixer": "mamba2", "d_inner": 6, "d_head": 2}):
        config = MambaConfig(d_vocab=7, d_model=4, n_layers=2, **choices)
        mamba = build(config, {path: jax.numpy.zeros(shape) for path, shape in config.shapes.items()})
        table = mj.list_sites(mamba, jax.numpy.zeros((1, 3), int))
        assert list(table) == [name for name in SITES if name in set(table)]
        seen, heads = dict(table) | seen, dict(table)
    assert seen.keys() == SITES.keys()
    for name, entry in SITES.items():
        assert seen[name].axes == entry.axes
        assert seen[name].stacked == entry.layered
        assert name not in heads or heads[name].axes == (entry.in_heads or entry.axes)


def test_costly_sites__when_nobody_asks__are_not_formed(tiny_model, tiny_tokens):
    costly = {
        name for name, entry in SITES.items() if entry.costly and not name.startswith(("encoder.", "cross_"))
    }
    assert costly == {
        "q_input", "k_input", "v_input", "attn_scores", "pattern", "result",
        "expert_pre", "expert_pre_linear", "expert_post", "expert_out", "pos_bias", "state",
    }  # fmt: skip
    plain = str(jax.make_jaxpr(lambda model, tokens: model(tokens))(tiny_model, tiny_tokens))
    assert not [name for name in costly if f"name={name}" in plain]


def test_spellings__every_one__leads_to_its_site_alone():
    spellings = Counter(spelling for entry in SITES.values() for spelling in entry.spellings)
    assert set(spellings.values()) == {1}
    for name, entry in SITES.items():
        for spelling in entry.spellings:
            assert entry.layered == ("{}" in spelling)
            assert canonical(spelling.format(11)) == (name, 11 if entry.layered else None)
    assert all(canonical(name) == (name, None) for name in SITES)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("blocks.3.attn.hook_z", ("z", 3)),
        ("attn.hook_z", ("z", None)),
        ("hook_resid_post", ("resid_post", None)),
        ("z3", ("z", 3)),
        ("resid_post12", ("resid_post", 12)),
        ("pre5", ("mlp_pre", 5)),
        ("attn5", ("pattern", 5)),
        ("scale4ln1", ("ln1.scale", 4)),
        ("normalized0ln2", ("ln2.normalized", 0)),
        ("encoder.3.attn.hook_z", ("encoder.z", 3)),
        ("encoder_final_ln.hook_normalized", ("encoder.ln_final.normalized", None)),
        ("decoder.3.attn.hook_z", ("z", 3)),
        ("decoder.3.ln2.hook_scale", ("ln_cross.scale", 3)),
        ("decoder.3.ln3.hook_scale", ("ln2.scale", 3)),
        ("decoder_final_ln.hook_scale", ("ln_final.scale", None)),
        ("cross_pattern3", ("cross_pattern", 3)),
        (
            "encoder.block[3].layer[0].SelfAttention.q.output",
            ("encoder.block.{}.layer.0.SelfAttention.q.output", 3),
        ),
        ("transformer.h[3].mlp.output", ("transformer.h.{}.mlp.output", 3)),
        ("transformer.h[3].attn.output[0]", ("transformer.h.{}.attn.output", 3)),
        ("model.layers[7].output[0]", ("model.layers.{}.output", 7)),
        ("model.layers.7.self_attn.o_proj.input", ("model.layers.{}.self_attn.o_proj.input", 7)),
        ("lm_head.output", ("lm_head.output", None)),
        ("model.layers.7.mlp.output@cotangent", ("model.layers.{}.mlp.output@cotangent", 7)),
        ("resid_post@cotangent", ("resid_post@cotangent", None)),
        ("blocks.1.hook_resid_pre@cotangent", ("resid_pre@cotangent", 1)),
    ],
)
def test_canonical__others_spellings__are_understood(spelled, meant):
    assert canonical(spelled) == meant


@pytest.mark.parametrize(
    "name", ["h", "h3", "my.site", "blocks.3.attn.hook_y", "embed3", "", "z-1", "layers.0.z"]
)
def test_canonical__unknown_names__come_back_unchanged(name):
    assert canonical(name) == (name, None)
