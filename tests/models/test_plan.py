"""Plans against real arrays, closed forms, and models far too large for any machine here."""

import shutil
import time

import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.models import Config
from mechjax.models.export import export
from mechjax.models.plan import plan


@pytest.fixture(scope="module")
def llama_70b():
    return Config(
        d_vocab=128256, n_ctx=8192, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_head=128, d_mlp=28672,
        norm="rms", positions="rotary", mlp="gated", activation="silu", qkv_bias=False, out_bias=False,
        mlp_bias=False, tied=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=2, n_heads=4)
    model = mj.init(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    return export(model, tmp_path_factory.mktemp("plan") / "model", family="gpt2")


def test_plan__of_70_billion_parameters__makes_no_array_and_takes_two_seconds(llama_70b):
    before = {id(x) for x in jax.live_arrays()}
    start = time.process_time()  # CPU time, since other work may share the machine
    found = plan(llama_70b, (8, 1024), capture=["resid_post", "z"], dtype="bfloat16")
    assert time.process_time() - start < 2.0
    assert {id(x) for x in jax.live_arrays()} <= before
    assert found.n_params == 70_553_706_496  # as Llama 3 70B's own card counts
    assert found.param_bytes == 2 * found.n_params
    tokens, embedding, norms = 8 * 1024, 128256 * 8192, (2 * 80 + 1) * 8192
    attention = 4 * 80 * 8 * 1024**2 * 64 * 128
    assert found.cost.contractions == 2 * tokens * (found.n_params - embedding - norms) + attention
    assert found.cost.contractions > 0.98 * found.flops
    assert found.captured_bytes == 2 * (2 * 80 * tokens * 8192)  # both are as wide as the residual
    assert found.cost.unknown == ()


def test_plan__of_every_site__is_the_bytes_of_real_arrays(tiny_model, tiny_tokens):
    names = list(mj.list_sites(tiny_model, tiny_tokens))
    found = plan(tiny_model, tiny_tokens, capture=names)
    _, acts = mj.run(tiny_model, tiny_tokens, capture=names)
    real = {name: (x.shape, x.nbytes, str(x.dtype)) for name, x in acts.items()}
    assert {s.name: (s.shape, s.bytes, s.dtype) for s in found.sites} == real
    assert {s.name: (s.shape, s.bytes, s.dtype) for s in found.captured} == real
    assert {s.name: s.axes for s in found.sites} == {n: acts.axis_names("arrays", n) for n in names}
    assert found.captured_bytes == sum(x.nbytes for x in acts.values())
    assert found.param_bytes == sum(x.nbytes for x in jax.tree.leaves(tiny_model))
    assert found.site_bytes == sum(s.bytes for s in found.sites) - sum(
        real[n][1] for n in ("q_input", "k_input", "v_input", "attn_scores", "pattern", "result")
    )


def test_plan__of_a_transformed_model__counts_only_what_it_keeps(tiny_model, tiny_tokens):
    some = mj.capture(tiny_model, ["resid_post"], layers=[0, 2], pos=-1)
    found = plan(some, tiny_tokens)
    assert found.captured_bytes == some(tiny_tokens)[1]["resid_post"].nbytes == 4 * 2 * 4 * 16
    assert {s.name for s in found.sites} == {s.name for s in plan(tiny_model, tiny_tokens).sites}


def test_plan__with_edits__counts_their_arithmetic(tiny_model, tiny_tokens):
    plain = plan(tiny_model, tiny_tokens)
    matrix = jnp.eye(16)
    edited = plan(tiny_model, tiny_tokens, edits=mj.apply("resid_post", lambda x, _, m: x @ m, matrix))
    assert edited.cost.contractions - plain.cost.contractions == 3 * 2 * (4 * 6) * 16 * 16
    with pytest.raises(SiteError, match=r"resid_pots.*Did you mean `resid_post`"):
        plan(tiny_model, tiny_tokens, capture="resid_pots")
    with pytest.raises(SiteError, match="layer"):
        plan(tiny_model, tiny_tokens, edits=mj.zero("z", layer=9))


def test_plan__of_tokens_in_any_form__looks_at_their_shape_only(tiny_model, tiny_tokens):
    prompts = mj.Prompts(tiny_tokens, jnp.ones(tiny_tokens.shape, bool))
    by_shape = plan(tiny_model, (4, 6))
    for given in (tiny_tokens, jax.ShapeDtypeStruct((4, 6), jnp.int32), prompts):
        found = plan(tiny_model, given)
        assert (found.tokens, found.cost.contractions) == ((4, 6), by_shape.cost.contractions)
    assert plan(tiny_model).tokens == (1, 24)  # as many as it has positions


def test_plan__of_a_folder__has_the_dtype_that_load_would_find(folder, tmp_path):
    loaded = mj.load(folder)[0]
    found = plan(str(folder), (2, 8))
    assert (found.dtype, found.name) == ("bfloat16", str(folder))
    assert found.param_bytes == sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert plan(folder, (2, 8), dtype="float32").param_bytes == 2 * found.param_bytes
    shutil.copy(folder / "config.json", tmp_path)  # as `fetch(weights=False)` leaves it
    assert plan(tmp_path, (2, 8)).dtype == "bfloat16"
    assert plan(loaded, (2, 8)).dtype == "bfloat16"


def test_plan__of_any_function_with_sites__works():
    def fn(tokens):
        x = mj.site(jnp.ones((*tokens.shape, 4)), "x", axes=("pos", "d_model"))
        return jax.lax.while_loop(lambda x: x.sum() < 99.0, lambda x: x * 2, x)

    found = plan(fn, (2, 3), capture="x")
    assert (found.n_params, found.captured_bytes, found.name) == (0, 4 * 2 * 3 * 4, "fn")
    assert "while loop" in repr(found)


def test_plan__printed__is_short_and_in_units(llama_70b):
    said = repr(plan(llama_70b, (8, 1024), capture="z", dtype="bfloat16"))
    assert "70.6 billion, 131 GiB in bfloat16" in said
    assert "8 × 1024 = 8,192" in said
    assert "PFLOP" in said and "10.0 GiB: z 10.0 GiB" in said
    assert len(said.splitlines()) < 20
    assert max(map(len, said.splitlines())) <= 110


def test_plan__as_a_record__has_rows_and_is_saved(tiny_model, tmp_path):
    found = plan(tiny_model, (4, 6), capture="z")
    assert found.rows()[0] == {
        "site": "embed", "shape": (4, 6, 16), "dtype": "float32", "bytes": 4 * 4 * 6 * 16, "on_request": False
    }  # fmt: skip
    assert found.top(1) == [("mlp_pre", 4.0 * 3 * 4 * 6 * 32)] or found.top(1)[0][1] >= 4.0 * 3 * 4 * 6 * 32
    assert mj.restore(mj.save(found, tmp_path / "plan")) == found


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ArgumentError, "dtype='int8' is no floating dtype"),
        ({"dtype": "flaot32"}, ArgumentError, "dtype='flaot32' is no floating dtype"),
        ({"dtype": "float64"}, ArgumentError, r"dtype='float64'.*\(float64 needs jax_enable_x64\)"),
        ({"mesh": (2, 4)}, ArgumentError, r"mesh=\(2, 4\) divides described devices, but none were named"),
        ({"tokens": (2, 0)}, ArgumentError, r"tokens=\(2, 0\) is no shape of tokens"),
        ({"tokens": "Mary"}, ArgumentError, "tokens must be a shape such as .* not a str"),
        ({"tokens": (1, 25)}, ShapeError, "25 tokens, but the model has 24 learned positions"),
        ({"chip": "v5e:2x4", "mesh": (3, 1), "tokens": (4, 6)}, ArgumentError, r"has 3 devices, chip='v5e:2x4' has 8"),
        ({"chip": "v5e:2x4", "mesh": (0, 8)}, ArgumentError, "all sizes must be positive"),
    ],
)  # fmt: skip
def test_plan__of_what_cannot_be__is_refused(tiny_model, options, error, message):
    with pytest.raises(error, match=message):
        plan(tiny_model, **options)
