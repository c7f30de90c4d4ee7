"""A loopback Hopsworks cluster over TLS: login, the dataset API, the model registry."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import re
from pathlib import Path

from servers.loopback import Answer, Loopback, Request

PROJECT_ID = 119
_API = "/hopsworks-api/api"
_DATASET = rf"{_API}/project/{PROJECT_ID}/dataset"


class Hopsworks(Loopback):
    """A cluster with one project. Its API key is `key`."""

    def __init__(self, certificate: tuple[str, str], key: str = "Kx" + 30 * "k", project: str = "demo"):
        super().__init__(certificate)
        self.key, self.project = key, project
        self.files: dict[str, bytes] = {}
        """Content by path relative to the project."""
        self.folders = {"Resources", "Models"}
        self.models: dict[str, dict] = {}
        """Registered models by `name_version`."""
        self.uploads: list[str] = []
        """Paths of completely uploaded files, in order."""
        self.corrupt_uploads = False
        """Whether a byte of each uploaded file is flipped."""
        self.parts: dict[str, dict[int, bytes]] = {}

    def answer(self, request: Request) -> None:
        if request.headers.get("authorization") != f"ApiKey {self.key}":
            raise Answer(401, {"errorCode": 160001, "errorMsg": "No valid role", "usrMsg": str(request.headers)})
        for pattern, respond in (
            (rf"GET {_API}/variables/versions", self._versions),
            (rf"GET {_API}/variables/.*", self._no_variable),
            (rf"GET {_API}/project/getProjectInfo/(?P<name>[^/]+)", self._info),
            (rf"GET {_API}/project", self._team),
            (rf"GET {_API}/project/{PROJECT_ID}/credentials", self._credentials),
            (rf"GET {_DATASET}/download/with_auth/(?P<path>.+)", self._download),
            (rf"POST {_DATASET}/upload/(?P<path>.+)", self._upload),
            (rf"GET {_DATASET}/(?P<path>.+)", self._get),
            (rf"POST {_DATASET}/(?P<path>.+)", self._make),
            (rf"DELETE {_DATASET}/(?P<path>.+)", self._remove),
            (rf"(GET|PUT) {_API}/project/{PROJECT_ID}/modelregistries/\d+/models/(?P<name>.+)", self._model),
        ):
            match = re.fullmatch(pattern, f"{request.method} {request.path}")
            if match:
                respond(request, **match.groupdict())

    def _versions(self, request: Request) -> None:
        import hopsworks

        raise Answer(200, [{"software": "hopsworks", "version": hopsworks.__version__}])

    def _no_variable(self, request: Request) -> None:
        raise Answer(404, {"errorCode": 100024, "errorMsg": "Variable not found"})

    def _info(self, request: Request, name: str) -> None:
        if name != self.project:
            raise Answer(404, {"errorCode": 150004, "errorMsg": "No project"})
        raise Answer(200, {"projectId": PROJECT_ID, "projectName": name})

    def _team(self, request: Request) -> None:
        user = {"uid": 1, "username": "meb10000", "email": "me@example.org"}
        raise Answer(200, [{"user": user, "project": {"name": self.project, "owner": user}}])

    def _credentials(self, request: Request) -> None:
        store = base64.b64encode(b"a key store").decode()
        pems = {name: f"a {name}" for name in ("caChain", "clientCert", "clientKey")}
        raise Answer(200, {"kStore": store, "tStore": store, "password": "store-password", **pems})

    # ---- the dataset API

    def _path(self, path: str) -> str:
        return path.strip("/").removeprefix(f"Projects/{self.project}/")

    def _get(self, request: Request, path: str) -> None:
        path = self._path(path)
        if "listing" in request.query.get("action", []):
            self._listing(request, path)
        raise Answer(200, {"attributes": self._attributes(path)})

    def _attributes(self, path: str) -> dict:
        if path not in self.files and path not in self.folders:
            raise Answer(400, {"errorCode": 110008, "errorMsg": "Path not found", "usrMsg": path})
        fields = {"name": path.rsplit("/", 1)[-1], "path": f"/Projects/{self.project}/{path}", "owner": "me"}
        return {**fields, "dir": path in self.folders, "size": len(self.files.get(path, b""))}

    def _listing(self, request: Request, path: str) -> None:
        self._attributes(path)
        below = sorted(name for name in [*self.files, *self.folders] if name.rpartition("/")[0] == path)
        offset, limit = (int(request.query[name][0]) for name in ("offset", "limit"))
        items = [{"attributes": self._attributes(name)} for name in below[offset : offset + limit]]
        raise Answer(200, {"count": len(below), "items": items})

    def _make(self, request: Request, path: str) -> None:
        path = self._path(path)
        if path in self.folders:
            raise Answer(409, {"errorCode": 110011, "errorMsg": "Path already exists"})
        if "/" in path and path.rpartition("/")[0] not in self.folders:
            raise Answer(400, {"errorCode": 110008, "errorMsg": "Path not found"})
        self.folders.add(path)
        raise Answer(201, {"attributes": self._attributes(path)})

    def _upload(self, request: Request, path: str) -> None:
        fields = _form(request)
        name = fields["flowFilename"].decode()
        parts = self.parts.setdefault(name, {})
        parts[int(fields["flowChunkNumber"])] = fields["file"]
        if len(parts) >= int(fields["flowTotalChunks"]):
            content = b"".join(parts[number] for number in sorted(parts))
            del self.parts[name]
            target = f"{self._path(path)}/{name}"
            self.uploads.append(target)
            damaged = self.corrupt_uploads and content
            self.files[target] = bytes([content[0] ^ 1]) + content[1:] if damaged else content
        raise Answer(200)

    def _download(self, request: Request, path: str) -> None:
        path = self._path(path)
        self._attributes(path)
        raise Answer(200, self.files[path], {"Content-Type": "application/octet-stream"})

    def _remove(self, request: Request, path: str) -> None:
        path = self._path(path)
        self._attributes(path)
        self.files = {name: c for name, c in self.files.items() if name != path and not name.startswith(f"{path}/")}
        self.folders = {name for name in self.folders if name != path and not name.startswith(f"{path}/")}
        raise Answer(204)

    # ---- the model registry

    def _model(self, request: Request, name: str) -> None:
        if request.method == "PUT":
            self.models[name] = json.loads(request.body)
        if name not in self.models:
            raise Answer(404, {"errorCode": 360000, "errorMsg": "Model not found"})
        fields = {**self.models[name], "id": name, "created": 1, "userFullName": "me", "modelRegistryId": PROJECT_ID}
        raise Answer(200, fields)


def _form(request: Request) -> dict[str, bytes]:
    """Return the fields of a multipart form."""
    boundary = b"--" + request.headers["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in request.body.split(boundary + b"\r\n")[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]+)"', head)[1].decode()
        fields[name] = content.removesuffix(boundary + b"--\r\n").removesuffix(b"\r\n")
    return fields


def self_signed(folder: Path) -> tuple[str, str]:
    """Write a self-signed certificate of 127.0.0.1; return the paths of certificate and key (PEM)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(address, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    pem, secret = folder / "certificate.pem", folder / "key.pem"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return str(pem), str(secret)
