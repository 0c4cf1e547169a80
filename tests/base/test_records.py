import json
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int, PRNGKeyArray, TypeCheckError

from mechjax.base import records
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.base.prompts import Prompts
from mechjax.base.records import Record, restore, save
from mechjax.base.signed import signed


class Scores(Record):
    scores: Float[Array, "*over"]
    per_example: Float[Array, "*over batch"]
    over: tuple[str, ...] = eqx.field(static=True)
    note: str = eqx.field(static=True, default="")

    def axis_labels(self):
        return {"pos": ("IO", "S1", "END")}


class Odds(Record):
    values: dict
    key: PRNGKeyArray
    fn: object = eqx.field(static=True, default=None)


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    """Let the classes of this file pass for mechjax's own: they are looked up by module and name."""
    import sys

    for cls in (Scores, Odds):
        monkeypatch.setattr(cls, "__module__", "mechjax.base.pretend")
    monkeypatch.setitem(sys.modules, "mechjax.base.pretend", sys.modules[__name__])


@pytest.fixture
def scores():
    values = jnp.arange(6.0).reshape(2, 3).at[1, 2].set(-9.0)
    return Scores(values, jnp.stack([values, values + 1], -1), ("layer", "pos"), note="<b>")


def test_repr__of_a_record__says_what_shapes_and_extremes(scores):
    text = repr(scores)
    assert text.splitlines()[0] == "Scores"
    assert "float32[layer=2, pos=3]" in text
    assert "-9 to 4, highest at L1 @ S1" in text
    assert "float32[layer=2, pos=3, batch=2]" in text


def test_repr__of_anything_big__stays_under_twenty_lines():
    many = eqx.combine(None, Odds({str(i): jnp.ones(3) for i in range(50)}, jax.random.key(0)))
    assert len(repr(many).splitlines()) < 20


def test_repr__inside_jit__shows_shapes_alone(scores):
    seen = []
    jax.jit(lambda s: (seen.append(repr(s)), s.scores)[1])(scores)
    assert "float32[layer=2, pos=3]" in seen[0]
    assert "highest" not in seen[0]


def test_top__with_negative_and_nan_cells__sorts_by_size_and_leaves_nan_out(scores):
    scores = eqx.tree_at(lambda s: s.scores, scores, scores.scores.at[0, 1].set(jnp.nan))
    assert scores.top(2) == [("L1 @ END", -9.0), ("L1 @ S1", 4.0)]
    assert len(scores.top(100)) == 5


def test_rows__of_a_record__name_the_place_and_the_fields_on_the_same_axes(scores):
    assert scores.rows()[5] == {"layer": 1, "pos": "END", "scores": -9.0}
    assert len(scores.rows()) == 6


def test_rows__without_named_axes__are_refused():
    with pytest.raises(ArgumentError, match="no array with named axes"):
        Odds({}, jax.random.key(0)).rows()


def test_html__with_hostile_text__is_escaped(scores):
    assert "<b>'" not in scores._repr_html_()
    assert "&lt;b&gt;" in scores._repr_html_()


def test_html__of_two_axes__is_a_heat_map(scores):
    page = eqx.tree_at(lambda s: s.scores, scores, scores.scores.at[0, 0].set(jnp.nan))._repr_html_()
    assert re.findall(r"<th[^>]*>([^<]*)</th>", page) == ["", "@ IO", "@ S1", "@ END", "L0", "L1"]
    assert re.findall(r"(\d+)%,transparent\)'>([^<]*)</td>", page) == [
        ("0", "nan"), ("9", "1.00"), ("18", "2.00"), ("27", "3.00"), ("36", "4.00"), ("80", "-9.00"),
    ]  # fmt: skip


def test_record__of_a_wrong_shape__is_refused_under_test():
    with pytest.raises(TypeCheckError, match="mask"):
        Prompts(jnp.zeros((2, 3), int), jnp.zeros((4, 5), bool))


def test_save_restore__of_a_record__gives_the_same_bits(scores, tmp_path):
    back = restore(save(scores, tmp_path / "a" / "b"))
    assert type(back) is Scores
    assert back.over == ("layer", "pos")
    assert back.note == "<b>"
    assert eqx.tree_equal(back, scores)


def test_save_restore__of_every_kind_of_value__gives_it_back(tmp_path):
    values = {
        "bf16": jnp.asarray([1.5, jnp.nan], jnp.bfloat16),
        "fp8": jnp.ones((2, 2), jnp.float8_e4m3fn),
        "bool": jnp.asarray([True, False]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(3),
        "numpy": np.arange(3, dtype=np.int64),
        "plain": (1, 2.5, float("inf"), None, True, "ä\n", [1], {"x": (2,)}),
        "prompts": Prompts(jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)),
    }
    odds = Odds(values, jax.random.key(3))
    back = restore(save(odds, tmp_path))
    assert jax.tree.structure(back) == jax.tree.structure(odds)
    assert isinstance(back.values["numpy"], np.ndarray)
    for a, b in zip(jax.tree.leaves(back.values), jax.tree.leaves(odds.values), strict=True):
        if hasattr(b, "dtype"):
            assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())
        else:
            assert a == b
    assert (jax.random.key_data(back.key) == jax.random.key_data(odds.key)).all()


