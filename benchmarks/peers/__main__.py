"""Create the peers' virtual environments: `python -m benchmarks.peers FOLDER [pip options]`.

`FOLDER/<peer>` is made from `<peer>.txt` beside this file, with the interpreter that runs this. Each environment takes
1.2 to 1.6 GB with a CPU build of torch. What follows FOLDER goes to `pip install` as it stands; on Linux,
`--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple` takes that build.
"""

import subprocess
import sys
import venv
from pathlib import Path

PEERS = (
    "huggingface", "transformerlens", "nnsight", "eapig", "saelens", "sparsify", "dictionary_learning",
)  # fmt: skip


def interpreter(folder: Path, peer: str) -> Path:
    """The Python of one peer's environment."""
    return folder / peer / "bin" / "python"


def create(folder: Path, peer: str, pip_options: list[str]) -> None:
    """Make one environment, or bring an existing one to its requirements."""
    if not interpreter(folder, peer).exists():
        venv.create(folder / peer, with_pip=True)
    requirements = Path(__file__).with_name(f"{peer}.txt")
    pip = [interpreter(folder, peer), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", requirements, *pip_options], check=True)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    for peer in PEERS:
        print(f"{peer}: installing into {Path(sys.argv[1]) / peer}", flush=True)
        create(Path(sys.argv[1]).absolute(), peer, sys.argv[2:])


if __name__ == "__main__":
    main()
