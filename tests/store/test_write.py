"""Writing: that rows are the model's, from one program, and that breaking off changes nothing."""

import importlib
import json
import resource
import weakref
from contextlib import contextmanager
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, SiteError, WriteError
from mechjax.store import manifest as manifests
from mechjax.store.lock import sole_writer
from mechjax.text import pack
from tests.compilations import nothing_compiles
from tests.store import small
from tests.text.bytewise import bytewise
from tests.tolerances import TOL

writing = importlib.import_module("mechjax.store.write")  # whose function has its name


def test_write__several_sites_and_layers__are_what_a_loop_captures(whole, tiny_model):
    _, store = whole
    assert [(x.site, x.layer) for x in store.columns] == small.COLUMNS
    assert len(store) == small.ROWS and len(store.manifest.shards) == 5
    for (site, layer), rows in small.expected(tiny_model).items():
        np.testing.assert_allclose(
            store.rows(slice(None), site, layer=layer), rows, **TOL["float32", "parity"]
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_write__in_half_precision__rounds_each_number(whole, tiny_model, tmp_path, dtype):
    store = small.write(tmp_path / "half", tiny_model, dtype=dtype)
    for site, layer in small.COLUMNS:
        exact = whole[1].rows(slice(None), site, layer=layer)
        rounded = exact.astype(mj.store.rows.NUMPY[dtype])
        stored = store.rows(slice(None), site, layer=layer, dtype=dtype)
        assert stored.dtype == rounded.dtype
        assert (stored != rounded).mean() < 0.01  # another program's last bit may fall on the other side
        np.testing.assert_allclose(
            stored.astype(np.float32), rounded.astype(np.float32), **TOL["bfloat16", "parity"]
        )
        assert (exact != stored.astype(np.float32)).mean() > 0.5


def test_write__without_first_tokens__leaves_them_out(tiny_model, tmp_path):
    store = small.write(tmp_path / "rest", tiny_model, skip_first=True)
    expected = small.expected(tiny_model, skip_first=True)["z", 2]
    np.testing.assert_allclose(store.rows(slice(None), "z", layer=2), expected, **TOL["float32", "parity"])
    assert len(store) == small.ROWS - 4 * 10 - 2


def test_write__of_other_prompts_and_fewer__runs_the_same_program(whole, tiny_model, tmp_path, caplog):
    """The last batch, which is smaller, too: it is filled up, and what fills it gives no rows."""
    with nothing_compiles(caplog):
        store = small.write(tmp_path / "other", tiny_model, small.prompts(seed=4))
    assert len(store) == small.ROWS


def test_write__at_once_or_again__has_the_same_files(whole, tiny_model, tmp_path):
    folder, store = whole
    small.write(tmp_path / "again", tiny_model)
    assert small.files(tmp_path / "again") == small.files(folder)
    before = small.stamps(folder)
    assert small.write(folder, tiny_model).manifest == store.manifest  # nothing is left to do
    assert small.stamps(folder) == before


def stopping(monkeypatch, name, left):
    """Calls of a function until it raises, for each of several runs."""
    real, calls = getattr(writing, name), []

    def stops(*args):
        if not left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        left[0] -= 1
        calls.append(args[2:4])
        return real(*args)

    monkeypatch.setattr(writing, name, stops)
    return calls


@pytest.mark.parametrize(
    ("name", "left"), [("write_shard", [1, 6, 0, 5, 2]), ("write_manifest", [0, 2, 0, 1])]
)
def test_write__stopped_anywhere__goes_on_to_the_same_files(
    whole, tiny_model, tmp_path, monkeypatch, name, left
):
    folder, stops = tmp_path / "stopped", len(left)
    with monkeypatch.context() as patched:
        calls = stopping(patched, name, left)
        kept = {}
        for _ in range(stops):
            with pytest.raises(KeyboardInterrupt):
                small.write(folder, tiny_model)
            if (folder / manifests.NAME).exists():
                done = manifests.read_manifest(folder)
                assert kept.items() <= small.stamps(folder).items()  # what was done is never done again
                kept = {
                    k: v for k, v in small.stamps(folder).items() if int(k.split("/")[2]) < len(done.shards)
                }
                assert len(mj.store.read(folder, partial=True)) == small.SHARD * len(done.shards)
    assert calls
    small.write(folder, tiny_model)
    assert kept.items() <= small.stamps(folder).items()
    assert small.files(folder) == small.files(whole[0])


def broken_off(folder, model, monkeypatch, some=None, shards=2, **changed):
    """A store of which so many shards are written, the second of which ends within a batch."""
    with monkeypatch.context() as patched:
        stopping(patched, "write_manifest", [shards + 1])
        with pytest.raises(KeyboardInterrupt):
            small.write(folder, model, some, **changed)
    return manifests.read_manifest(folder)


def test_write__of_another_specification__is_refused_with_what_differs(
    whole, tiny_model, tmp_path, monkeypatch
):
    other = eqx.tree_at(lambda m: m.W_E, tiny_model, tiny_model.W_E + 1)
    for changed, said in [
        (
            {"sites": ["resid_post"]},
            r"`columns` is `resid_post` of layer 0, .*`z` of layer 2 there and `resid_post`",
        ),
        ({"layers": [0, 1]}, "`columns` is .* there and .* here"),
        ({"dtype": "bfloat16"}, '`dtype` is "float32" there and "bfloat16" here'),
        ({"shard_rows": 100}, "`shard_rows` is 50 there and 100 here"),
        ({"rows": 100}, "`rows` is null there and 100 here"),
        ({"skip_first": True}, "`skip_first` is false there and true here"),
        ({"not_finite": "skip"}, '`not_finite` is "abort" there and "skip" here'),
        ({"source": "the pile"}, '`source` is null there and "the pile" here'),
        ({"tokenizer": bytewise()}, r"`tokenizer` is null there and that of checksum \w{12} here"),
        (
            {"model": other},
            r"`weights` is that of checksum \w{12} there and that of checksum \w{12} here\. Go on",
        ),
    ]:
        with pytest.raises(ArgumentError, match=f"is another store: .*{said}"):
            small.write(whole[0], changed.pop("model", tiny_model), **changed)


def test_write__of_other_prompts__is_refused_where_they_differ(tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    end = broken_off(folder, tiny_model, monkeypatch).end
    assert (end.batches, end.rows) == (4, 4)
    early, late = small.prompts(), small.prompts()
    early[1], late[4] = small.prompts(seed=5)[1], small.prompts(seed=5)[4]
    with pytest.raises(ArgumentError, match="they differ within the first 4 batches"):
        small.write(folder, tiny_model, early)
    with pytest.raises(ArgumentError, match="they differ in batch 5"):
        small.write(folder, tiny_model, late)
    with pytest.raises(ArgumentError, match="the prompts end after 2 batches, and 4 are in the store"):
        small.write(folder, tiny_model, early[:2])
    same = small.prompts()
    same[4] = mj.Prompts(same[4].tokens.at[0, 3:].set(7), same[4].mask)  # what padding holds is nothing
    assert len(small.write(folder, tiny_model, same)) == small.ROWS


@pytest.fixture(scope="module")
def texts():
    """Texts of letters, a tokenizer for them, and a model that reads it."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc "), size=rng.integers(3, 30))) + "x" for _ in range(60)]
    tokenizer = bytewise()
    config = mj.models.Config(
        d_vocab=tokenizer.backend.get_vocab_size(), n_ctx=12, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2,
        d_head=4, d_mlp=8,
    )  # fmt: skip
    return texts, tokenizer, mj.init(config, key=jax.random.key(0))


def test_write__of_packed_texts__goes_on_where_the_texts_were(texts, tmp_path, monkeypatch):
    """The place is the packing's own: what was read is not read again. Positions are the packing's, too."""
    lines, tokenizer, model = texts
    packed = lambda: pack(lines, tokenizer, length=12, batch=4, buffer=8, restart_positions=True)
    how = {"sites": "resid_pre", "layers": 0, "tokenizer": tokenizer}
    expected = small.write(tmp_path / "whole", model, packed(), **how).rows(slice(None))
    batches = list(packed())
    by_hand = [
        np.asarray(model.W_E[b.tokens] + model.W_pos[b.positions])[np.asarray(b.mask)] for b in batches
    ]
    np.testing.assert_allclose(expected, np.concatenate(by_hand), **TOL["float32", "parity"])
    done = broken_off(tmp_path / "stopped", model, monkeypatch, packed(), **how).end
    assert done.batches >= 2
    taken, again = [], packed()
    real = type(again).__next__
    monkeypatch.setattr(type(again), "__next__", lambda self: taken.append(1) or real(self))
    rows = small.write(tmp_path / "stopped", model, again, **how).rows(slice(None))
    np.testing.assert_array_equal(rows, expected)
    assert len(taken) == len(batches) - done.batches + 1  # and one that says that there are no more


def test_write__of_prompts_whose_place_is_no_json__is_refused(tiny_model, tmp_path):
    class Odd(list):
        def state(self):
            return {"place": object()}

        def restore(self, state):
            pass

    with pytest.raises(ArgumentError, match=r"`state\(\)` of the prompts gives what is no JSON"):
        small.write(tmp_path, tiny_model, Odd(small.prompts()))


@pytest.mark.parametrize("rows", [100, 130])
def test_write__of_so_many_rows__ends_there(whole, tiny_model, tmp_path, rows):
    store = small.write(tmp_path / "some", tiny_model, rows=rows)
    assert len(store) == rows and store.manifest.complete
    first = whole[1].rows(slice(rows), "z", layer=0)
    np.testing.assert_array_equal(store.rows(slice(None), "z", layer=0), first)
    assert not mj.store.verify(tmp_path / "some").problems


def test_write__of_no_prompts__is_a_store_without_rows(tiny_model, tmp_path):
    store = small.write(tmp_path / "empty", tiny_model, [])
    assert len(store) == 0 and len(mj.store.read(tmp_path / "empty")) == 0
    with pytest.raises(ArgumentError, match="batch=1, and the store has 0 rows"):
        store.batches("z", layer=0, batch=1, key=None)


@pytest.fixture(scope="module")
def wild(tiny_model):
    """A model that gives NaN, and numbers past the end of float16, at two tokens."""
    W = tiny_model.W_E.at[7].set(jnp.nan).at[8].set(1e5)
    return eqx.tree_at(lambda m: m.W_E, tiny_model, W)


def wild_prompts():
    some = [p.tokens % 7 for p in small.prompts()[:4]]
    some[2] = some[2].at[1, 5].set(7).at[3, 5].set(8)  # at the end of texts, so that no other token sees them
    return some


def test_write__of_what_is_not_finite__stops_and_says_where(wild, tmp_path):
    how = {"sites": ["embed", "resid_pre"], "layers": 0}
    with pytest.raises(
        ArgumentError,
        match=r"`embed` is not finite as float32 in batch 3 of the prompts, example 1, position 5\. The shards",
    ):
        small.write(tmp_path / "nan", wild, wild_prompts(), shard_rows=24, **how)
    assert len(mj.store.read(tmp_path / "nan", partial=True)) == 48
    some = wild_prompts()
    some[2] = some[2].at[1, 5].set(0)
    with pytest.raises(
        ArgumentError, match=r"example 3, position 5\. float16 ends at 65504: bfloat16 and float32"
    ):
        small.write(tmp_path / "far", wild, some, dtype="float16", **how)


def test_write__of_what_is_not_finite__leaves_it_out_of_all_columns_and_counts(wild, tmp_path, monkeypatch):
    how = {"sites": ["embed", "resid_pre"], "layers": 0, "not_finite": "skip", "dtype": "float16"}
    store = small.write(tmp_path / "some", wild, wild_prompts(), **how)
    assert (len(store), store.manifest.skipped) == (94, 2)
    kept = np.concatenate(wild_prompts()).reshape(-1)
    embed = store.rows(slice(None), "embed", dtype="float16")
    np.testing.assert_array_equal(embed, np.asarray(wild.W_E.astype(jnp.float16))[kept[kept < 7]])
    assert len(store.rows(slice(None), "resid_pre")) == 94
    assert "2 rows were not finite and left out" in repr(store)
    broken_off(tmp_path / "again", wild, monkeypatch, wild_prompts(), shards=1, **how)
    assert small.write(tmp_path / "again", wild, wild_prompts(), **how).manifest == store.manifest


@contextmanager
def files_of_at_most(size):
    """A disk that is full once a file has so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["write_shard", "write_manifest"])
def test_write__to_a_full_disk__loses_nothing_and_says_where_it_goes_on(
    whole, tiny_model, tmp_path, monkeypatch, name
):
    folder, real, calls = tmp_path / "full", getattr(writing, name), []
    last = {"write_shard": 10, "write_manifest": 3}[
        name
    ]  # in the third shard, two columns of which are written

    def fills(*args):
        calls.append(name)
        if len(calls) <= last:
            return real(*args)
        with files_of_at_most(1000):
            return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(writing, name, fills)
        with pytest.raises(
            WriteError,
            match=r"shard 2 was not stored: cannot write .*(File too large|File name).* The 2 shards before it "
            r"\(100 rows\) are whole\. Make room.*it goes on behind batch 4 of the prompts",
        ):
            small.write(folder, tiny_model)
    assert set(small.stamps(folder)) == {f"array-00{i}/c/{j}/0" for i in range(4) for j in range(2)}
    assert not [path for path in small.files(folder) if ".saving" in path or "lock" in path]
    np.testing.assert_array_equal(
        mj.store.read(folder, partial=True).rows(slice(None), "z", layer=2),
        whole[1].rows(slice(100), "z", layer=2),
    )
    small.write(folder, tiny_model)
    assert small.files(folder) == small.files(whole[0])


def test_write__where_nothing_can_be_written__says_so(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WriteError, match=r"cannot write to `.*file/store`: Not a directory. Choose a folder that can"
    ):
        small.write(tmp_path / "file" / "store", tiny_model)
    if Path("/proc/self").exists():
        with pytest.raises(
            WriteError, match="cannot write to `/proc/store`"
        ):  # which nobody may, not even root
            small.write("/proc/store", tiny_model)


def test_write__to_a_folder_of_other_files__is_refused(tiny_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ArgumentError, match=r"holds no store, but other files \(thesis.txt\)"):
        small.write(tmp_path, tiny_model)


def test_write__by_two__is_refused(tiny_model, tmp_path):
    with sole_writer(tmp_path), pytest.raises(WriteError, match="is being written to by another process"):
        small.write(tmp_path, tiny_model)


def test_write__goes_on__only_where_its_shards_are(tiny_model, tmp_path, monkeypatch):
    broken_off(tmp_path, tiny_model, monkeypatch)
    (tmp_path / "array-001" / "c" / "1" / "0").unlink()
    with pytest.raises(CheckpointError, match=r"shard 1 of `resid_post` of layer 2 in .* is missing"):
        small.write(tmp_path, tiny_model)


def test_write__of_what_cannot_be__says_what_can(tiny_model, tmp_path):
    for error, said, changed in [
        (SiteError, "no site is named `residual`", {"sites": "residual"}),
        (SiteError, "layer", {"layers": [0, 3]}),
        (SiteError, r"`pattern` has the axes \(head, query, key\): a row is what a site has at one position",
         {"sites": "pattern"}),
        (SiteError, "`z` of layer 1 is asked for twice|twice", {"sites": "z", "layers": [1, 1]}),
        (ArgumentError, "dtype='float64', not_finite='abort': dtype is one of float32, bfloat16, float16",
         {"dtype": "float64"}),
        (ArgumentError, "shard_rows=0, rows=None: both are 1 or more", {"shard_rows": 0}),
    ]:  # fmt: skip
        with pytest.raises(error, match=said):
            small.write(tmp_path / "store", tiny_model, **changed)
    assert not (tmp_path / "store").exists()


def test_write__of_many_rows__holds_no_more_than_two_shards(tiny_model, tmp_path, monkeypatch):
    real, shards, most = writing.shards_from, [], []

    def watched(*args):
        for shard in real(*args):
            shards.append(weakref.ref(shard.columns[0].base))
            most.append(sum(rows() is not None for rows in shards))
            yield shard
            del shard

    monkeypatch.setattr(writing, "shards_from", watched)
    small.write(tmp_path, tiny_model, shard_rows=10)
    assert len(most) == 25 and max(most) <= 2


def crc32c(data):
    """CRC-32C bit by bit: the reflected Castagnoli polynomial of RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_write__files__are_what_the_specification_of_zarr_says(whole):
    """By hand: chunks, each with its CRC-32C, then an index of their places, with its own."""
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the standard
    folder, store = whole
    page = json.loads((folder / "array-001" / "zarr.json").read_text())
    (sharding,) = page["codecs"]
    chunk, width = sharding["configuration"]["chunk_shape"]
    assert page["shape"] == [small.ROWS, 16] and page["attributes"] == {"site": "resid_post", "layer": 2}
    rows = []
    for shard in range(5):
        data = (folder / "array-001" / "c" / str(shard) / "0").read_bytes()
        index = data[-16 * (small.SHARD // chunk) - 4 :]
        assert crc32c(index[:-4]) == int.from_bytes(index[-4:], "little")
        for start, size in np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist():
            if start < 2**64 - 1:
                own = data[start : start + size]
                assert crc32c(own[:-4]) == int.from_bytes(own[-4:], "little")
                rows.append(np.frombuffer(own[:-4], "<f4").reshape(chunk, width))
    found = np.concatenate(rows)[: small.ROWS]
    np.testing.assert_array_equal(found, store.rows(slice(None), "resid_post", layer=2))