def test_save__of_a_function__is_refused_by_field(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot save `fn`: it is a builtins\.function"):
        save(Odds({}, jax.random.key(0), fn=lambda x: x), tmp_path)


def test_save__over_an_earlier_record__replaces_it_and_leaves_other_files(scores, tmp_path):
    (tmp_path / "notes.safetensors").write_text("mine")
    save(scores, tmp_path)
    newer = eqx.tree_at(lambda s: s.scores, scores, scores.scores + 1)
    save(newer, tmp_path)
    assert eqx.tree_equal(restore(tmp_path), newer)
    assert len(list(tmp_path.iterdir())) == 3


def test_save__interrupted_before_the_last_step__leaves_the_old_record(scores, tmp_path, monkeypatch):
    save(scores, tmp_path)
    replace = records.replace_file

    def power_cut(path, data):
        if path.name == "record.json":
            raise KeyboardInterrupt
        replace(path, data)

    monkeypatch.setattr(records, "replace_file", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(eqx.tree_at(lambda s: s.scores, scores, scores.scores + 1), tmp_path)
    assert eqx.tree_equal(restore(tmp_path), scores)


def test_save__where_a_file_stands__is_a_write_error(scores, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write the record to .*file"):
        save(scores, tmp_path / "file")


def test_restore__of_nothing__says_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match="no record in"):
        restore(tmp_path / "none")


def test_restore__of_truncated_arrays__is_refused(scores, tmp_path):
    save(scores, tmp_path)
    arrays = next(tmp_path.glob("*.safetensors"))
    os.truncate(arrays, arrays.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated or were changed"):
        restore(tmp_path)


def test_restore__of_truncated_json__is_refused(scores, tmp_path):
    save(scores, tmp_path)
    page = tmp_path / "record.json"
    page.write_bytes(page.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is not whole"):
        restore(tmp_path)


def _rewrite(folder, change):
    """Change `record.json` as somebody would who knows how its checksum is made."""
    page = json.loads((folder / "record.json").read_text())
    page.pop("sha256")
    change(page)
    (folder / "record.json").write_bytes(signed(page))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["record"].update({"class": "os:system"}), "nothing else is ever loaded"),
        (lambda p: p["record"].update({"class": "mechjax.base.records:Path"}), "nothing else is ever loaded"),
        (lambda p: p["record"].update({"class": "mechjax.no.such:Thing"}), "nothing else is ever loaded"),
        (lambda p: p["record"]["fields"].pop("note"), r"\['note'\] are missing"),
        (lambda p: p["record"]["fields"]["scores"].update({"array": "../x"}), r"asks for the array `../x`"),
        (lambda p: p["record"]["fields"]["scores"].update({"dtype": "system"}), "does not know"),
        (lambda p: p.update({"arrays": "../../etc/passwd"}), "where their checksum was expected"),
        (lambda p: p.update({"record": {"eval": "1"}}), "does not write"),
        (lambda p: p.update({"record": [1]}), "no record of mechjax contains"),
        (lambda p: p.update({"format": "other"}), "not a record that this version"),
    ],
)
def test_restore__of_a_hostile_file__is_refused(scores, tmp_path, change, message):
    save(scores, tmp_path)
    _rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path)


def test_restore__of_a_changed_file__is_refused(scores, tmp_path):
    save(scores, tmp_path)
    page = tmp_path / "record.json"
    page.write_text(page.read_text().replace("&lt;", "").replace('"<b>"', '"<i>"'))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        restore(tmp_path)


def test_records__in_vmap__keep_their_class():
    batch = jax.vmap(lambda t: Prompts(t, t > 0))(jnp.ones((3, 2, 4), jnp.int32))
    assert isinstance(batch, Prompts)
    tokens: Int[Array, "a b c"] = batch.tokens
    assert tokens.shape == (3, 2, 4)


class Table(Record):
    arrays: dict[str, Float[Array, "layer pos"]]


def test_repr__of_a_table_of_arrays__names_each():
    text = repr(Table({"z": jnp.eye(2), "q": jnp.zeros((3, 1))}))
    assert "arrays['z']  float32[layer=2, pos=2]  0 to 1, highest at L0 @ 0" in text
    assert "arrays['q']  float32[layer=3, pos=1]" in text


def test_save_restore__of_a_model__gives_the_same_model(tiny_model, tiny_tokens, tmp_path):
    back = restore(save(tiny_model, tmp_path))
    assert eqx.tree_equal(back, tiny_model)
    assert back.config == tiny_model.config
    assert (back(tiny_tokens) == tiny_model(tiny_tokens)).all()
