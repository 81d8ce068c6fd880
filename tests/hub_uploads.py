"""What changes a repository of the Hub for tests: creating, uploading in both ways, committing."""

from __future__ import annotations

import base64
import json
from math import ceil
from typing import Any
from urllib.parse import urlencode

from hub_http import Refusal, Request, Response, as_json
from hub_repos import Blob, Repo

SIGNATURE = "s1gned"  # whoever knows an address with it may upload
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Uploads:
    """Repositories, users and large objects, and the calls that change them.

    tokens: token -> user name. readers: tokens that may only read. renamed: old name -> name of a
    repository, whose calls are redirected. granted: users that may read gated repositories.
    threshold: bytes from which a file is large, as are all .sdelta and .safetensors. chunk: bytes
    of a part of a multipart upload, for objects larger than it. page: entries of one page of a tree.
    """

    def __init__(self) -> None:
        self.url = self.cdn = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, str] = {}
        self.readers: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.granted: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.threshold = 10_000_000
        self.chunk: int | None = None
        self.page = 1000

    def create(self, request: Request) -> Response:
        """A new repository; 409 with the same body where there is one."""
        asked, user = request.json, self.user_of(request)
        owner = asked.get("organization") or user
        if owner != user or request.token in self.readers:
            raise Refusal(403, None, f"You don't have the rights to create under {owner}")
        kind, name = asked.get("type", "model"), f"{owner}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"
        prefix = "" if kind == "model" else f"{kind}s/"
        told = {"url": f"{self.url}/{prefix}{name}"}
        if (kind, name) in self.repos:
            return Response(409, json.dumps({**told, "error": "You already created it"}).encode())
        self.repos[kind, name] = Repo(kind, name, bool(private))
        return as_json(told)

    def preupload(self, request: Request, repo: Repo, revision: str) -> Response:
        """Which files are large, and what is there already under their names."""
        self.writable(repo, request)
        present = self.files_at(repo, revision)
        ignored = present[".gitignore"].data.decode().split() if ".gitignore" in present else []
        told = []
        for file in request.json["files"]:
            path = file["path"]
            lfs = file["size"] >= self.threshold or path.endswith((".sdelta", ".safetensors"))
            mode = "lfs" if lfs else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored})
            if path in present:
                told[-1]["oid"] = present[path].etag
        return as_json({"files": told})

    def batch(self, request: Request) -> Response:
        """Where the objects go that are not there yet: to the CDN, whole or in parts."""
        told = [self._place(each["oid"], each["size"]) for each in request.json["objects"]]
        parts = any("header" in each.get("actions", {}).get("upload", {}) for each in told)
        return as_json({"transfer": "multipart" if parts else "basic", "objects": told})

    def _place(self, sha256: str, size: int) -> dict[str, Any]:
        told: dict[str, Any] = {"oid": sha256, "size": size}
        if sha256 in self.objects:
            return told
        upload: dict[str, Any] = {"href": f"{self.cdn}/object/{sha256}?signature={SIGNATURE}"}
        if self.chunk is not None and size > self.chunk:
            count = ceil(size / self.chunk)
            part = f"{self.cdn}/part/{sha256}"
            parts = {str(n): f"{part}/{n}?signature={SIGNATURE}" for n in range(1, count + 1)}
            upload = {
                "href": f"{self.url}/lfs/complete/{sha256}/{count}",
                "header": {"chunk_size": str(self.chunk), **parts},
            }
        verify = {"href": f"{self.url}/lfs/verify"}
        return {**told, "actions": {"upload": upload, "verify": verify}}

    def complete(self, request: Request, sha256: str, count: int) -> Response:
        """Put the parts of a multipart upload together."""
        expected = [{"partNumber": n, "etag": f'"part-{n}"'} for n in range(1, count + 1)]
        if request.json != {"oid": sha256, "parts": expected}:
            return Response(400, b"other parts than were sent")
        data = b"".join(self.parts.pop((sha256, n)) for n in range(1, count + 1))
        if Blob(data).sha256 != sha256:
            return Response(400, b"other bytes than were promised")
        self.objects[sha256] = data
        return Response()

    def commit(self, request: Request, repo: Repo, revision: str) -> Response:
        """All changes at once, or none."""
        self.writable(repo, request)
        present = self.files_at(repo, revision)
        changes: dict[str, Blob | None] = {}
        for line in request.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header" and value.get("parentCommit") not in (None, repo.resolve(revision)):
                raise Refusal(412, None, "The branch has moved since the parent commit")
            if key == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, None, f"{value['path']} was not uploaded")
                changes[value["path"]] = Blob(self.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                changes[value["path"]] = None
            elif key == "deletedFolder":
                under = value["path"].rstrip("/") + "/"
                changes |= dict.fromkeys(path for path in present if path.startswith(under))
        oid = repo.commit(revision, changes)
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        url = f"{self.url}/{prefix}{repo.id}/commit/{oid}"
        return as_json({"success": True, "commitOid": oid, "commitUrl": url})

    def branch(self, request: Request, repo: Repo, name: str) -> Response:
        """A new branch, of main's head unless the request tells another start."""
        self.writable(repo, request)
        if name in repo.refs:
            return Response(409, b"{}")
        repo.refs[name] = repo.resolve(request.json.get("startingPoint", "main")) or ""
        return Response()

    def tag(self, request: Request, repo: Repo, revision: str) -> Response:
        """A new tag of a revision."""
        self.writable(repo, request)
        name = request.json["tag"]
        if name in repo.refs:
            return Response(409, b"{}")
        self.files_at(repo, revision)
        repo.tag(name, revision)
        return Response()

    def user_of(self, request: Request) -> str:
        """Who asks; 401 for nobody."""
        if request.token is None:
            raise Refusal(401, None, "Invalid username or password.")
        return self.tokens[request.token]

    def repo_for(self, request: Request, kind: str, owner: str, name: str) -> Repo:
        """The repository, if the request may know of it: what is private is told as missing."""
        user = None if request.token is None else self.tokens[request.token]
        new = self.renamed.get(f"{owner}/{name}")
        if new is not None:
            there = request.path.replace(f"/{owner}/{name}", f"/{new}", 1)
            query = urlencode(request.query, doseq=True)
            raise Refusal(307, None, "Moved", Location=f"{self.url}{there}?{query}")
        repo = self.repos.get((KINDS[kind], f"{owner}/{name}"))
        if repo is None or (repo.private and user != repo.owner):
            status = 401 if user is None else 404
            raise Refusal(status, "RepoNotFound", "Repository not found")
        return repo

    def named(self, request: Request) -> Repo:
        """The repository that the body names."""
        asked = request.json
        owner = asked.get("organization") or self.user_of(request)
        return self.repo_for(request, f"{asked.get('type', 'model')}s", owner, asked["name"])

    def writable(self, repo: Repo, request: Request) -> None:
        """Refuse who may not write."""
        if self.user_of(request) != repo.owner or request.token in self.readers:
            raise Refusal(403, None, "You don't have the rights to write to this repository")

    def files_at(self, repo: Repo, revision: str) -> dict[str, Blob]:
        """The files at a revision, which must exist."""
        if repo.resolve(revision) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.files(revision)
