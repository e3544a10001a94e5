"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as pushing, listing and fetching need, in a thread."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 2**11
"""Bytes; a larger file goes through LFS, as the Hub's own rule sends every .safetensors there."""


@dataclass
class Repo:
    private: bool
    gated: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commit → path → sha256 of its content."""
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        sha = hashlib.sha1(json.dumps([len(self.commits), files, message]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Repositories and contents by sha256; `paths` lists every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lfs: set[str] = set()
        self.paths: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo].resolve(revision)
        assert commit is not None
        return {path: self.blobs[digest] for path, digest in self.repos[repo].commits[commit].items()}

    def etag(self, digest: str) -> str:
        content = self.blobs[digest]
        return digest if digest in self.lfs else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        path = self._path()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._with_commit(found[1], unquote(found[2]), self._tree)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._with_commit(found[1], unquote(found[2] or "main"), self._info)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_commit(found[1], unquote(found[2]), lambda name, repo, commit: self._resolve(repo, commit, unquote(found[3])))
        else:
            self._json({"error": path}, 404)

    do_HEAD = do_GET  # noqa: N815  # the server asks for this name

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            repo, branch = self.hub.repos[found[1]], unquote(found[2])
            taken = branch in repo.refs
            repo.refs.setdefault(branch, repo.refs["main"])
            self._json({}, 409 if taken else 201)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self._with_commit(found[1], unquote(found[2]), lambda _name, repo, commit: self._preupload(repo, commit, json.loads(body)))
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._with_commit(found[1], unquote(found[2]), lambda name, repo, commit: self._commit(name, repo, commit, found[2], body))
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        digest, body = self._path().removeprefix("/upload/"), self._body()
        assert self.hub.store(body) == digest
        self._send(b"")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}, 409)
            return
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private", False))
        repo.commit("main", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit")
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _info(self, name: str, repo: Repo, commit: str) -> None:
        files = [{"rfilename": path} for path in repo.commits[commit]]
        self._json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": files, "tags": []})

    def _tree(self, _name: str, repo: Repo, commit: str) -> None:
        listed = []
        for path, digest in repo.commits[commit].items():
            size = len(self.hub.blobs[digest])
            entry = {"type": "file", "path": path, "size": size, "oid": self.hub.etag(digest)}
            listed.append(entry | ({"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if digest in self.hub.lfs else {}))
        self._json(listed)

    def _resolve(self, repo: Repo, commit: str, path: str) -> None:
        digest = repo.commits[commit].get(path)
        if digest is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content, etag = self.hub.blobs[digest], self.hub.etag(digest)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if digest in self.hub.lfs else {}
        self._send(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit, **linked})

    def _preupload(self, repo: Repo, commit: str, asked: dict[str, Any]) -> None:
        there, answers = repo.commits[commit], []
        for file in asked["files"]:
            large = file["size"] > LARGE or file["path"].endswith(".safetensors")
            oid = self.hub.etag(there[file["path"]]) if file["path"] in there else None
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{each['oid']}"}}}
            objects.append({**each, **({} if each["oid"] in self.hub.blobs else upload)})
            self.hub.lfs.add(each["oid"])
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, parent: str, branch: str, body: bytes) -> None:
        files, title = dict(repo.commits[parent]), ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                assert len(self.hub.blobs[value["oid"]]) == value["size"]
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line["key"])
        sha = repo.commit(unquote(branch), files, title)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})

    def _with_commit(self, name: str, revision: str, answer: Any) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated:
            self._json({"error": "Access to model is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        elif (commit := repo.resolve(revision)) is None:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            answer(name, repo, commit)

    def _path(self) -> str:
        parts = urlsplit(self.path)
        self.hub.paths.append(f"{self.command} {parts.path}")
        assert "cursor" not in parse_qs(parts.query)
        return parts.path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
