"""`mechjax doctor` on faked machines: what it finds, what it advises, and its exit status."""

import re
import socket
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from huggingface_hub import constants

from mechjax.cli import main

doctor = __import__("mechjax.cli.doctor", fromlist=["CHECKS"])
VERSIONS = dict.fromkeys(doctor.PACKAGES, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2", "mechjax": "0.1.0"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A healthy machine without accelerators; tests break it. `write(path, text)` makes files of its root."""
    versions = dict(VERSIONS)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "version", versions.get)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["jaxlib<=0.10.2,>=0.10.1", "numpy>=2.0"])
    monkeypatch.setattr(doctor, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 << 30))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("COLUMNS", "400")

    def write(path, text=""):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable:   33554432 kB\n")
    here = SimpleNamespace(write=write, versions=versions)
    here.use = lambda *platforms: monkeypatch.setattr(
        doctor, "devices",
        lambda: [
            SimpleNamespace(platform=p, device_kind=f"{p.upper()} x", memory_stats=lambda: {"bytes_limit": 16 << 30})
            for p in platforms
        ],
    )  # fmt: skip
    here.use("cpu")
    return here


def _run(capsys, *argv):
    status = main(["doctor", *argv])
    return status, " ".join(capsys.readouterr().out.split())


def test_doctor__of_a_healthy_machine__exits_0(machine, capsys):
    status, said = _run(capsys)
    assert status == 0, said
    assert "all is well" in said
    assert "32.0 GiB free" in said and "50.0 GiB free where models are kept" in said
    assert "1 × CPU x" in said and "mechjax 0.1.0, jax 0.10.2" in said
    assert "problem" not in said


def test_doctor__of_an_accelerator_in_use__exits_0(machine, capsys):
    machine.write("dev/nvidia0")
    machine.write("dev/nvidiactl")
    machine.use("gpu")
    status, said = _run(capsys)
    assert status == 0, said
    assert "1 × GPU x, 16.0 GiB each" in said
    assert "GPU ok 1 here, used by JAX" in said


def _tpu_on_the_bus(machine):
    for i, device in enumerate(("0x0063", "0x0063", "0x0042")):  # two chips of v5e and Google's network card
        machine.write(f"sys/bus/pci/devices/0000:0{i}/vendor", "0x1ae0\n")
        machine.write(f"sys/bus/pci/devices/0000:0{i}/device", f"{device}\n")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (_tpu_on_the_bus, r'TPU problem 2 here, not used by JAX pip install -U "jax\[tpu\]"'),
        (lambda m: m.write("dev/accel0"), r"TPU problem 1 here, not used"),
        (
            lambda m: (m.versions.update(libtpu="0.1"), m.write("dev/vfio/0"), m.write("dev/vfio/vfio")),
            "TPU problem 1 here, not used .*another process holds the TPU",
        ),
        (lambda m: m.write("dev/nvidia0"), r'GPU problem 1 here, not used by JAX pip install -U "jax\[cuda13\]"'),
        (
            lambda m: m.write("proc/driver/nvidia/gpus/0000:01/information", "Model: x"),
            "GPU problem 1 here, not used",
        ),
        (lambda m: m.versions.update(jaxlib="0.9.0"), r"problem jaxlib 0.9.0, but jax 0.10.2 asks for jaxlib<=0.10.2"),
        (
            lambda m: m.versions.update({"jax-cuda13-plugin": "0.10.1"}),
            "problem jax-cuda13-plugin 0.10.1, but jaxlib 0.10.2: JAX would leave the GPU unused",
        ),
        (lambda m: m.versions.pop("optax"), r"packages problem .*optax is missing.* pip install -U mechjax"),
        (lambda m: m.write("proc/meminfo", "MemAvailable: 1048576 kB\n"), r"memory problem 1.0 GiB free .*2 GiB"),
        (
            lambda m: (m.write("sys/fs/cgroup/memory.max", "1073741824"), m.write("sys/fs/cgroup/memory.current", "0")),
            r"memory problem 1.0 GiB free",
        ),
    ],
)  # fmt: skip
def test_doctor__of_a_machine_with_a_problem__says_what_to_do_and_exits_1(machine, capsys, breaks, message):
    breaks(machine)
    status, said = _run(capsys)
    assert status == 1
    assert re.search(message, said), said
    assert said.endswith(" 1 problem")


def test_doctor__of_a_hidden_accelerator__names_the_variable_alone(machine, capsys, monkeypatch):
    machine.write("dev/nvidia0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status, said = _run(capsys)
    assert status == 1
    assert "JAX_PLATFORMS=cpu hides the GPU of this machine unset JAX_PLATFORMS" in said
    assert "GPU ok 1 here, hidden by JAX_PLATFORMS" in said
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert "hides" not in _run(capsys)[1]


def test_doctor__of_a_vfio_group_without_libtpu__takes_it_for_something_else(machine, capsys):
    machine.write("dev/vfio/7")
    machine.write("dev/accel/accel0")  # another maker's
    assert _run(capsys)[0] == 0


def test_doctor__where_jax_cannot_start__says_why(machine, capsys, monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(doctor, "devices", fails)
    status, said = _run(capsys)
    assert status == 1
    assert "devices problem JAX cannot start: Unable to initialize backend 'tpu'" in said


def test_doctor__of_a_full_disk_and_a_compile_cache_that_is_a_file__says_both(
    machine, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    machine.write("cache")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    try:
        status, said = _run(capsys)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert status == 1
    assert "disk problem 1.0 GiB free" in said and "cache cannot be written" in said
    assert "2 problems" in said


def test_doctor__of_the_hub__tells_its_state_without_a_connection(machine, capsys, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(
        socket, "create_connection", lambda *a, **k: called.append(a) or SimpleNamespace(close=int)
    )
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline (HF_HUB_OFFLINE is set); 1 model in its cache" in _run(capsys)[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "online when a name asks for it" in _run(capsys)[1]
    assert not called
    assert "can be reached" in _run(capsys, "--online")[1]
    assert called


def test_doctor__online_without_a_network__exits_1(machine, capsys, monkeypatch):
    def refused(*args, **kwargs):
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    status, said = _run(capsys, "--online")
    assert status == 1
    assert re.search(r"cannot be reached \(ConnectionRefusedError\) Check the network", said)


def test_doctor__extras__are_those_of_the_package():
    page = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {
        extra: {re.match(r"[\w-]+", r).group() for r in needs}
        for extra, needs in page["optional-dependencies"].items()
        if extra not in ("test", "docs")
    }
    assert {extra: set(names) for extra, names in doctor.EXTRAS.items()} == named
    core = {re.match(r"[\w-]+", r).group() for r in page["dependencies"]}
    assert set(doctor.PACKAGES) == core | {"jaxlib"}


def test_doctor__of_missing_extras__names_what_they_lack(machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name == "torchax" else object())
    said = _run(capsys)[1]
    assert "torch lacks torchax; viz is installed" in said
