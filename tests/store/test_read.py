"""Reading: each row once in an epoch, the same for a key, and from any place on; pairs and stacks of the same tokens."""

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, SiteError
from mechjax.dictionaries import TopK
from mechjax.dictlearn import train
from mechjax.store import Store
from tests.store import small

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def store(whole):
    return mj.store.read(whole[0])


def given(store, site="z", layer=2, **how):
    how = {"batch": 20, "key": KEY, "buffer": 60} | how
    return store.batches(site, layer=layer, **how)


def places(rows, every):
    """Which row of the store each is."""
    known = {row.tobytes(): i for i, row in enumerate(every)}
    assert len(known) == len(every)
    return [known[row.tobytes()] for row in rows]


@pytest.mark.parametrize("buffer", [20, 60, 1000])
def test_batches__have_each_row_once_in_an_epoch(store, buffer):
    every = store.rows(slice(None), "z", layer=2)
    batches = given(store, buffer=buffer, epochs=3)
    found = list(batches)
    assert batches.steps == len(found) == 3 * small.ROWS // 20
    assert all(x.shape == (20, 16) and x.dtype == np.float32 for x in found)
    rows = places(np.concatenate(found), every)
    for epoch in range(2):
        own = rows[epoch * small.ROWS : (epoch + 1) * small.ROWS]
        assert sorted(own) == list(range(small.ROWS))
        assert own != list(range(small.ROWS))
    last = rows[2 * small.ROWS :]
    assert len(set(last)) == len(last) == 720 - 2 * small.ROWS
    assert rows[: small.ROWS] != rows[small.ROWS : 2 * small.ROWS]


