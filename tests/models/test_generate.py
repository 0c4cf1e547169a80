import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, NeedsDecoderError, ShapeError, SiteError, TokenError
from mechjax.models import Config, at_steps, init
from tests.tolerances import TOL

N_PROMPT, N_TOKENS = 6, 5
LAYOUT = TOL["float32", "layout"]


@pytest.fixture(scope="module")
def rich_model():
    config = Config(
        d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, norm="rms", positions="rotary",
        mlp="gated", activation="silu", tied=False, windows=(2, None, 4), attn_softcap=3.0,
    )  # fmt: skip
    model = init(config, key=jax.random.key(2))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(3), leaf.shape), model)


@pytest.fixture(scope="module")
def mask():
    """Padding nowhere, at the left, at the right, and within."""
    rows = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1]]
    return jnp.array(rows, bool)


@pytest.fixture(scope="module")
def prompts(tiny_tokens, mask):
    return mj.Prompts(tiny_tokens, mask)


def whole_run(model, out, edits=(), capture=()):
    """All tokens but the last through the plain model: logits of every generated token, and activations."""
    whole = out.whole
    tokens, real = whole.tokens[:, :-1], whole.mask[:, :-1]
    run = mj.run(model, tokens, mask=real, edits=edits, capture=capture)
    logits, acts = run if capture else (run, None)
    last = out.prompts.resolve(-1)
    first = jnp.take_along_axis(logits, last[:, None, None], 1)
    return jnp.concatenate([first, logits[:, N_PROMPT:]], 1), acts


def assert_greedy(out, logits):
    """The tokens are the likeliest of these logits, and so are their log-probabilities."""
    assert_array_equal(out.tokens, logits.argmax(-1))
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), out.tokens[..., None], -1)[..., 0]
    assert_allclose(out.log_probs, expected, **LAYOUT)


def test_greedy__padding_anywhere__is_the_argmax_of_a_growing_text(rich_model, prompts):
    out = mj.generate(rich_model, prompts, N_TOKENS)
    for row in (1, 2):
        text = prompts.tokens[row][prompts.mask[row]]  # without padding, and anew for every token
        for step in range(N_TOKENS):
            logits = rich_model(text[None])[0, -1]
            assert int(out.tokens[row, step]) == int(logits.argmax())
            assert_allclose(out.log_probs[row, step], jax.nn.log_softmax(logits).max(), **LAYOUT)
            text = jnp.append(text, logits.argmax())
    assert_array_equal(out.lengths, [N_TOKENS] * 4)
    assert len(np.unique(np.asarray(out.tokens))) > 3


def test_greedy__learned_positions__is_the_argmax_of_the_whole_text(tiny_model, prompts):
    out = mj.generate(tiny_model, prompts, N_TOKENS)
    assert_greedy(out, whole_run(tiny_model, out)[0])


@pytest.mark.slow
def test_one_token__and_one_prompt__work(tiny_model, tiny_tokens):
    many = mj.generate(tiny_model, tiny_tokens, 3, capture="resid_post")
    one = mj.generate(tiny_model, tiny_tokens, 1, capture="resid_post", edits=[mj.add("z", jnp.zeros(4))])
    assert_array_equal(one.tokens, many.tokens[:, :1])
    assert one.acts["resid_post"].shape == (3, 4, 0, 16)
    single = mj.generate(tiny_model, tiny_tokens[2].tolist(), 3, capture="resid_post")
    assert_array_equal(single.tokens, many.tokens[2])
    assert single.acts["resid_post"].shape == (3, 2, 16)


