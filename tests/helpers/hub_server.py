"""A local Hugging Face Hub with the part of the HTTP protocol that transformers and datasets use.

A repository is a list of snapshots in memory, a dictionary of files for every commit. Large files follow the LFS
protocol: batch, upload, verification, commit, and a redirection to another host, the "CDN", on reading. Xet is not
supported, so clients set HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "somebody", "hf_good"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
DATASETS = "datasets/"
# What the Hub accepts as a dataset in a model card's metadata.
DATASET_PATTERN = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)

Snapshot = dict[str, bytes]


@dataclass
class Repository:
    """Commits are (message, snapshot) by sha, in the order of their arrival."""

    commits: dict[str, tuple[str, Snapshot]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, snapshot: Snapshot) -> str:
        content = repr((len(self.commits), message, sorted(snapshot))).encode()
        sha = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[sha] = message, snapshot
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> Snapshot:
        return self.commits[self.sha(revision)][1]

    def messages(self) -> list[str]:
        return [message for message, _ in self.commits.values()]


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` answers at `hub.endpoint`.

    Attributes:
        repositories: Repositories by id, "somebody/name"; those of datasets by "datasets/somebody/name".
        objects: Large files that have arrived whole and verified, by sha256.
        requests: Method and path of all requests.
        log: Function that is called with each request.
        uploads_to_break: Number of uploads of large files whose connection is reset before the answer.
        uploads_to_refuse: Number of uploads after these that are refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}/cdn"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.log: Callable[[str], Any] = lambda request: None
        self.uploads_to_break = self.uploads_to_refuse = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()


class _RefusalError(Exception):
    def __init__(self, status: int, code: str | None, message: str):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            self.server.log(self.server.requests[-1])
        try:
            if self.command != "PUT":
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = self.headers.get("Authorization")
            if given not in (None, f"Bearer {TOKEN}"):
                raise _RefusalError(401, None, "Invalid credentials in Authorization header")
            self.may_write = given is not None
            for command, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in command:
                    return answer(self, **match.groupdict())
            raise _RefusalError(404, None, f"no route for {self.command} {path}")
        except _RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": refusal.message}, refusal.status, headers)

    def answer(self, content: Any = b"", status: int = 200, headers: dict[str, Any] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def writer(self) -> None:
        if not self.may_write:
            raise _RefusalError(401, None, "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        if repo not in self.server.repositories:
            raise _RefusalError(404 if self.may_write else 401, "RepoNotFound", "Repository not found")
        return self.server.repositories[repo]

    def snapshot(self, repo: str, revision: str) -> tuple[str, Snapshot]:
        repository = self.repository(repo)
        sha = repository.sha(revision)
        if sha is None:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.files(sha)

    # --- accounts and repositories

    def whoami(self) -> None:
        self.writer()
        self.answer({"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def create(self) -> None:
        self.writer()
        wanted = json.loads(self.body)
        owner = wanted["organization"] or USER
        if owner != USER:
            raise _RefusalError(
                403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        prefix = DATASETS if wanted.get("type") == "dataset" else ""
        repo = f"{prefix}{owner}/{wanted['name']}"
        address = {"url": f"{self.server.endpoint}/{repo}"}
        if repo in self.server.repositories:
            return self.answer(address | {"error": "You already created this repo"}, 409)
        repository = self.server.repositories[repo] = Repository()
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS)
        repository.commit("main", "initial commit", {".gitattributes": attributes.encode()})
        self.answer(address)

    def branch(self, repo: str, branch: str) -> None:
        self.writer()
        repository = self.repository(repo)
        if branch in repository.branches:
            raise _RefusalError(409, None, "Reference already exists")
        start = (json.loads(self.body or b"{}") or {}).get("startingPoint", "main")
        repository.branches[branch] = self.snapshot(repo, start)[0]
        self.answer({})

    def info(self, repo: str, revision: str = "main") -> None:
        sha, files = self.snapshot(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        name = repo.removeprefix(DATASETS)
        self.answer({"id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def refs(self, repo: str) -> None:
        branches = self.repository(repo).branches.items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.answer({"branches": named, "tags": [], "converts": []})

    def history(self, repo: str, revision: str) -> None:
        """Send the commits of a repository whose only branch is main."""
        self.snapshot(repo, revision)
        about = {"authors": [{"user": USER}], "date": "2000-01-01T00:00:00.000Z", "message": ""}
        commits = [about | {"id": sha, "title": title} for sha, (title, _) in self.repository(repo).commits.items()]
        self.answer(commits[::-1])

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self.snapshot(repo, revision)
        start = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(start)}
        if folder and not inside:
            raise _RefusalError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        recursive = "recursive=true" in self.path.lower()
        entries, folders = [], set()
        for path, content in sorted(inside.items()):
            parts = path.removeprefix(start).split("/")
            folders.update(start + "/".join(parts[:depth]) for depth in range(1, len(parts) if recursive else 2))
            if recursive or len(parts) == 1:
                entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                if path.endswith(LFS_ENDINGS):
                    entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
        folders -= inside.keys()
        self.answer([*entries, *({"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders))])

    # --- writing

    def validate_card(self) -> None:
        content = json.loads(self.body)["content"]
        errors = []
        try:
            metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---\n") else {}
        except yaml.YAMLError as error:
            metadata = {}
            errors.append(str(error))
        datasets = list(metadata.get("datasets", []))
        datasets += [
            result["dataset"]["type"] for model in metadata.get("model-index", []) for result in model["results"]
        ]
        errors += [f"{name!r} fails to match" for name in datasets if not DATASET_PATTERN.fullmatch(name)]
        messages = [{"message": message} for message in errors]
        self.answer({"errors": messages, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        self.writer()
        _, files = self.snapshot(repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, is_large = file["path"], file["path"].endswith(LFS_ENDINGS)
            answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = (_sha256 if is_large else _git_hash)(files[path])
            answers.append(answer)
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.writer()
        self.repository(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.endpoint}/lfs/upload/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.server.endpoint}/lfs/verify"}}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.uploads_to_break:
            self.server.uploads_to_break -= 1
            # Older versions of the client repeat an upload after a reset, but not after the end of the connection. A
            # reset may look like an end to a client that is still sending.
            self.rfile.read(size)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        content = self.rfile.read(size)
        if self.server.uploads_to_refuse:
            self.server.uploads_to_refuse -= 1
            raise _RefusalError(403, None, "the upload has expired")
        if _sha256(content) != oid:
            raise _RefusalError(400, None, f"{len(content)} bytes arrived that are not {oid}")
        self.server.objects[oid] = content
        self.answer()

    def lfs_verify(self) -> None:
        self.writer()
        wanted = json.loads(self.body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _RefusalError(404, None, f"{wanted['oid']} has not arrived")
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        self.writer()
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.server.lock:  # a client may commit from several threads
            files = dict(self.snapshot(repo, revision)[1])
            for operation in operations:
                self.apply(operation["key"], operation["value"], files)
            sha = self.repository(repo).commit(revision, header["value"]["summary"], files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}"})

    def apply(self, kind: str, value: dict[str, Any], files: Snapshot) -> None:
        if kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in self.server.objects:
                raise _RefusalError(400, None, f"{value['path']}: {value['oid']} has not been uploaded")
            files[value["path"]] = self.server.objects[value["oid"]]
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise _RefusalError(400, None, f"unknown operation {kind}")

    # --- reading

    def resolve(self, repo: str, revision: str, file: str) -> None:
        sha, files = self.snapshot(repo, revision)
        if file not in files:
            raise _RefusalError(404, "EntryNotFound", f"{file} does not exist on {revision!r}")
        content = files[file]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not file.endswith(LFS_ENDINGS):
            return self.send_range(content, headers | {"ETag": f'"{_git_hash(content)}"'})
        oid = _sha256(content)
        linked = {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{oid}"', "Location": f"{self.server.cdn}/{oid}"}
        self.answer(b"", 302, headers | linked)

    def from_cdn(self, oid: str) -> None:
        if self.may_write:
            raise _RefusalError(400, None, "a token has been sent to the CDN")
        self.send_range(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def send_range(self, content: bytes, headers: dict[str, Any]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(content, 200, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.answer(content[start : end + 1], 206, headers)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


REPO = rf"(?P<repo>(?:{DATASETS})?[^/]+/[^/]+?)"
API = rf"/api/(?:models/|(?={DATASETS})){REPO}"
ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_card),
    (("GET",), rf"{API}/refs", _Handler.refs),
    (("POST",), rf"{API}/branch/(?P<branch>.+)", _Handler.branch),
    (("GET",), rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), rf"{API}/commits/(?P<revision>.+)", _Handler.history),
    (("POST",), rf"{API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>.+)", _Handler.commit),
    (("GET",), rf"{API}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), API, _Handler.info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/upload/(?P<oid>\w+)", _Handler.lfs_upload),
    (("POST",), r"/lfs/verify", _Handler.lfs_verify),
    (("HEAD", "GET"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (("HEAD", "GET"), r"/cdn/(?P<oid>\w+)", _Handler.from_cdn),
]


if __name__ == "__main__":
    # Serve commands that are run by hand, as in docs/how-to/publishing.md, and print every request until interrupted.
    with HubServer() as hub:
        hub.log = functools.partial(print, flush=True)
        hub.log(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
