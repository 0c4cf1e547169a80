"""Damage: every flipped bit names its shard, and what is not whole is written again, and that alone."""

import random

import equinox as eqx
import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.store import capturing
from mechjax.store.arrays import Columns
from mechjax.store.lock import sole_writer
from mechjax.store.manifest import read_manifest
from tests.store import small
from tests.tolerances import TOL

SHARDS = 5


def shard(folder, column, number):
    return folder / f"array-{column:03d}" / "c" / str(number) / "0"


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_verify__of_what_was_written__finds_nothing(whole):
    found = mj.store.verify(whole[0])
    assert found.whole.all() and found.whole.shape == (SHARDS, 4)
    assert (found.damaged, found.problems) == ((), ())
    assert found.rows()[5]["column"] == "`resid_post` of layer 2"


@pytest.mark.parametrize("seed", range(4))
def test_verify__of_any_flipped_bits__names_their_shards(copied, seed):
    """Bits of rows, of checksums, of the index and of what fills the last chunk up."""
    rng = random.Random(seed)
    for _ in range(6):
        chosen = sorted(rng.sample(list(np.ndindex(SHARDS, 4)), rng.randint(1, 12)))
        bits = {(n, c): rng.randrange(8 * shard(copied, c, n).stat().st_size) for n, c in chosen}
        for (number, column), bit in bits.items():
            flip(shard(copied, column, number), bit)
        found = mj.store.verify(copied)
        assert [tuple(place) for place in np.argwhere(~found.whole).tolist()] == chosen
        for (number, column), problem in zip(chosen, found.problems, strict=True):
            assert "shard {} of `{}` of layer {} in ".format(number, *small.COLUMNS[column]) in problem
        for (number, column), bit in bits.items():
            flip(shard(copied, column, number), bit)
    assert not mj.store.verify(copied).problems


def test_verify__of_each_byte__finds_a_flipped_bit_of_it(copied):
    """All of the shortest shard: no byte is without a checksum."""
    path, manifest = shard(copied, 2, 4), read_manifest(copied)
    data = path.read_bytes()
    for at in range(0, len(data), 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match="shard 4 of `z` of layer 0"):
            Columns(copied, manifest).shard(2, 4)


def test_verify__of_shards_that_changed_places__finds_both(copied):
    """Their chunks are whole, each with its CRC: the checksum in the manifest tells them apart."""
    a, b = shard(copied, 1, 0), shard(copied, 1, 2)
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[1])
    b.write_bytes(data[0])
    found = mj.store.verify(copied)
    assert found.damaged == (0, 2)
    assert all("holds other rows than were written" in problem for problem in found.problems)
    assert mj.store.read(copied).rows(slice(50), "resid_post", layer=2).shape == (
        50,
        16,
    )  # CRCs alone would do


def test_verify__of_changed_metadata__says_so(copied):
    path = copied / "array-002" / "zarr.json"
    path.write_text(path.read_text().replace("241", "240"))
    (problem,) = mj.store.verify(copied).problems
    assert (
        "the metadata of `z` of layer 0 for other readers (`zarr.json`) are missing or were changed"
        in problem
    )
    assert len(mj.store.read(copied)) == small.ROWS  # which is not what they are for


def test_read__of_a_missing_or_short_shard__names_it(copied):
    path = shard(copied, 2, 3)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    said = r"shard 3 of `z` of layer 0 in .* is damaged: \d+ bytes where \d+ were written\. `mechjax.store.repair"
    with pytest.raises(CheckpointError, match=said):
        mj.store.read(copied)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"shard 3 of `z` of layer 0 in .* is missing\. `mechjax.store.repair"
    ):
        mj.store.read(copied)


def test_batches__over_a_damaged_shard__stop_there_and_keep_their_place(copied):
    store = mj.store.read(copied)
    whole = list(store.batches("z", layer=2, batch=10, key=None, buffer=10))
    flip(shard(copied, 3, 2), 8 * 40)  # the first chunk of the third shard: rows 100 to 115
    batches = store.batches("z", layer=2, batch=10, key=None, buffer=10)
    given = []
    with pytest.raises(
        CheckpointError, match=r"shard 2 of `z` of layer 2 in .* is damaged: .*[Dd]igest mismatch"
    ):
        given.extend(batches)  # what came before is kept
    while True:
        try:
            given.append(next(batches))
        except CheckpointError:
            break
    step = batches.step
    flip(shard(copied, 3, 2), 8 * 40)
    again = store.batches("z", layer=2, batch=10, key=None, buffer=10).at(step)
    np.testing.assert_array_equal(np.array(list(again)), np.array(whole[step:]))
    assert step <= 10  # no row of the damaged chunk was given