VECTOR = jnp.linspace(-2.0, 3.0, 16)
TRIPLED = lambda z, at: z * 3.0
EDITS = {
    "everywhere": (
        [mj.add("resid_post", VECTOR, layer=1), mj.scale("pattern", 0.5, head=2, layer=0),
         mj.add("attn_out", jnp.outer(jnp.arange(3.0), VECTOR), per_layer=True), mj.add("logits", jnp.arange(50.0) / 9),
         mj.apply("z", TRIPLED, layer=1)],
    ) * 2,
    "at positions": (
        [mj.zero("z", layer=1, head=[0, 3], pos=[2, 4]), mj.add("resid_pre", VECTOR, layer=0, pos=-2),
         mj.replace("resid_mid", VECTOR, layer=1, pos=N_PROMPT + 1), mj.add("mlp_out", VECTOR, layer=[0, 2], pos=[0, 5, 7, 8]),
         mj.add("attn_out", VECTOR, pos=jnp.arange(6) < 3),
         mj.add("q", 2.0, layer=0, pos=mj.per_example(jnp.array([1, 7, 3, 9])))],
        [mj.zero("z", layer=1, head=[0, 3], pos=[2, 4]), mj.add("resid_pre", VECTOR, layer=0, pos=N_PROMPT - 2),
         mj.replace("resid_mid", VECTOR, layer=1, pos=N_PROMPT + 1), mj.add("mlp_out", VECTOR, layer=[0, 2], pos=[0, 5, 7, 8]),
         mj.add("attn_out", VECTOR, pos=[0, 1, 2]),
         mj.add("q", 2.0, layer=0, pos=mj.per_example(jnp.array([1, 7, 3, 9])))],
    ),
    "at steps": (
        [at_steps([mj.add("resid_post", VECTOR, layer=1), mj.clamp("mlp_post", 0.0)], [0, 2]),
         at_steps(mj.add("attn_scores", 3.0, layer=2, key=-1), range(1, 4)),
         at_steps(mj.project_out("resid_post", VECTOR, layer=0), 3)],
        [mj.add("resid_post", VECTOR, layer=1, pos=[6, 8]), mj.clamp("mlp_post", 0.0, pos=[6, 8]),
         mj.add("attn_scores", 3.0, layer=2, key=5, query=[7, 8, 9]),
         mj.project_out("resid_post", VECTOR, layer=0, pos=9)],
    ),
}  # fmt: skip
"""Name -> the edits of a generation, and the same edits of a call of the model on the whole text."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "at steps")) for name in EDITS]
)
def test_edits__and_captures__equal_the_whole_run(rich_model, prompts, name):
    edits, same = EDITS[name]
    sites = ["resid_post", "pattern", "k", "result", "ln_final.scale"]
    out = mj.generate(rich_model, prompts, N_TOKENS, edits=edits, capture=sites)
    logits, acts = whole_run(rich_model, out, same, sites)
    assert_greedy(out, logits)
    plain = mj.generate(rich_model, prompts, N_TOKENS)
    assert jnp.abs(out.log_probs - plain.log_probs).max() > 1e-4
    for site in sites:
        place = 3 if site == "pattern" else acts[site].ndim - len(acts.axes[site])
        assert out.acts.axes[site] == acts.axes[site]
        assert out.acts.layers == acts.layers
        both = jnp.concatenate([out.prompt_acts[site], out.acts[site]], place)
        assert_allclose(both, acts[site], **LAYOUT)


@pytest.mark.slow
def test_value__with_a_row_per_slot__acts_on_the_prompts(rich_model, tiny_tokens):
    _, acts = mj.capture(rich_model, ["resid_post", "z"])(jnp.flip(tiny_tokens, 0))
    edits = [mj.replace("resid_post", acts, layer=0), mj.replace("z", acts["z"][1], layer=1, head=2, pos=-1)]
    out = mj.generate(rich_model, tiny_tokens, N_TOKENS, edits=edits)
    padded = jnp.pad(acts["resid_post"][0], ((0, 0), (0, 4), (0, 0)))
    same = [mj.replace("resid_post", padded, layer=0, pos=list(range(6))),
            mj.replace("z", acts["z"][1][:, 5:6], layer=1, head=2, pos=5)]  # fmt: skip
    assert_greedy(out, whole_run(rich_model, out, same)[0])


@pytest.mark.slow
def test_sweep__vmap_over_edits__equals_a_loop(rich_model, tiny_tokens):
    def swept(strength, layer, step):
        edits = [
            mj.add("resid_post", strength * VECTOR, layer=layer),
            at_steps(mj.zero("z", layer=layer), step),
        ]
        out = mj.generate(rich_model, tiny_tokens, N_TOKENS, edits=edits)
        return out.tokens, out.log_probs

    cells = [(0.0, 0, 3), (1.0, 2, 0), (-2.0, 1, 1)]
    tokens, log_probs = jax.vmap(swept)(*map(jnp.array, zip(*cells, strict=True)))
    assert len({row.tobytes() for row in np.asarray(tokens)}) == 3
    for cell, ours, theirs in zip(cells, tokens, log_probs, strict=True):
        one = swept(*cell)
        assert_array_equal(ours, one[0])
        assert_allclose(theirs, one[1], **LAYOUT)


def test_new_numbers__of_every_kind__never_compile_again(tiny_model, tiny_tokens, prompts, caplog):
    def run(i, given):
        edits = [mj.add("resid_post", i * VECTOR, layer=i, pos=[i, 6 + i]),
                 at_steps(mj.zero("z", layer=i, head=i), [i])]  # fmt: skip
        mj.generate(tiny_model, given, 4, key=jax.random.key(i), temperature=0.5 + i, top_k=3 + i,
                    top_p=0.9 - i / 10, stop=[i, i + 3], edits=edits, capture="z")  # fmt: skip

    run(0, tiny_tokens)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(1, jnp.flip(tiny_tokens, 1))
        run(2, prompts)
    assert not [line for line in caplog.messages if "_generated" in line]


def test_jit__of_a_users_own__gives_the_same(tiny_model, tiny_tokens):
    edits = [mj.add("resid_post", VECTOR, layer=1)]
    ours = eqx.filter_jit(mj.generate)(tiny_model, tiny_tokens, 4, edits=edits)
    assert_array_equal(ours.tokens, mj.generate(tiny_model, tiny_tokens, 4, edits=edits).tokens)


@pytest.mark.slow
def test_gradient__of_log_probabilities__equals_the_whole_runs(tiny_model, tiny_tokens):
    def ours(vector):
        edit = mj.add("resid_pre", vector, layer=1)
        return mj.generate(tiny_model, tiny_tokens, N_TOKENS, edits=[edit]).log_probs.sum()

    out = mj.generate(tiny_model, tiny_tokens, N_TOKENS, edits=[mj.add("resid_pre", VECTOR, layer=1)])

    def theirs(vector):
        logits, _ = whole_run(tiny_model, out, [mj.add("resid_pre", vector, layer=1)])
        return jnp.take_along_axis(jax.nn.log_softmax(logits), out.tokens[..., None], -1).sum()

    assert_allclose(jax.grad(ours)(VECTOR), jax.grad(theirs)(VECTOR), **TOL["float32", "gradient"])


@pytest.mark.slow
def test_stop__ends_rows__and_fills_them_up(rich_model, prompts):
    free = mj.generate(rich_model, prompts, N_TOKENS)
    stop = [int(free.tokens[1, 0]), int(free.tokens[2, 2])]
    out = mj.generate(rich_model, prompts, N_TOKENS, stop=stop)
    for row in range(4):
        tokens = free.tokens[row].tolist()
        ends = next((i + 1 for i, token in enumerate(tokens) if token in stop), N_TOKENS)
        assert int(out.lengths[row]) == ends
        assert out.tokens[row].tolist() == tokens[:ends] + [stop[0]] * (N_TOKENS - ends)
        assert_allclose(out.log_probs[row, :ends], free.log_probs[row, :ends], **LAYOUT)
        assert not out.log_probs[row, ends:].any()
        assert out.whole.mask[row, 6:].tolist() == [step < ends for step in range(N_TOKENS)]
    assert int(out.lengths.min()) == 1 < int(out.lengths.max())
    every = mj.generate(rich_model, prompts, N_TOKENS, stop=list(range(50)), capture="resid_post")
    assert_array_equal(every.lengths, [1] * 4)
    assert jnp.isnan(every.acts["resid_post"]).all()  # no row went on, so nothing ran
    assert not every.acts.ran["resid_post"].any()


@pytest.mark.slow
def test_sampling__same_key__same_tokens(tiny_model, prompts):
    draw = lambda key, n=8, **how: mj.generate(tiny_model, prompts, n, key=jax.random.key(key), **how).tokens
    first = draw(0, temperature=1.0)
    assert_array_equal(first, draw(0, temperature=1.0))
    assert_array_equal(first[:, :3], draw(0, 3, temperature=1.0))
    assert (first != draw(1, temperature=1.0)).any()
    greedy = mj.generate(tiny_model, prompts, 8).tokens
    assert (first != greedy).any()
    assert_array_equal(draw(0, temperature=0.0), greedy)
    assert_array_equal(draw(0, temperature=1.0, top_k=1), greedy)
    assert_array_equal(draw(0, temperature=1.0, top_p=1e-6), greedy)


def test_log_probs__of_drawn_tokens__are_the_models_own(rich_model, tiny_tokens):
    out = mj.generate(rich_model, tiny_tokens, N_TOKENS, key=jax.random.key(4), temperature=2.0, top_k=9)
    logits = whole_run(rich_model, out)[0]
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), out.tokens[..., None], -1)[..., 0]
    assert_allclose(out.log_probs, expected, **LAYOUT)


def test_text__through_a_tokenizer__leaves_stop_and_padding_out():
    model, tokenizer = mj.load("tasks-4l")
    given = tokenizer(["When Mary and John went to the store, John gave a ring to", "When Mary and John"])
    out = mj.generate(model, given, 3)
    texts = out.text(tokenizer)
    assert texts[0].strip().startswith("Mary")
    single = mj.generate(model, tokenizer("When Mary and John"), 3)
    assert single.text(tokenizer) == texts[1]
    stopped = mj.generate(model, given, 3, stop=int(out.tokens[0, 0]))
    assert stopped.text(tokenizer)[0] == ""
    assert tokenizer.decode(stopped.whole)[0] == tokenizer.decode(given)[0] + " Mary"


def test_record__saved__comes_back(tiny_model, prompts, tmp_path):
    out = mj.generate(tiny_model, prompts, 3, stop=4, capture="z")
    again = mj.restore(mj.save(out, tmp_path / "out"))
    assert_array_equal(again.tokens, out.tokens)
    assert_array_equal(again.acts["z"], out.acts["z"])
    assert len(repr(out).splitlines()) < 20


@pytest.mark.slow
def test_edit__that_never_took_hold__is_not_silent(tiny_model, tiny_tokens):
    def run(edits, **how):
        return mj.generate(tiny_model, tiny_tokens, 4, edits=edits, **how)

    def log_probs(index, make):
        return eqx.filter_jit(lambda i: run([make(i)]).log_probs)(jnp.asarray(index))

    by_layer = lambda i: mj.add("resid_post", VECTOR, layer=i)
    by_pos = lambda i: mj.add("resid_post", VECTOR, pos=i)
    by_step = lambda i: at_steps(mj.add("resid_post", VECTOR), i)
    for make, good, bad in (
        (by_layer, 2, 3),
        (by_pos, 8, 9),
        (by_pos, -6, -7),
        (by_step, 2, 3),
        (by_step, 0, -1),
    ):
        assert jnp.isfinite(log_probs(good, make)).all()
        assert jnp.isnan(log_probs(bad, make)).all()
    ended = at_steps(mj.add("resid_post", VECTOR), 2)
    with pytest.raises(Exception, match=r"an edit never took hold .* step that was not run"):
        jax.block_until_ready(run([ended], stop=list(range(50))).tokens)
    allowed = at_steps(mj.add("resid_post", VECTOR, on_miss="allow"), 2)
    assert jnp.isfinite(run([allowed], stop=list(range(50))).log_probs).all()


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda: mj.add("resid_post", VECTOR, pos=9), SiteError,
         r"pos 9 is out of range: 0 to 8 are there, of which the last 3 are the generated tokens that run"),
        (lambda: mj.add("resid_post", VECTOR, pos=-7), SiteError, r"pos -1 is out of range|pos -7 is out of range"),
        (lambda: at_steps(mj.zero("z"), 3), SiteError, r"at_steps: `zero` at `z`, step 3 is out of range: 0 to 2"),
        (lambda: mj.zero("z", layer=3), SiteError, "layer 3 is out of range"),
        (lambda: at_steps(mj.zero("z", layer=3), 0), SiteError, "layer 3 is out of range"),
        (lambda: mj.zero("zz"), SiteError, "no site is named `zz`"),
        (lambda: mj.add("z", jnp.ones(7)), ShapeError, r"a value of shape \(7,\) does not fit site `z`"),
        (lambda: mj.add("resid_post", jnp.ones((6, 16)), pos=[1, 7]), ShapeError,
         r"its value has a row for each of the prompts' 6 slots, and says nothing of generated tokens"),
        (lambda: mj.zero("resid_post", pos=np.array([0, 1, 2, 7])), ShapeError, "One per example is"),
        (lambda: "z", ArgumentError, "generate takes edits such as .* got str"),
    ],
)  # fmt: skip
def test_edit__that_cannot_be__is_refused(tiny_model, tiny_tokens, as_a_user, edit, error, message):
    with pytest.raises(error, match=message):
        mj.generate(tiny_model, tiny_tokens, 4, edits=[edit()])


def test_at_steps__that_contradicts_itself__is_refused(as_a_user):
    with pytest.raises(ArgumentError, match="already says where with `pos=`, and `steps` says it again"):
        at_steps(mj.zero("z", pos=1), 2)
    with pytest.raises(ShapeError, match="`steps` must be one integer or a list of them, got bool"):
        at_steps(mj.zero("z"), jnp.ones(3, bool))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n_tokens": 0}, ArgumentError, "`n_tokens` = 0 must be a whole number from 1"),
        ({"n_tokens": 20}, ShapeError, r"need 25 positions; the model has learned 24 \(`n_ctx`\)"),
        ({"temperature": 1.0}, ArgumentError, "draws tokens at random, and there is no `key`. Give one"),
        ({"temperature": -1.0}, ArgumentError, "`temperature` = -1.0 must be one finite number from 0"),
        ({"top_p": 0.9}, ArgumentError, "`temperature` = 0 draws none: it takes the most likely token"),
        (
            {"temperature": 1.0, "key": 0, "top_k": 0},
            ArgumentError,
            "`top_k` = 0 must be a whole number from 1",
        ),
        (
            {"temperature": 1.0, "key": 0, "top_p": 1.5},
            ArgumentError,
            "`top_p` = 1.5 must be a number above 0",
        ),
        (
            {"stop": 50},
            ArgumentError,
            r"`stop` = \[50\] has an id that is no token: the model has 50, 0 to 49",
        ),
        ({"stop": []}, ArgumentError, r"`stop` = \[\] must be one token id or a list of them"),
        (
            {"mask": jnp.ones((4, 6), bool).at[2].set(False)},
            ShapeError,
            "Prompt 2 has no token to go on from",
        ),
        ({"capture": "nowhere"}, SiteError, "no site is named `nowhere`"),
    ],
)
def test_arguments__out_of_range__are_refused(tiny_model, tiny_tokens, as_a_user, given, error, message):
    arguments = {"n_tokens": 4} | given
    if "key" in arguments:
        arguments["key"] = jax.random.key(0)
    with pytest.raises(error, match=message):
        mj.generate(tiny_model, tiny_tokens, **arguments)


def test_model__that_is_edited_already__is_refused(tiny_model, tiny_tokens, as_a_user):
    edited = mj.intervene(tiny_model, mj.zero("z"))
    with pytest.raises(
        NeedsDecoderError,
        match=r"`generate` takes a model itself, and got one inside of `intervene`.*`edits=`",
    ):
        mj.generate(edited, tiny_tokens, 2)


def test_logits__that_are_nan__choose_no_token(tiny_model, tiny_tokens):
    broken = eqx.tree_at(lambda m: m.W_E, tiny_model, tiny_model.W_E.at[7].set(jnp.nan))
    out = mj.generate(broken, tiny_tokens, 3)
    assert (out.tokens == -1).all()
    assert jnp.isnan(out.log_probs).all()
    _, tokenizer = mj.load("tasks-4l")
    with pytest.raises(
        TokenError, match=r"No token was chosen at \[0, 0\] \(row, step\): the model's logits"
    ):
        out.text(tokenizer)


def test_program__of_the_steps__updates_the_cache_in_place(tiny_model, tiny_tokens):
    """No copy of the whole cache inside the loop: keys and values are (3, 4, 40, 4, 4)."""
    text = eqx.filter_jit(mj.generate).lower(tiny_model, tiny_tokens[:, :1], 20).compile().compiled.as_text()
    lines = [line for line in text.splitlines() if "f32[3,4,20,4,4]" in line.partition("=")[2].split("(")[0]]
    assert any("dynamic-update-slice" in line for line in lines)
    inside = [line for line in lines if " copy(" in line and "while/body" in line]
    assert inside == []
