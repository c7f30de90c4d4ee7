"""URLs of recordings: their parts, a printable form without secrets, and a safe name for files."""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.parse
from dataclasses import dataclass, replace

from pipelines.infra.errors import LabError

DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.I)
_PRINTED = re.compile(r"(?:v|id|n|ep|episode|part|track)=[\w.-]{1,12}")
"""Parameters of a query that are printed; any other may be a token."""
_SECRET = re.compile(
    r"token|sig|credential|key|secret|pass|pwd|auth|session|jwt|expire|policy|date|nonce|^x-(amz|goog)|^s[etprv]$", re.I
)
"""Names of parameters that grant access or change with each signature."""
_PATH_PARAMETER = re.compile(r"(;[^/;=]*=)[^/;]*")
_MAX_CHARACTERS = 8_000
_MAX_NAME_BYTES = 120
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.I)
"""Names that Windows keeps for devices."""
_UNPRINTABLE = "(an invalid address)"
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"


class DownloadError(LabError):
    """An address that cannot be used, in one line without secrets.

    `reason`: `address` (not allowed), `unreachable`, `status`, `too_large`, `too_slow`, `html` or `broken`.
    """

    def __init__(self, reason: str, line: str):
        super().__init__(line)
        self.reason = reason


@dataclass(frozen=True, repr=False)
class Url:
    """An address as it was given. `str` and `repr` hide the password and the values of the query."""

    text: str

    def __str__(self) -> str:
        try:
            parts = urllib.parse.urlsplit(self.text.strip())
            parts.port  # noqa: B018  raises if it is not a number: then it may be a password
        except ValueError:
            return _UNPRINTABLE
        if not is_url(self.text):
            return _UNPRINTABLE
        host = parts.netloc.rpartition("@")[2]
        query = "&".join(filter(_PRINTED.fullmatch, parts.query.split("&")))
        hidden = "…" if query != parts.query else ""
        path = _PATH_PARAMETER.sub(r"\1…", parts.path)
        text = f"{parts.scheme}://{host}{path}{'?' * bool(parts.query)}{query}{'&' * bool(query and hidden)}{hidden}"
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    __repr__ = __str__

    @property
    def has_secrets(self) -> bool:
        """Return whether `str` hides a part of the address, other than its fragment."""
        return str(self) != self.text.strip().partition("#")[0]

    @property
    def identity(self) -> str:
        """Return a digest of the address without its secrets: equal for two signatures of one recording."""
        parts = urllib.parse.urlsplit(self.text.strip())
        query = [pair for pair in parts.query.split("&") if not _SECRET.search(pair.partition("=")[0])]
        named = [parts.scheme, parts.netloc.rpartition("@")[2], parts.path, *query]
        return hashlib.sha256("\n".join(named).encode("utf-8", "replace")).hexdigest()

    @property
    def file_name(self) -> str:
        """Return the last part of the path, or the host, as a name that is safe in any folder."""
        try:
            parts = urllib.parse.urlsplit(self.text.strip())
            last, host = urllib.parse.unquote(parts.path.rstrip("/").rpartition("/")[2]), parts.hostname or ""
        except ValueError:
            last = host = ""
        for candidate in (_PATH_PARAMETER.sub("", last), host):
            name = re.sub(r"[^\w. -]+", "_", candidate).strip(". ")
            name = name.encode()[-_MAX_NAME_BYTES:].decode("utf-8", "ignore").lstrip(". ")
            if name.strip("_"):
                return f"_{name}" if _RESERVED.match(name) else name
        return "recording"


@dataclass(frozen=True)
class Request:
    """The parts of a checked URL that a request needs."""

    url: Url
    scheme: str
    host: str
    """In ASCII, without brackets."""
    port: int
    target: str
    """Path and query, encoded."""
    credentials: str = ""
    """Value of the header Authorization; empty without a user name."""

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    def follow(self, location: str) -> Request:
        """Return the request of a redirect, which has the credentials only if the server is the same."""
        location = location.strip().encode("latin-1", "replace").decode("utf-8", "replace")
        url = Url(urllib.parse.urljoin(self.url.text, location))
        request = parse(url)
        if request.origin == self.origin and not request.credentials:
            return replace(request, credentials=self.credentials)
        return request


def is_url(text: str) -> bool:
    """Return whether a text is an address with any scheme, such as `https://…`, and not a path."""
    return bool(_URL.match(text))


def parse(url: Url) -> Request:
    """Return the request for a URL. Raises DownloadError (`address`) unless it is a valid one of http or https."""
    text = url.text.strip()
    try:
        parts = urllib.parse.urlsplit(text)
        scheme, host, port = parts.scheme.lower(), parts.hostname or "", parts.port
        host = host if ":" in host else host.encode("idna").decode()
    except (ValueError, UnicodeError):
        raise DownloadError("address", f"{url} is not a valid address: check its host and port") from None
    if scheme not in DEFAULT_PORTS:
        raise DownloadError("address", f"{url} cannot be fetched: expected an address of http or https")
    if not host or port == 0 or len(text) > _MAX_CHARACTERS or re.search(r"[\x00-\x1f\x7f\\]", text) or "%" in host:
        raise DownloadError("address", f"{url} is not a valid address: expected https://host/path")
    target = urllib.parse.quote(parts.path or "/", _SAFE_IN_PATH)
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, _SAFE_IN_PATH + '?[]|"<>{}^`')
    return Request(url, scheme, host, port or DEFAULT_PORTS[scheme], target, _credentials(parts))


def _credentials(parts: urllib.parse.SplitResult) -> str:
    if parts.username is None:
        return ""
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
