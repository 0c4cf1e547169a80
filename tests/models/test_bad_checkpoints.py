"""Folders that lie, or that want their code to be run: refused by name, warned of, and never executed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
import tokenizers
from tokenizers import models

import mechjax as mj
from mechjax.base.errors import MechjaxError, TokenError, UnsupportedModelError
from mechjax.hub import Tokenizer
from mechjax.models import Config
from mechjax.models.export import export
from mechjax.models.load import load
from mechjax.parallel import buffers as host

CHOICES = {
    "gpt2": {},
    "neox": {"positions": "rotary", "residual": "parallel", "tied": False, "activation": "gelu"},
    "llama": {
        "norm": "rms", "positions": "rotary", "mlp": "gated", "activation": "silu", "qkv_bias": False,
        "out_bias": False, "mlp_bias": False, "tied": False,
    },
}  # fmt: skip
D_VOCAB = 50


def words(n: int) -> Tokenizer:
    """A tokenizer of `n` words."""
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0")))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """One whole folder per family, with a tokenizer."""
    home = tmp_path_factory.mktemp("pristine")
    for family, choices in CHOICES.items():
        config = Config(d_vocab=D_VOCAB, n_ctx=24, d_model=16, n_layers=2, n_heads=4, d_mlp=40, **choices)
        export(mj.init(config, key=jax.random.key(0)), home / family, family=family, tokenizer=words(D_VOCAB))
    return home


@pytest.fixture
def spoil(pristine, tmp_path):
    """A copy of a folder with other values in its config."""

    def copy(family="gpt2", **changes):
        folder = Path(shutil.copytree(pristine / family, tmp_path / family))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return copy


LIES = [
    *(("gpt2", key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner")),
    *(
        (family, key)
        for family in ("neox", "llama")
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    ),
    ("llama", "num_key_value_heads"), ("llama", "head_dim"),
]  # fmt: skip


@pytest.mark.parametrize("change", [-1, 1, 2], ids=["one less", "one more", "twice"])
@pytest.mark.parametrize(("family", "key"), LIES)
def test_load__config_that_lies_about_a_size__is_refused_before_allocating(
    spoil, monkeypatch, family, key, change
):
    def allocate(*_):
        raise AssertionError("memory was asked for")

    folder = spoil(family)
    load(folder)
    told = json.loads((folder / "config.json").read_text())[key]
    shutil.rmtree(folder)
    monkeypatch.setattr(host, "_aligned", allocate)
    with pytest.raises(MechjaxError, match=r"shape|tensor|multiple|even"):
        load(spoil(family, **{key: told * 2 if change == 2 else told + change}))


HOSTILE = textwrap.dedent("""
    import json, sys
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    from mechjax.models.load import load
    folder, marker = sys.argv[1:]
    model, _ = load(folder)
    print(float(model([[1, 2]]).sum()))
    print(json.dumps(sorted({name.rpartition("/")[2] for name in opened if name.startswith(folder + "/")})))
    sys.path.insert(0, folder)
    import modeling_evil  # the control: it would have been seen
""")


def test_load__folder_with_code__runs_from_its_config_alone(spoil, tmp_path):
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').write('ran')"
    folder = spoil(
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    )
    for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}))

    class Evil:
        def __reduce__(self):
            return exec, (code,)

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    loaded = load(folder)[0]
    assert not marker.exists()
    script = tmp_path / "script.py"
    script.write_text(HOSTILE)
    root = str(Path(mj.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(marker)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    total, opened = done.stdout.splitlines()
    assert float(total) == pytest.approx(float(loaded([[1, 2]]).sum()), rel=1e-5)
    assert "config.json" in json.loads(opened) and "tokenizer_config.json" in json.loads(opened)
    assert not [name for name in json.loads(opened) if name.endswith((".py", ".bin", ".pkl"))]
    assert marker.exists()  # the control ran


def test_load__architecture_of_its_own_code__is_refused_not_run(spoil, tmp_path):
    folder = spoil(architectures=["EvilForCausalLM"], model_type="evil",
                   auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"})  # fmt: skip
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match="EvilForCausalLM is not implemented"):
        load(folder)
    assert not (tmp_path / "marker").exists()


def test_package__never_asks_for_remote_code():
    sources = {path: path.read_text() for path in Path(mj.__file__).parent.rglob("*.py")}
    assert not [path for path, text in sources.items() if "trust_remote_code=True" in text.replace(" ", "")]


def test_load__tokenizer_of_larger_ids__warns_and_the_model_refuses_them(spoil):
    folder = spoil()
    words(D_VOCAB + 3).backend.save(str(folder / "tokenizer.json"))
    with pytest.warns(
        UserWarning, match=r"gives ids up to 52, the model has 50 tokens.*the tokenizer of this model\?"
    ):
        model, tokenizer = load(folder)
    assert model(tokenizer("w49")).shape[-1] == D_VOCAB
    with pytest.raises(TokenError, match="Token id 52 is out of range"):
        model(tokenizer("w52"))


def test_load__tokenizer_of_far_fewer_tokens__warns(spoil):
    folder = spoil()
    words(40).backend.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"has 40 tokens, the model 50, far more than padding explains"):
        load(folder)


def test_load__tokenizer_of_a_padded_vocabulary__is_silent(spoil):
    folder = spoil()
    words(46).backend.save(str(folder / "tokenizer.json"))
    assert load(folder)[1].vocab_size == 46  # warnings are errors here
