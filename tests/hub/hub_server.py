"""A Hugging Face Hub on 127.0.0.1: models, revisions, refusals."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]


@dataclass
class Model:
    """Files of each revision; or the status (and the Hub's error code) that every request is answered with."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int = 200
    code: str = ""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


class Hub(ThreadingHTTPServer):
    """Serves `models` (`"org/name"` to Model) until closed; `requests` lists the paths asked for."""

    daemon_threads = True

    def __init__(self, models: dict[str, Model]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.requests = models, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append(f"{self.command} {'/'.join(path)}")
        api = path[:2] == ["api", "models"]
        org, name, kind, revision, *rest = [*path[2:], "", "", "", ""] if api else [*path, "", "", "", ""]
        model = self.server.models.get(f"{org}/{name}")
        if model is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if model.status != 200 and not (api and model.code == "GatedRepo"):  # gated models show their names
            return self.answer(model.status, b"", {"X-Error-Code": model.code} if model.code else {})
        commit = model.commit(revision)
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = model.files(commit)
        if kind == "revision":
            return self.json(
                {"id": f"{org}/{name}", "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            )
        if kind == "tree":
            entries = [(file, data, hashlib.sha1(data).hexdigest()) for file, data in files.items()]
            return self.json(
                [{"type": "file", "path": f, "size": len(d), "oid": oid} for f, d, oid in entries]
            )
        file = "/".join(part for part in rest if part)
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": commit}
        return self.answer(200, files[file], tag)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def run_against(endpoint: str, cache: Path, code: str, **env: str) -> str:
    """What `code` prints in a fresh process whose Hub is `endpoint` (huggingface_hub reads its settings at import)."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        **env,
    }
    settings |= {"JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | settings,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
