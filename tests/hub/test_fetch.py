"""Names on the Hub, against a Hub on this machine: what arrives, and what each refusal says."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save

from mechjax.base.errors import HubError
from mechjax.hub.fetch import fetch, is_hub_name
from tests.hub.hub_server import Hub, Model, run_against

FETCH = """
import json, sys
from mechjax.base.errors import HubError, UnsupportedModelError
from mechjax.hub import Checkpoint, fetch
def refuse(folder):
    raise UnsupportedModelError("refused with " + ", ".join(sorted(p.name for p in folder.iterdir())))
answers = []
for name, revision, check in CASES:
    try:
        folder = fetch(name, revision=revision, check=refuse if check else None)
        sums = {tensor: float(Checkpoint(folder)[tensor].sum()) for tensor in Checkpoint(folder).entries}
        answers.append([sorted(path.name for path in folder.iterdir()), sums])
    except (HubError, UnsupportedModelError) as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def tensor(value: float) -> bytes:
    return save({f"w{value:.0f}": np.full((2,), value, np.float32)})


def sharded() -> dict[str, bytes]:
    weight_map = {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {
        "config.json": b"{}",
        "model.safetensors.index.json": index,
        "model-1.safetensors": tensor(1),
        "model-2.safetensors": tensor(2),
        "pytorch_model.bin": b"\x80\x04",
        "onnx/model.safetensors": b"",
        "README.md": b"hello",
    }


@pytest.fixture(scope="module")
def hub():
    single = {"config.json": b"{}", "model.safetensors": tensor(3), "tokenizer.json": b"{}"}
    hostile = json.dumps({"weight_map": {"w": "../../../x.safetensors"}}).encode()
    models = {
        "org/sharded": Model({"main": sharded()}),
        "org/single": Model({"main": single, "step-100": {**single, "model.safetensors": tensor(4)}}),
        "org/hostile": Model({"main": {"config.json": b"{}", "model.safetensors.index.json": hostile}}),
        "org/gated": Model({"main": single}, status=403, code="GatedRepo"),
        "org/private": Model({"main": single}, status=401),
        "org/broken": Model({"main": single}, status=500),
    }
    with Hub(models) as server:
        yield server
        server.shutdown()


CASES = {
    "sharded": ("org/sharded", None, False),
    "refused before weights": ("org/single", None, True),
    "single": ("org/single", None, False),
    "revision": ("org/single", "step-100", False),
    "no revision": ("org/single", "step-7", False),
    "gated": ("org/gated", None, False),
    "private": ("org/private", None, False),
    "absent": ("org/absent", None, False),
    "broken": ("org/broken", None, False),
}


def ask(endpoint, cache, cases, **env):
    """The answer to each case: [files, sums] or [error class, message]."""
    return json.loads(run_against(endpoint, cache, f"CASES = {list(cases)}\n{FETCH}", **env))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def online(hub, cache):
    return dict(zip(CASES, ask(hub.endpoint, cache, CASES.values()), strict=True))


def test_fetch__shards__arrive_without_what_a_load_does_not_read(online):
    files = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert online["sharded"] == [files, {"w1": 2.0, "w2": 4.0}]


def test_fetch__single_file__arrives(online):
    assert online["single"] == [["config.json", "model.safetensors", "tokenizer.json"], {"w3": 6.0}]


def test_fetch__revision__is_that_one(online):
    assert online["revision"][1] == {"w4": 8.0}


def test_fetch__check_refuses__no_weights_are_fetched(online):
    assert online["refused before weights"] == [
        "UnsupportedModelError",
        "refused with config.json, tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "gated",
            r"`org/gated` is gated.*Accept its conditions at http://127.*/org/gated, then log in with `hf auth",
        ),
        (
            "private",
            r"refused `org/private` \(401\): it is private or gated, or the name is wrong.*set HF_TOKEN",
        ),
        ("absent", r"The Hub has no model `org/absent`. Check the spelling at http"),
        ("no revision", r"has `org/single` but not its revision `step-7`.*leave `revision` out"),
        ("broken", r"`org/broken` is not in the local cache.*cannot be reached|HTTP status 500"),
    ],
)
def test_fetch__refusal__says_how_to_fix_it(online, case, message):
    kind, text = online[case]
    assert kind == "HubError"
    assert re.search(message, text), text
    assert "hf_secret" not in text


def test_fetch__offline__uses_the_cache_or_says_how(online, hub, cache):
    before = len(hub.requests)
    cached, absent = ask(hub.endpoint, cache, [CASES["sharded"], CASES["absent"]], HF_HUB_OFFLINE="1")
    assert cached == online["sharded"]
    assert re.search(r"`org/absent` is not in the local cache, and HF_HUB_OFFLINE is set. Check", absent[1])
    assert len(hub.requests) == before


def test_fetch__no_network__uses_the_cache_or_says_how(online, cache):
    nobody = "http://127.0.0.1:9"
    cached, absent = ask(nobody, cache, [CASES["sharded"], CASES["absent"]])
    assert cached == online["sharded"]
    assert re.search(r"not in the local cache, and http://127.0.0.1:9 cannot be reached", absent[1])


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "../x", "org/../x", "/abs/x", "org/na me", "org/"])
def test_hub_name__spelled_otherwise__is_refused(name):
    assert not is_hub_name(name)
    with pytest.raises(HubError, match=r"is no Hub name; those are spelled `org/name`"):
        fetch(name)
