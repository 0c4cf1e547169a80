"""Checkpoint folders: one file, shards with an index, and everything that can be wrong with them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechjax.base.errors import CheckpointError
from mechjax.hub.folder import INDEX, Checkpoint, read_config, read_index

A, B = np.ones((2, 3), np.float32), np.arange(4, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two shards with their index."""
    home = tmp_path / "model"
    home.mkdir()
    save_file({"a": A}, home / "one.safetensors")
    save_file({"b": B}, home / "two.safetensors")
    write_index(home, {"a": "one.safetensors", "b": "two.safetensors"})
    return home


def write_index(folder, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


def test_checkpoint__shards__are_one_mapping(folder):
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.entries) == {"a", "b"}
    np.testing.assert_array_equal(checkpoint["b"], B)
    assert checkpoint.entries["a"].shape == (2, 3)


def test_checkpoint__single_file_beside_an_index__wins_as_in_transformers(folder):
    save_file({"c": A}, folder / "model.safetensors")
    assert set(Checkpoint(folder).entries) == {"c"}


def test_checkpoint__unknown_tensor__suggests(folder):
    with pytest.raises(CheckpointError, match=r"holds no tensor `aa`. Did you mean `a`"):
        Checkpoint(folder)["aa"]


OUTSIDE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
]


@pytest.mark.parametrize("shard", [*OUTSIDE, "x\0.safetensors", "*.safetensors", "passwd", "", 3, None])
def test_index__shard_that_is_no_plain_name__is_refused(folder, shard):
    save_file({"a": A}, folder.parent / "x.safetensors")
    write_index(folder, {"a": shard})
    with pytest.raises(
        CheckpointError, match=r"places `a` in .*plain name of a .safetensors file in the same folder"
    ):
        Checkpoint(folder)


def test_checkpoint__shard_link_out_of_the_folder__is_refused(folder):
    save_file({"a": A}, folder.parent / "secret.safetensors")
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to(folder.parent / "secret.safetensors")
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        Checkpoint(folder)


def test_config__link_out_of_the_folder__is_refused(folder):
    (folder.parent / "other.json").write_text("{}")
    (folder / "config.json").symlink_to("../other.json")
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        read_config(folder)


def test_checkpoint__links_of_the_hub_cache__are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": A}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert set(Checkpoint(snapshot).entries) == {"a"}


def test_checkpoint__missing_shards__are_listed(folder):
    (folder / "two.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the 2 shards that its index names: two.safetensors"
    ):
        Checkpoint(folder)


def test_checkpoint__tensor_listed_but_absent__is_named(folder):
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"places `c` in two.safetensors, which does not hold it"):
        Checkpoint(folder)


def test_checkpoint__tensor_in_two_shards__is_named(folder):
    save_file({"a": A, "b": B}, folder / "two.safetensors")
    with pytest.raises(
        CheckpointError, match=r"two.safetensors in .* holds `a`, but the index places it in one"
    ):
        Checkpoint(folder)


def test_checkpoint__tensor_that_the_index_does_not_list__is_named(folder):
    save_file({"b": B, "z": B}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="holds `z`, but the index does not list it"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index__without_weight_map__is_refused(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="has no `weight_map` from tensor names to shards"):
        read_index(folder)


def test_index__tensor_listed_twice__is_refused(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match="has the key `a` twice"):
        Checkpoint(folder)


def test_checkpoint__bin_only__names_the_converter(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(
        CheckpointError, match=r"only as pytorch_model.bin; mechjax reads safetensors.*save_pretrained"
    ):
        Checkpoint(tmp_path)


def test_checkpoint__no_weights__lists_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*It holds: config.json"):
        Checkpoint(tmp_path)


def test_config__no_folder__says_so(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        read_config(tmp_path / "nowhere")


def test_config__absent__lists_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json.*It holds: nothing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "holds a JSON list"), ('{"a":1,"a":2}', "the key `a` twice")],
)
def test_config__invalid__is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_config__huge__is_refused_before_reading(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(CheckpointError, match="is larger than 100 MiB"):
        read_config(tmp_path)
