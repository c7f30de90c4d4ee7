"""A loopback Hugging Face Hub: repositories, commits, LFS uploads, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from servers.loopback import Answer, Loopback, Request

LFS_FROM_BYTES = 1000
"""Minimum size of an LFS file in bytes; smaller files are part of the commit."""
_KINDS = r"(?P<kind>model|dataset|space)s"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """A repository with its history. A commit maps paths to contents."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    """Paths of LFS files."""
    hardware: str = ""
    """Hardware that was last requested for a Space."""
    card_data: dict = field(default_factory=dict)
    """Front matter of the card."""

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class Hub(Loopback):
    """A Hub with one user, whose token is `token`. `uploads` lists the uploaded paths in order."""

    def __init__(self, token: str = "hf_" + 30 * "t"):
        super().__init__()
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        """sha256 of LFS objects and paths of committed small files, each as often as its content was sent."""
        self.corrupt_commits = False
        """Whether a byte of each uploaded LFS object is flipped."""

    def add(self, kind: str, name: str, folder: Path, commit: str = "", private: bool = False) -> None:
        """Add a repository with the files of `folder`."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[kind, name] = Repo(private, {commit or _sha1(name.encode()): files}, lfs=set())

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """Return the files of a repository's main branch."""
        repo = self.repos[kind, name]
        return repo.commits[repo.head]

    # ---- requests of the client

    def answer(self, request: Request) -> None:
        self._authenticate(request)
        for pattern, respond in (
            (r"POST /api/repos/create", self._create),
            (rf"GET /api/{_KINDS}/{_REPO}(/revision/(?P<revision>[^/]+))?", self._info),
            (rf"GET /api/{_KINDS}/{_REPO}/lfs-files", self._lfs_files),
            (rf"GET /api/{_KINDS}/{_REPO}/runtime", self._runtime),
            (rf"POST /api/{_KINDS}/{_REPO}/hardware", self._hardware),
            (rf"POST /api/{_KINDS}/{_REPO}/lfs-files/batch", self._delete_lfs_files),
            (rf"GET /api/{_KINDS}/{_REPO}/tree/(?P<revision>[^/]+)", self._tree),
            (r"POST /api/validate-yaml", self._validate_card),
            (rf"POST /api/{_KINDS}/{_REPO}/preupload/(?P<revision>[^/]+)", self._preupload),
            (rf"POST /api/{_KINDS}/{_REPO}/commit/(?P<revision>[^/]+)", self._commit),
            (rf"POST /((?P<kind>dataset|space)s/)?{_REPO}\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/(?P<oid>\w{64})", self._put),
            (r"POST /lfs-verify", self._verify),
            (
                rf"(GET|HEAD) /((?P<kind>dataset|space)s/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
                self._resolve,
            ),
            (rf"GET /api/{_KINDS}", self._listed),
            (r"POST /api/validate-yaml", self._validate_card),
        ):
            match = re.fullmatch(pattern, f"{request.method} {request.path}")
            if match:
                named = match.groupdict()
                if "repo" in named:
                    named["kind"] = named["kind"] or "model"
                    named["repo"] = self._repo(request, named["kind"], named["repo"])
                respond(request, **named)

    def _authenticate(self, request: Request) -> None:
        given = request.headers.get("authorization")
        if given and given != f"Bearer {self.token}":
            raise Answer(401, {"error": f"Invalid token {given}"}, {"X-Error-Message": "Invalid credentials"})
        if not given and request.method != "PUT" and request.method not in ("GET", "HEAD"):
            raise Answer(401, {"error": "Invalid username or password."})

    def _repo(self, request: Request, kind: str, name: str) -> Repo:
        repo = self.repos.get((kind, name))
        authorised = "authorization" in request.headers
        if repo is None or (repo.private and not authorised):
            raise Answer(404 if authorised else 401, {"error": "no such thing"}, {"X-Error-Code": "RepoNotFound"})
        repo.name = name
        return repo

    def _revision(self, repo: Repo, revision: str | None) -> str:
        commit = repo.head if revision in (None, "main") else revision
        if commit not in repo.commits:
            raise Answer(404, {"error": "no such thing"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _create(self, request: Request) -> None:
        fields = request.json
        kind, name = fields.get("type") or "model", f"{fields['organization']}/{fields['name']}"
        if (kind, name) in self.repos:
            raise Answer(409, {"error": "You already created this repo", "url": self._url(kind, name)})
        private = fields.get("visibility") == "private" or bool(fields.get("private"))
        self.repos[kind, name] = Repo(private, {_sha1(f"{kind} {name}".encode()): {".gitattributes": b"* text"}})
        self.repos[kind, name].hardware = fields.get("hardware", "")
        raise Answer(200, {"url": self._url(kind, name), "name": name, "id": name})

    def _url(self, kind: str, name: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{name}"

    def _runtime(self, request: Request, kind: str, repo: Repo) -> None:
        fields = {"current": None, "requested": repo.hardware or None}
        raise Answer(200, {"stage": "BUILDING", "hardware": fields, "gcTimeout": None, "storage": None})

    def _hardware(self, request: Request, kind: str, repo: Repo) -> None:
        repo.hardware = request.json["flavor"]
        self._runtime(request, kind, repo)

    def _info(self, request: Request, kind: str, repo: Repo, revision: str | None) -> None:
        commit = self._revision(repo, revision)
        raise Answer(200, self._fields(kind, repo.name, repo, commit))

    def _fields(self, kind: str, name: str, repo: Repo, commit: str) -> dict:
        fields = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": []}
        entries = [self._entry(repo, path, content) for path, content in repo.commits[commit].items()]
        siblings = [{"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]} for one in entries]
        for sibling, lfs in zip(siblings, (one.get("lfs") for one in entries)):
            sibling |= {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
        return {**fields, "downloads": 0, "likes": 0, "siblings": siblings, "cardData": repo.card_data}

    def _listed(self, request: Request, kind: str) -> None:
        author = request.query.get("author", [""])[0]
        named = [(name, repo) for (found, name), repo in self.repos.items() if found == kind]
        seen = [(n, repo) for n, repo in named if "authorization" in request.headers or not repo.private]
        raise Answer(200, [self._fields(kind, n, repo, repo.head) for n, repo in seen if n.startswith(f"{author}/")])

    def _tree(self, request: Request, kind: str, repo: Repo, revision: str) -> None:
        files = repo.commits[self._revision(repo, revision)]
        raise Answer(200, [self._entry(repo, path, content) for path, content in files.items()])

    def _entry(self, repo: Repo, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
        if path in repo.lfs:
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def _validate_card(self, request: Request) -> None:
        """Refuse a card whose front matter is not a YAML mapping."""
        head = yaml.safe_load(request.json["content"].split("---")[1])
        errors = [] if isinstance(head, dict) else [{"message": "the head of the card is no mapping"}]
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, request: Request, kind: str, repo: Repo, revision: str) -> None:
        files = repo.commits[self._revision(repo, revision)]
        fields = []
        for file in request.json["files"]:
            mode = "lfs" if file["size"] >= LFS_FROM_BYTES else "regular"
            known = files.get(file["path"])
            oid = known is not None and (_lfs_oid(known) if file["path"] in repo.lfs else _git_sha1(known))
            fields.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid or None})
        raise Answer(200, {"files": fields})

    def _validate_card(self, request: Request) -> None:
        """Commit files; check the front matter of a README.md: model ids must not be paths."""
        front = yaml.safe_load(request.json["content"].split("---\n")[1])
        ids = [front.get("base_model") or "a/b", *front.get("datasets", [])]
        wrong = [name for name in ids if not re.fullmatch(_REPO, name)]
        named = all(len(front.get(name) or "x") < 65 for name in ("license", "library_name", "pipeline_tag"))
        if wrong or not named:
            raise Answer(400, {"errors": [{"message": f"{name} is no id"} for name in wrong], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def _batch(self, request: Request, kind: str, repo: Repo) -> None:
        fields = []
        for wanted in request.json["objects"]:
            actions = {
                "upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}?X-Amz-Signature={'5' * 20}"},
                "verify": {"href": f"{self.endpoint}/lfs-verify"},
            }
            fields.append({**wanted, **({} if wanted["oid"] in self.objects else {"actions": actions})})
        raise Answer(200, {"transfer": "basic", "objects": fields})

    def _put(self, request: Request, oid: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Answer(400, {"error": "checksum"})
        self.uploads.append(oid)
        damaged = bytes([request.body[0] ^ 1]) + request.body[1:]
        self.objects[oid] = damaged if self.corrupt_commits else request.body
        raise Answer(200)

    def _lfs_files(self, request: Request, kind: str, repo: Repo) -> None:
        """List the LFS files in a repository's history, also those that no branch refers to."""
        held = {}
        for files in repo.commits.values():
            held |= {_lfs_oid(content): path for path, content in files.items() if len(content) >= LFS_FROM_BYTES}
        fields = {"oid": "0", "pushedAt": "2026-01-01T00:00:00.000Z", "ref": "main"}
        named = [{**fields, "fileOid": oid, "filename": path, "size": 1} for oid, path in held.items()]
        raise Answer(200, [file for file in named if file["fileOid"] in self.objects])

    def _delete_lfs_files(self, request: Request, kind: str, repo: Repo) -> None:
        for oid in request.json["deletions"]["sha"]:
            self.objects.pop(oid)
        raise Answer(200, {})

    def _verify(self, request: Request) -> None:
        raise Answer(200 if request.json["oid"] in self.objects else 404, {})

    def _commit(self, request: Request, kind: str, repo: Repo, revision: str) -> None:
        files = dict(repo.commits[self._revision(repo, revision)])
        for line in map(json.loads, request.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.uploads.append(value["path"])
                files[value["path"]] = base64.b64decode(value["content"])
                repo.lfs.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Answer(400, {"error": "LFS pointer to what was not uploaded"})
                files[value["path"]] = self.objects[value["oid"]]
                repo.lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = _sha1(f"{len(repo.commits)} {sorted(files)}".encode() + repo.head.encode())
        repo.commits[commit] = files
        url = f"{self._url(kind, repo.name)}/commit/{commit}"
        raise Answer(200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _resolve(self, request: Request, kind: str, repo: Repo, revision: str, path: str) -> None:
        commit = self._revision(repo, revision)
        content = repo.commits[commit].get(path)
        if content is None:
            raise Answer(404, {"error": "no such thing"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = _lfs_oid(content) if path in repo.lfs else _git_sha1(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if match and match[0] != "bytes=0-":
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            raise Answer(206, content[first : last + 1], {**headers, **part})
        raise Answer(200, content, headers)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return _sha1(f"blob {len(content)}\0".encode() + content)


def _lfs_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
