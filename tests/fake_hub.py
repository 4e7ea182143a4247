"""A hub on loopback: as much of the Hugging Face hub's HTTP as its own client uses to push and pull."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

TOKEN = "hf_test"
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+?)(?:/(?P<act>preupload|commit)/main)?")


class Hub:
    """repositories: (kind, name) -> private or not, and files by commit

    served: what was asked for, with its method; sizes: lies about files
    """

    def __init__(self):
        self.repositories = {}
        self.served = []
        self.sizes = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def add(self, name, files, kind="model", private=True):
        """A commit with these files; returns its hash."""
        repository = self.repositories.setdefault((kind, name), {"private": private, "commits": {}})
        commit = hashlib.sha1(json.dumps({k: v.hex() for k, v in files.items()}).encode()).hexdigest()
        repository["commits"][commit] = files
        return commit

    def files(self, name, commit, kind="model"):
        return self.repositories[kind, name]["commits"][commit]

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", **headers):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for key, value in ({"Content_Length": len(data)} | headers).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def body(self):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_HEAD(self):
                self.resolve()

            def do_GET(self):
                found = API.fullmatch(self.path)
                if found is None:
                    return self.resolve()
                repository = hub.repositories.get(("model", found["name"]))
                if repository is None:
                    return self.answer(404, X_Error_Code="RepoNotFound")
                name = found["name"]
                self.answer(200, {"id": name, "modelId": name, "private": repository["private"], "siblings": []})

            def resolve(self):
                hub.served.append(f"{self.command} {self.path}")
                found = RESOLVE.fullmatch(self.path)
                repository = hub.repositories.get(("dataset" if found["kind"] else "model", found["name"]))
                if repository is None:
                    return self.answer(401, X_Error_Code="RepoNotFound")
                files = repository["commits"].get(found["commit"])
                if files is None:
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                data = files.get(found["file"])
                if data is None:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found["commit"])
                tag, size = hashlib.sha1(data).hexdigest(), hub.sizes.get(found["file"], len(data))
                self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=found["commit"], Content_Length=size)

            def do_POST(self):
                data = self.body()
                if self.path == "/api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials"})
                if self.path == "/api/repos/create":
                    asked = json.loads(data)
                    key = ("model", f"{asked['organization']}/{asked['name']}")
                    if key in hub.repositories:
                        return self.answer(409, {"error": "exists", "url": f"{hub.url}/{key[1]}"})
                    private = asked.get("private") or asked.get("visibility") == "private"
                    hub.repositories[key] = {"private": private, "commits": {}}
                    return self.answer(200, {"url": f"{hub.url}/{key[1]}"})
                found = API.fullmatch(self.path)
                if found["act"] == "preupload":
                    paths = [f["path"] for f in json.loads(data)["files"]]
                    files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                    return self.answer(200, {"files": files})
                lines = [json.loads(line) for line in data.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                commit = hub.add(found["name"], files)
                url = f"{hub.url}/{found['name']}/commit/{commit}"
                self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit})

        return Handler


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub. Its client made these of the environment when it was imported, which is long ago here."""
    started = Hub()
    own = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": started.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": started.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for name, value in own.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield started
    started.close()
