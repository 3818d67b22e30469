"""A Hub on loopback: as much of its protocol as the real huggingface_hub client speaks without Xet.

It checks what it receives, keeps every commit, and can fail on purpose.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackTokenThatNobodyMaySee"
FILE = r"(?P<rev>[^/]+)/(?P<path>.+)"
REPO = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"


@dataclass
class Repo:
    """Files by path, a commit after another; commits[0] is the empty repo's. `branches` are beside
    them; of a `gated` repo anybody sees the names of the files, and nobody gets them."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    titles: dict[int, str] = field(default_factory=lambda: {0: "initial commit"})

    def last_commit(self, path: str, sha: str) -> dict[str, str]:
        """Of the last change to a file, as of commit `sha`."""
        number = next(i for i in range(len(self.commits)) if self.sha(i) == sha)
        content = self.commits[number][path]
        while number and self.commits[number - 1].get(path) == content:
            number -= 1
        title = self.titles.get(number, "by hand")
        return {"id": self.sha(number), "title": title, "date": "2026-01-01T00:00:00.000Z"}

    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def sha(self, number: int = -1) -> str:
        number %= len(self.commits)
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit id, files) of a branch or commit."""
        found = {self.sha(i): files for i, files in enumerate(self.commits)}
        for name, files in self.branches.items():
            branch = hashlib.sha1(f"{id(self)} {name}".encode()).hexdigest()
            found[branch], revision = files, branch if revision == name else revision
        revision = self.sha() if revision == "main" else revision
        return (revision, found[revision]) if revision in found else None


@dataclass
class Fault:
    """What happens to the next `times` requests that `pattern` matches ("METHOD /path").

    A status is answered with it; "cut" hangs up in the middle of an upload, or of the answer to a
    GET; "lost" does what was asked and hangs up instead of answering.
    """

    pattern: str
    what: int | str
    times: int = 1
    retry_after: int | None = None


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, sample: bytes) -> bool:
    return path.endswith((".pt", ".safetensors", ".parquet")) or b"\0" in sample


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address) -> None:
        if not isinstance(sys.exception(), OSError):  # whoever hung up meant it
            super().handle_error(request, address)


class Hub:
    """The server: `with Hub() as hub`, then hub.url, hub.repos, hub.faults, hub.requests."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}  # by "models/owner/name"
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []  # that downloads asked for
        self.moved: dict[str, str] = {}  # names of data sets by their old ones
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """For a client of this server and of nothing else."""
        local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return local | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Puts a repo there, by "models/owner/name" or "datasets/owner/name"."""
        self.repos[name] = Repo(private, [{".gitattributes": b""}, files])
        return self.repos[name]

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection. `routes` maps "METHOD /path" patterns to methods, at the end of the class."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    # --- Requests, faults and answers ---

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        fault = self.hub.next_fault(f"{self.command} {unquote(url.path)}")
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.what == "cut" and self.command != "GET":
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.rfile.read(length)
        try:
            if fault and isinstance(fault.what, int):
                raise Refusal(fault.what, "planned")
            for pattern, action in self.routes.items():
                if match := re.fullmatch(pattern, f"{self.command} {self.route}"):
                    parts = {
                        key: value and unquote(value) for key, value in match.groupdict().items()
                    }
                    status, headers, data = action(self, **parts)
                    break
            else:
                raise Refusal(404, "no such page")
        except Refusal as refusal:
            status, data = refusal.status, json.dumps({"error": str(refusal)}).encode()
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            if fault and fault.retry_after is not None:
                headers["Retry-After"] = str(fault.retry_after)
            if fault:  # servers in trouble do not speak JSON
                data = b"<html>planned</html>"
        if fault and fault.what == "lost":
            return self.hang_up()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if fault and fault.what == "cut":
            self.wfile.write(data[: len(data) // 2])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def answer(self, content, **headers: str):
        return 200, {"Content-Type": "application/json"} | headers, json.dumps(content).encode()

    # --- Who may do what ---

    def token(self) -> bool:
        """Whether the request has the right token. Raises Refusal for a wrong one."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given is not None

    def repo(self, kind: str, id: str, write: bool = False) -> Repo:
        allowed, repo = self.token(), self.hub.repos.get(f"{kind}/{id}")
        if repo is None or (repo.private and not allowed):
            raise Refusal(404 if allowed else 401, "Repository Not Found", "RepoNotFound")
        if write and not allowed:
            raise Refusal(403, "no write permission")
        return repo

    def revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repo.at(revision)
        if not found:
            raise Refusal(404, "Revision Not Found", "RevisionNotFound")
        return found

    # --- Publishing ---

    def create(self):
        request = json.loads(self.body)
        if not self.token():
            raise Refusal(401, "a token is needed")
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] != "you":
            raise Refusal(403, f"you may not create repos of {request['organization']}")
        kind = request.get("type") or "model"
        if kind == "space" and request.get("sdk") != "gradio":
            raise Refusal(400, "a space needs an sdk")
        if kind == "space" and request.get("hardware") != "zero-a10g":
            raise Refusal(402, "hosting Gradio Spaces on free cpu-basic requires a subscription")
        url, key = f"{self.hub.url}/{name}", f"{kind}s/{name}"
        with self.hub.lock:
            if key in self.hub.repos:
                content = {"error": f"You already created this {kind} repo", "url": url}
                return 409, {}, json.dumps(content).encode()
            if kind == "space" and sum(name.startswith("spaces/") for name in self.hub.repos) == 2:
                raise Refusal(402, "you host two Spaces on ZeroGPU already")
            self.hub.repos[key] = Repo(private=request.get("visibility") == "private")
        return self.answer({"url": url, "name": name})

    def validate_yaml(self):
        body = json.loads(self.body)
        match = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        key, valid = "language", "[a-z]{2,3}"
        if body["repoType"] == "space":
            key, valid = "sdk", "gradio|docker|static"
        value = data.get(key) if isinstance(data, dict) else None
        if not re.fullmatch(valid, value or ""):
            errors = [{"message": f'"{key}" with value "{value}" is not valid'}]
            return 400, {}, json.dumps({"errors": errors, "warnings": []}).encode()
        return self.answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, rev: str):
        _, files = self.revision(self.repo(kind, id, write=True), rev)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            lfs, oid = is_lfs(path, sample), None
            if path in files:
                data = files[path]
                oid = hashlib.sha256(data).hexdigest() if lfs else git_blob(data)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer({"files": answers})

    def lfs_batch(self, id: str):
        self.repo("models", id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                upload = f"{self.hub.url}/lfs/{wanted['oid']}/{wanted['size']}"
                verify = f"{self.hub.url}/{id}.git/info/lfs/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(wanted)
        return self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, size: str):
        if len(self.body) != int(size) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the upload is not what was announced")
        self.hub.objects[oid] = self.body
        return self.answer({})

    def lfs_verify(self, id: str):
        self.repo("models", id, write=True)
        announced = json.loads(self.body)
        if len(self.hub.objects.get(announced["oid"], b"")) != announced["size"]:
            raise Refusal(404, "no such object")
        return self.answer({})

    def commit(self, kind: str, id: str, rev: str):
        repo = self.repo(kind, id, write=True)
        header, *operations = map(json.loads, self.body.splitlines())
        files, gone = {}, set()
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                gone.add(value["path"])
            elif operation["key"] == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = data
            else:
                raise Refusal(400, f"unknown operation {operation['key']}")
        title = header["value"]["summary"] if header["key"] == "header" else ""
        if not title or not (files or gone) or not gone <= repo.commits[-1].keys():
            raise Refusal(400, "an empty commit, or one without a message")
        with self.hub.lock:
            kept = {path: data for path, data in repo.commits[-1].items() if path not in gone}
            repo.commits.append(kept | files)
            repo.titles[len(repo.commits) - 1] = title
        url = f"{self.hub.url}/{id}/commit/{repo.sha()}"
        return self.answer({"success": True, "commitOid": repo.sha(), "commitUrl": url})

    # --- Reading ---

    def info(self, kind: str, id: str, rev: str | None = None):
        repo = self.repo(kind, id)
        sha, files = self.revision(repo, rev or "main")
        siblings = [{"rfilename": path} for path in files]
        return self.answer(
            {"id": id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def refs(self, kind: str, id: str):
        branches = {"main": self.repo(kind, id).sha()} | self.repo(kind, id).branches
        converts = [name for name in branches if name.startswith("refs/convert/")]
        refs = [
            [{"name": name.split("/")[-1], "ref": name, "targetCommit": ""} for name in names]
            for names in (branches.keys() - converts, converts)
        ]
        return self.answer({"branches": refs[0], "converts": refs[1], "tags": []})

    def redirect(self, before: str, old: str, after: str):
        if old not in self.hub.moved:
            raise Refusal(404 if self.token() else 401, "Repository Not Found", "RepoNotFound")
        query = urlsplit(self.path).query
        return 307, {"Location": f"{before}/{self.hub.moved[old]}{after}?{query}"}, b""

    def entries(self, files: dict[str, bytes]) -> list[dict]:
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
            if is_lfs(path, data[:512]):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def tree(self, kind: str, id: str, rev: str, under: str | None = None):
        repo = self.repo(kind, id)
        sha, files = self.revision(repo, rev)
        prefix = f"{under}/" if under else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if under and not inside:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
            entries = self.entries(inside)
            if self.query.get("expand", ["false"])[0].lower() in ("true", "1"):
                for entry in entries:
                    entry["lastCommit"] = repo.last_commit(entry["path"], sha)
            return self.answer(entries)
        here = {path: data for path, data in inside.items() if "/" not in path[len(prefix) :]}
        folders = {prefix + p[len(prefix) :].split("/")[0] for p in inside.keys() - here.keys()}
        folders = [{"type": "directory", "path": f, "oid": "", "size": 0} for f in sorted(folders)]
        return self.answer(folders + self.entries(here))

    def paths_info(self, kind: str, id: str, rev: str):
        _, files = self.revision(self.repo(kind, id), rev)
        if self.headers["Content-Type"] == "application/json":
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        entries = self.entries({path: files[path] for path in paths if path in files})
        for path in paths:
            if any(file.startswith(f"{path}/") for file in files):
                entries.append({"type": "directory", "path": path, "oid": "", "size": 0})
        return self.answer(entries)

    def resolve(self, id: str, rev: str, path: str, prefix: str | None = None):
        repo = self.repo(prefix or "models", id)
        sha, files = self.revision(repo, rev)
        if repo.gated:
            raise Refusal(403, "you are not in the authorized list", "GatedRepo")
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data, status = files[path], 200
        lfs = is_lfs(path, data[:512])
        etag = hashlib.sha256(data).hexdigest() if lfs else git_blob(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.hub.ranges.append(match[0])
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        return status, headers, data

    routes: ClassVar = {
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": validate_yaml,
        rf"POST {API}/preupload/(?P<rev>[^/]+)": preupload,
        rf"POST {API}/commit/(?P<rev>[^/]+)": commit,
        rf"POST {API}/paths-info/(?P<rev>[^/]+)": paths_info,
        rf"POST /{REPO}\.git/info/lfs/objects/batch": lfs_batch,
        rf"POST /{REPO}\.git/info/lfs/verify": lfs_verify,
        r"PUT /lfs/(?P<oid>\w+)/(?P<size>\d+)": lfs_upload,
        rf"GET {API}": info,
        rf"GET {API}/revision/(?P<rev>[^/]+)": info,
        rf"GET {API}/tree/(?P<rev>[^/]+)(/(?P<under>.+))?": tree,
        rf"GET {API}/refs": refs,
        r"(GET|HEAD) (?P<before>(/api)?/datasets)/(?P<old>[^/]+)"
        r"(?P<after>|/(tree|revision|resolve|refs)(/.*)?)": redirect,
        rf"(GET|HEAD) (/(?P<prefix>datasets|spaces))?/{REPO}/resolve/{FILE}": resolve,
    }
