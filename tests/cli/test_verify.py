"""`mechjax verify`: exit statuses, and what is printed."""

import re

import jax.numpy as jnp

import mechjax as mj
from mechjax.base.prompts import Prompts
from mechjax.cli import main

PROMPTS = Prompts(jnp.arange(6).reshape(2, 3), jnp.ones((2, 3), bool))


def test_verify__of_a_whole_record__exits_with_0_and_says_where_it_comes_from(tmp_path, capsys):
    mj.save(PROMPTS, tmp_path, seed=3, name="[bold]x")
    assert main(["verify", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"record +2 +[\d.]+ KiB +whole", said)
    assert re.search(r"seed +3", said) and re.search(r"name +\[bold\]x", said) and "jax" in said
    assert len(said.splitlines()) < 20


def test_verify__of_a_damaged_record__exits_with_1_and_names_file_and_array(tmp_path, capsys):
    mj.save(PROMPTS, tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "1 damaged" in said and f"{file.name} was changed (mask)" in said.replace("\n", "")


def test_verify__of_files_without_checksums__says_consistent(tmp_path, capsys):
    from tests.artefacts.made import model

    folder = mj.export(model(), tmp_path / "m", family="gpt2")
    (folder / "mechjax.json").unlink()
    assert main(["verify", str(folder)]) == 0
    assert re.search(r"model +2 +[\d.]+ \w+ +consistent", capsys.readouterr().out)


def test_verify__of_anything_else__exits_with_2_and_says_what_would_be(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert (
        "holds nothing that has checksums of mechjax. What has: record: record.json"
        in capsys.readouterr().err
    )
