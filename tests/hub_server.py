"""A Hub on the loopback: the routes of huggingface.co that huggingface_hub uses to push a model and to load it back."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub:
    """Repositories as lists of commits; a commit maps each path to its content. `drop` says which requests die."""

    def __init__(self, drop=None):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.metadata_problems: list[str] = []
        self.drop = drop or (lambda method, path: False)
        self.endpoint = ""

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        commits = self.commits[repo]
        return commits[-1] if revision == "main" else next(commit for commit in commits if commit[0] == revision)

    def commit(self, repo: str, lines: list[dict]) -> str:
        files = dict(self.commits[repo][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(repr((repo, len(self.commits[repo]), sorted(files))).encode()).hexdigest()
        self.commits[repo].append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def _answer(self, content=b"", status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code)

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.drop(self.command, path):
            self.close_connection = True
            self.connection.close()
            return
        for method, pattern, answer in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return answer(self, body, **match.groupdict())
        self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.hub.commits:
            return self._answer({"url": f"{self.hub.endpoint}/{repo}"}, 409)
        self.hub.commits[repo] = [("0" * 40, {})]
        self._answer({"url": f"{self.hub.endpoint}/{repo}"})

    def whoami(self, body: bytes) -> None:
        self._answer({"name": "me", "type": "user", "orgs": []})

    def validate_yaml(self, body: bytes) -> None:
        import yaml

        header = json.loads(body)["content"].split("---")[1]
        data = yaml.safe_load(header)
        problems = [
            f"{key} is missing" for key in ("license", "library_name", "pipeline_tag", "tags") if key not in data
        ]
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result) or not result["dataset"].get("type"):
                    problems.append("model-index: a result needs task, dataset with type and name, and metrics")
        self.hub.metadata_problems += problems
        self._answer({"errors": [{"message": problem} for problem in problems], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".bin")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer()

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        oid = self.hub.commit(repo, [line for line in lines if line["key"] != "header"])
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if repo not in self.hub.commits:
            return self._missing("RepoNotFound")
        oid, files = self.hub.files(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self._answer({"id": repo, "modelId": repo, "sha": oid, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        _, files = self.hub.files(repo, revision)
        inside = {path: content for path, content in files.items() if path.startswith(folder)}
        if folder and not inside:
            return self._missing("EntryNotFound")
        self._answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in inside.items()
            ]
        )

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.commits:
            return self._missing("RepoNotFound")
        oid, files = self.hub.files(repo, revision)
        if path not in files:
            return self._missing("EntryNotFound")
        self._answer(files[path], ETag=f'"{hashlib.sha256(files[path]).hexdigest()}"', X_Repo_Commit=oid)


ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


@contextmanager
def serve(hub: Hub):
    """Runs `hub` while the block lasts; `hub.endpoint` is its address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