def test_batches__over_a_shard_that_goes_missing__say_so(copied):
    store = mj.store.read(copied)
    shard(copied, 3, 4).unlink()
    with pytest.raises(CheckpointError, match=r"shard 4 of `z` of layer 2 in .* is missing"):
        list(store.batches("z", layer=2, batch=10, key=jax.random.key(0)))


def harm(folder):
    """A bit of one shard, one that is missing, one cut short, and metadata."""
    flip(shard(folder, 0, 1), 999)
    shard(folder, 3, 1).unlink()
    shard(folder, 2, 4).write_bytes(b"")
    (folder / "array-001" / "zarr.json").unlink()


def test_repair__writes_what_is_not_whole_and_that_alone(whole, copied, tiny_model):
    harm(copied)
    assert mj.store.verify(copied).damaged == (1, 4)
    before = small.stamps(copied)
    store = mj.store.repair(copied, tiny_model, small.prompts())
    assert small.files(copied) == small.files(whole[0])
    assert store.manifest == whole[1].manifest
    changed = {name for name, stamp in small.stamps(copied).items() if before.get(name) != stamp}
    assert changed == {"array-000/c/1/0", "array-003/c/1/0", "array-002/c/4/0"}


def test_repair__of_a_store_that_is_not_complete__leaves_it_so(whole, tiny_model, tmp_path):
    def breaks_off():
        yield from small.prompts()[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.write(tmp_path, tiny_model, breaks_off())
    flip(shard(tmp_path, 1, 0), 77)
    assert mj.store.verify(tmp_path).damaged == (0,)
    store = mj.store.repair(tmp_path, tiny_model, small.prompts())
    assert not store.manifest.complete and not mj.store.verify(tmp_path).problems
    small.write(tmp_path, tiny_model)
    assert small.files(tmp_path) == small.files(whole[0])


def test_repair__of_what_is_whole__does_nothing(copied, tiny_model):
    before = small.files(copied), small.stamps(copied)
    mj.store.repair(copied, tiny_model, [])
    assert (small.files(copied), small.stamps(copied)) == before


def test_repair__from_another_model_or_prompts__is_refused(copied, tiny_model):
    harm(copied)
    before = small.files(copied)
    other = eqx.tree_at(lambda m: m.W_E, tiny_model, tiny_model.W_E + 1)
    with pytest.raises(ArgumentError, match="is another store: `weights` is that of"):
        mj.store.repair(copied, other, small.prompts())
    late = small.prompts()
    late[3] = small.prompts(seed=5)[3]
    for some, said in [
        (small.prompts(seed=5), "they differ within the first 2 batches"),
        (late, r"not those of shard 1: they give 50 rows where 50 were, or differ in batches 3 to 5"),
        (late[:3], r"not those of shard 1: they give 22 rows where 50 were"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            mj.store.repair(copied, tiny_model, some)
    found = small.files(copied)
    assert {name: found[name] for name in before} == before  # but for the metadata, nothing was done


def test_repair__that_gives_other_bits__is_refused_unless_they_are_taken(copied, tiny_model, monkeypatch):
    """As on another device. The moments are then those of the rows as they are."""
    harm(copied)
    real = capturing._captured
    monkeypatch.setattr(
        capturing, "_captured", lambda *args: (tuple(x * 1.001 for x in real(*args)[0]), *real(*args)[1:])
    )
    with pytest.raises(CheckpointError, match=r"shard 1 of `resid_post` of layer 0 came out with other bits"):
        mj.store.repair(copied, tiny_model, small.prompts())
    store = mj.store.repair(copied, tiny_model, small.prompts(), same_bits=False)
    found = mj.store.verify(copied)
    assert found.whole.all() and not found.problems
    for site, layer in small.COLUMNS:
        rows = store.rows(slice(None), site, layer=layer).astype(np.float64)
        moments = mj.store.read(copied).moments(site, layer=layer)
        np.testing.assert_allclose(moments.variance, rows.var(0), **TOL["float64", "gradient"])


def test_repair__of_what_is_no_store_or_is_written_to__is_refused(copied, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="is no store of activations"):
        mj.store.repair(tmp_path / "nothing", tiny_model, [])
    assert not (tmp_path / "nothing").exists()
    with sole_writer(copied), pytest.raises(WriteError, match="is being written to by another process"):
        mj.store.repair(copied, tiny_model, [])
