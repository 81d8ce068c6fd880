"""The Hub's HTTP calls, as a function from a request to a response; sockets are elsewhere.

Paths, bodies and headers are those that the source of huggingface_hub 2.4 sends and reads.
"""

from __future__ import annotations

from urllib.parse import parse_qs, quote

from hub_http import Refusal, Request, Response, as_json, ranged
from hub_repos import Repo
from hub_uploads import KINDS, Uploads


class Hub(Uploads):
    """The answers to all requests. See `Uploads` for what can be set."""

    def answer(self, request: Request) -> Response:
        """The response to a request to the Hub itself."""
        try:
            return self._route(request)
        except Refusal as refusal:
            return refusal.response

    def answer_cdn(self, request: Request) -> Response:
        """The response of the second origin, which serves and takes objects without tokens."""
        if request.token is not None:
            return Response(400, b"a token leaked to another host")
        kind, *rest = request.segments
        if request.method == "PUT" and kind == "object":
            self.objects[rest[0]] = request.body
            return Response(headers={"ETag": '"whole"'})
        if request.method == "PUT" and kind == "part":
            self.parts[rest[0], int(rest[1])] = request.body
            return Response(headers={"ETag": f'"part-{rest[1]}"'})
        if request.method in ("GET", "HEAD") and rest[0] in self.objects:
            return ranged(self.objects[rest[0]], request, {"ETag": f'"{rest[0]}"'})
        return Response(404)

    def _route(self, request: Request) -> Response:
        if request.token is not None and request.token not in self.tokens:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        match [request.method, *request.segments]:
            case ["GET", "api", "whoami-v2"]:
                name = self.user_of(request)
                auth = {"accessToken": {"displayName": "test", "role": "write"}}
                return as_json({"name": name, "type": "user", "auth": auth, "orgs": []})
            case ["POST", "api", "repos", "create"]:
                return self.create(request)
            case ["DELETE", "api", "repos", "delete"]:
                repo = self.named(request)
                self.writable(repo, request)
                del self.repos[repo.kind, repo.id]
                return Response()
            case ["POST", "api", "validate-yaml"]:
                return as_json({"errors": [], "warnings": []})
            case ["GET", "api", kind, owner, name] if kind in KINDS:
                return self._info(self.repo_for(request, kind, owner, name), "main")
            case ["GET", "api", kind, owner, name, "revision", revision] if kind in KINDS:
                return self._info(self.repo_for(request, kind, owner, name), revision)
            case ["GET", "api", kind, owner, name, "refs"] if kind in KINDS:
                return as_json(self.repo_for(request, kind, owner, name).listed_refs())
            case ["GET", "api", kind, owner, name, "tree", revision, *path] if kind in KINDS:
                repo = self.repo_for(request, kind, owner, name)
                return self._tree(request, repo, revision, "/".join(path))
            case ["POST", "api", kind, owner, name, "paths-info", revision] if kind in KINDS:
                files = self.files_at(self.repo_for(request, kind, owner, name), revision)
                paths = parse_qs(request.body.decode())["paths"]
                return as_json([files[p].described(p) for p in paths if p in files])
            case ["POST", "api", kind, owner, name, "preupload", revision] if kind in KINDS:
                return self.preupload(request, self.repo_for(request, kind, owner, name), revision)
            case ["POST", "api", kind, owner, name, "commit", revision] if kind in KINDS:
                return self.commit(request, self.repo_for(request, kind, owner, name), revision)
            case ["POST", "api", kind, owner, name, "branch", branch] if kind in KINDS:
                return self.branch(request, self.repo_for(request, kind, owner, name), branch)
            case ["POST", "api", kind, owner, name, "tag", revision] if kind in KINDS:
                return self.tag(request, self.repo_for(request, kind, owner, name), revision)
            case ["POST", "lfs", "complete", sha256, parts]:
                return self.complete(request, sha256, int(parts))
            case ["POST", "lfs", "verify"]:
                size = len(self.objects.get(request.json["oid"], b""))
                return Response(200 if size == request.json["size"] else 404)
            case ["GET" | "HEAD" | "POST", *_]:
                return self._git(request)
        return Response(404)

    def _git(self, request: Request) -> Response:
        """Paths that begin with the repository: /[datasets/]owner/name..."""
        kind = request.segments[0] if request.segments[0] in KINDS else "models"
        match request.segments[kind != "models" :]:
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                repo = self.repo_for(request, kind, owner, name.removesuffix(".git"))
                self.writable(repo, request)
                return self.batch(request)
            case [owner, name, "resolve", revision, *path]:
                repo = self.repo_for(request, kind, owner, name)
                return self._resolve(request, repo, revision, "/".join(path))
        return Response(404)

    def _info(self, repo: Repo, revision: str) -> Response:
        files = self.files_at(repo, revision)
        return as_json(
            {
                "id": repo.id,
                "modelId": repo.id,
                "sha": repo.resolve(revision),
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "siblings": [blob.sibling(path) for path, blob in sorted(files.items())],
            }
        )

    def _tree(self, request: Request, repo: Repo, revision: str, folder: str) -> Response:
        under = f"{folder}/" if folder else ""
        files = {p: b for p, b in self.files_at(repo, revision).items() if p.startswith(under)}
        if folder and not files:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        told = {p: b.described(p) for p, b in files.items()}
        for path in files:
            parts = path[len(under) :].split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                name = under + "/".join(parts[:depth])
                told[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            told = {p: each for p, each in told.items() if "/" not in p[len(under) :]}
        start = int(request.query.get("cursor", ["0"])[0])
        response = as_json([told[path] for path in sorted(told)[start : start + self.page]])
        if start + self.page < len(told):
            more = f"{self.url}{request.path}?recursive=true&cursor={start + self.page}"
            response.headers["Link"] = f'<{more}>; rel="next"'
        return response

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        files = self.files_at(repo, revision)
        if repo.gated and self.tokens.get(request.token or "") not in {repo.owner, *self.granted}:
            status = 401 if request.token is None else 403
            raise Refusal(status, "GatedRepo", f"Access to model {repo.id} is restricted")
        commit = repo.resolve(revision) or ""
        if path not in files:
            told = {"X-Repo-Commit": commit}
            raise Refusal(404, "EntryNotFound", "Entry not found", **told)
        blob = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return ranged(blob.data, request, headers)
        headers |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(len(blob.data)),
            "Location": f"{self.cdn}/object/{blob.sha256}?name={quote(path)}",
        }
        return Response(302, b"", headers)