def test_batches__of_one_key__are_the_same_and_of_another_are_not(store):
    a, b, c = (np.concatenate(list(given(store, key=key))) for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any(1).mean() > 0.9
    raw = np.concatenate(list(given(store, key=jax.random.PRNGKey(0))))
    np.testing.assert_array_equal(a, raw)


def test_batches__without_a_key__are_in_the_order_of_writing(store):
    rows = np.concatenate(list(given(store, key=None, epochs=2)))
    every = store.rows(slice(None), "z", layer=2)
    np.testing.assert_array_equal(rows, np.tile(every, (2, 1))[: len(rows)])


def test_batches__from_any_place__go_on_to_the_bit(store):
    whole = list(given(store, epochs=2))
    for step in range(0, len(whole) + 1, 3):
        batches, again = given(store, epochs=2), given(store, epochs=2)
        for _ in range(step):
            next(batches)
        assert batches.step == step
        again.resume(batches.state())
        for found in (again, given(store, epochs=2).at(step), batches):
            np.testing.assert_array_equal(np.array(list(found)), np.array(whole[step:]))


def test_batches__of_another_place__are_refused(store, tiny_model, tmp_path):
    state = given(store).state()
    other = small.write(tmp_path, tiny_model, small.prompts(seed=9))
    for batches, said in [
        (given(other), r"store \w{12} \(now \w{12}\)"),
        (given(store, batch=30), r"batch 20 \(now 30\)"),
        (given(store, buffer=100), r"buffer \d+ \(now \d+\)"),
        (given(store, key=jax.random.key(1)), r"key \[0, 0\] \(now \[0, 1\]\)"),
        (given(store, key=None), r"shuffled True \(now False\), key \[0, 0\] \(now \[0\]\)"),
        (given(store, layer=0), r"columns \[3\] \(now \[2\]\)"),
        (given(store, layer=[2]), r"sides \[1, 0\] \(now \[1, 1\]\)"),
        (given(store, dtype="float16"), r"dtype float32 \(now float16\)"),
    ]:
        with pytest.raises(
            ArgumentError, match=rf"this place is one in other batches: {said}\. Read the same"
        ):
            batches.resume(state)
    with pytest.raises(ArgumentError, match=r"resume takes what `state\(\)` gave; this has no batch, buffer"):
        given(store).resume({"step": np.asarray(3)})
    with pytest.raises(ArgumentError, match="step 99: there are 0 to 12"):
        given(store).resume({**state, "step": np.asarray(99)})
    more = given(store, epochs=2)  # more epochs are no other place
    more.resume(state)
    assert len(list(more)) == 24


def test_batches__in_a_training_run_that_is_broken_off__go_on_to_the_same_weights(store, tmp_path):
    """`train` keeps the place with its checkpoints, and no batch is read to be passed over."""
    dictionary = TopK.init(d_model=16, n_features=32, k=4, key=KEY)
    run = lambda batches, folder, **how: train(
        dictionary, batches, steps=12, learning_rate=1e-2, key=KEY, steps_per_call=4, checkpoints=folder,
        save_every=4, **how,
    )  # fmt: skip
    expected = run(given(store), tmp_path / "whole").dictionary

    def breaks_off(step, measures):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(given(store), tmp_path / "again", tracker=breaks_off)
    batches = given(store)
    found = run(batches, tmp_path / "again").dictionary
    assert batches.step == 12
    np.testing.assert_array_equal(found.W_dec, expected.W_dec)
    np.testing.assert_array_equal(found.W_enc, expected.W_enc)


def test_batches__of_several_layers_and_a_target__are_of_the_same_tokens(store):
    every = {column: store.rows(slice(None), column[0], layer=column[1]) for column in small.COLUMNS}
    several = list(given(store, "resid_post", [2, 0], target=("z", 0)))
    assert all(x.shape == (20, 2, 16) and y.shape == (20, 16) for x, y in several)
    at = places(np.concatenate([y for _, y in several]), every["z", 0])
    for i, layer in enumerate([2, 0]):
        found = np.concatenate([x[:, i] for x, _ in several])
        np.testing.assert_array_equal(found, every["resid_post", layer][at])
    pairs = list(given(store, "resid_post", 0, target=("z", [0, 2])))
    assert pairs[0][0].shape == (20, 16) and pairs[0][1].shape == (20, 2, 16)


@pytest.mark.parametrize("name", ["blocks.2.attn.hook_z", "blocks.2.hook_resid_post"])
def test_store__answers_to_names_of_transformer_lens(store, name):
    site = "z" if "z" in name else "resid_post"
    np.testing.assert_array_equal(store.rows(slice(9), name), store.rows(slice(9), site, layer=2))


def test_rows__by_number__are_those_rows(store):
    every = store.rows(slice(None), "z", layer=0)
    at = np.array([240, 3, 3, -1, 51])
    np.testing.assert_array_equal(store.rows(at, "z", layer=0), every[at])
    np.testing.assert_array_equal(store.rows(slice(230, None, 4), "z", layer=0), every[230::4])
    both = store.rows(slice(10), "z", layer=[0, 2])
    np.testing.assert_array_equal(both[:, 0], every[:10])
    assert store.rows(slice(10), "z", layer=0, dtype="bfloat16").dtype.name == "bfloat16"


def test_store__of_one_column__need_not_be_told_which(tiny_model, tmp_path):
    small.write(tmp_path, tiny_model, sites="resid_post", layers=1)
    store = mj.store.read(tmp_path)
    assert store.rows(slice(None)).shape == (small.ROWS, 16)
    assert next(store.batches(batch=5, key=KEY)).shape == (5, 16)
    assert store.moments().count == len(store) == small.ROWS


def test_store__prints_what_it_holds(store):
    lines = repr(store).splitlines()
    assert lines[0].startswith("Store of 241 rows in 5 shards, float32, in ")
    assert lines[1:] == [f"  `{site}` of layer {layer}: 16 wide" for site, layer in small.COLUMNS]


def test_store__of_what_it_does_not_hold__says_what_it_does(store):
    for said, ask in [
        ("the store holds resid_post, z: say which site", lambda: store.rows(slice(1))),
        (r"the store holds `z` of layers \[0, 2\]: say which layer", lambda: store.moments("z")),
        (r"no layer \[1\] of `z` in the store; it holds \[0, 2\]", lambda: given(store, layer=1)),
        (r"no layer \[1\] of `z`", lambda: given(store, layer=[0, 1])),
        ("no `resid_pos` in the store; it holds resid_post, z. Did you mean `resid_post`",
         lambda: store.moments("resid_pos")),
    ]:  # fmt: skip
        with pytest.raises(SiteError, match=said):
            ask()
    for said, ask in [
        ("rows .* of a store of 241 rows: they are 0 to 240",
         lambda: store.rows(np.array([241]), "z", layer=0)),
        ("batch=0, buffer=60", lambda: given(store, batch=0)),
        ("batch=20, buffer=10, epochs=1: .* the buffer holds at least one batch", lambda: given(store, buffer=10)),
        ("epochs=0", lambda: given(store, epochs=0)),
        ("batch=300, and the store has 241 rows: ask for smaller", lambda: given(store, batch=300, buffer=None)),
        ("dtype='int8': one of float32, bfloat16, float16", lambda: given(store, dtype="int8")),
    ]:  # fmt: skip
        with pytest.raises(ArgumentError, match=said):
            ask()


def test_read__of_a_store_that_is_not_complete__is_refused_unless_asked_for(whole, tiny_model, tmp_path):
    def breaks_off():
        yield from small.prompts()[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.write(tmp_path, tiny_model, breaks_off())
    with pytest.raises(CheckpointError, match=r"not complete: writing broke off after 100 rows\. Call"):
        mj.store.read(tmp_path)
    store = mj.store.read(tmp_path, partial=True)
    assert isinstance(store, Store) and "not complete" in repr(store)
    np.testing.assert_array_equal(
        store.rows(slice(None), "z", layer=2), whole[1].rows(slice(100), "z", layer=2)
    )
