"""Errors of stores as one line that says what to do, without secrets."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator

from pipelines.infra.errors import LabError

_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HOPSWORKS_API_KEY", "MDC_API_KEY")
_SECRET_PATTERNS = (
    re.compile(r"\bhf_\w{6,}"),
    re.compile(r"(?<=Bearer )\S+|(?<=ApiKey )\S+", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)"),  # user:password@host
    re.compile(
        r"(?<=[?&])((?:[\w-]*(?:signature|token|credential|api_?key|secret|password))=)[^&\s'\"]+", re.IGNORECASE
    ),
)
_PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError, LookupError, ImportError)
_HIDDEN = "***"
_MIN_SECRET_CHARACTERS = 6
"""Shorter values are no tokens; removing them would damage messages."""
_MAX_DETAIL_CHARACTERS = 200
_MAX_TEXT_CHARACTERS = 20_000
"""A longer text of a server is cut before patterns are matched with it: their time may grow with its square."""


def redact_secrets(text: str) -> str:
    """Replace the tokens in this process's environment, and anything that looks like a token, by `***`.

    A text of more than _MAX_TEXT_CHARACTERS is cut.
    """
    text = text[:_MAX_TEXT_CHARACTERS]
    for secret in (os.environ.get(name, "").strip() for name in _SECRET_VARIABLES):
        if len(secret) >= _MIN_SECRET_CHARACTERS:
            text = text.replace(secret, _HIDDEN)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + _HIDDEN, text)
    return text


def explain(error: Exception, *, store: str, uri: str, credential: str) -> LabError:
    """Return the LabError for an error of a store's client. An error that is a bug of the program is raised.

    `store` is the store's name in the message, `credential` the environment variable with its token.
    """
    if isinstance(error, LabError):
        return error
    if isinstance(error, _PROGRAMMING_ERRORS):
        raise error
    status = status_of(error)
    if status is None:
        return LabError(f"{_no_response(error, store, uri)} ({_detail(error)})")
    return LabError(f"{_refusal(status, store, uri, credential)} ({_detail(error)})")


def explain_hub(error: Exception, uri: str, page: str) -> LabError | None:
    """Return the line for an error of huggingface_hub about `uri`, without the server's words; None for other errors.

    `page` is the web page of the repository.
    """
    lines = {
        "GatedRepoError": f"{uri} is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account",
        "RepositoryNotFoundError": f"{uri} does not exist, or is private: check owner/name, or set HF_TOKEN",
        "RevisionNotFoundError": f"{uri} does not exist: correct the branch, tag or commit",
        "DisabledRepoError": f"{uri} was disabled by the Hub: name another repository",
        "OfflineModeIsEnabled": f"{uri} is on the Hub, and HF_HUB_OFFLINE forbids access to it: unset HF_HUB_OFFLINE",
    }
    if line := next((lines[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in lines), None):
        return LabError(line)
    status = status_of(error)
    return None if status is None else LabError(_refusal(status, "the Hub", uri, "HF_TOKEN"))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of a client's exception or its causes, or None without a response."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


class RedactingFilter(logging.Filter):
    """Remove secrets from the log lines of a client, such as signed URLs of uploads."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_secrets(record.getMessage()), ()
        return True


def _refusal(status: int, store: str, uri: str, credential: str) -> str:
    again = "Run this again: what has arrived is kept"
    lines = {
        401: f"{store} does not accept the token for {uri} (401). Set {credential} to a valid token",
        403: f"{store} does not allow this token to do that with {uri} (403). Use a token with access to it",
        404: f"{store} has no {uri} (404). Check the name; a private one needs {credential}",
        409: f"{uri} was changed on {store} at the same time (409). {again}",
        412: f"{uri} was changed on {store} at the same time (412). {again}",
        413: f"{store} does not take files as large as those of {uri} (413). Use smaller shards",
        429: f"{store} asks to slow down (429) at {uri}. Wait some minutes. {again}",
        507: f"{store} has no room left for {uri} (507). Free some space. {again}",
    }
    if status >= 500 and status not in lines:
        return f"{store} failed ({status}) at {uri}, which is not finished. {again}"
    return lines.get(status, f"{store} refused {uri} ({status})")


def _no_response(error: Exception, store: str, uri: str) -> str:
    again = "Run this again: what has arrived is kept"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of this machine is full at {uri}. Free some space. {again}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{uri} is on {store}, and HF_HUB_OFFLINE forbids access to it. Unset HF_HUB_OFFLINE"
    if any(_is_connection_error(cause) for cause in _chain(error)):
        return f"the connection to {store} broke off at {uri}, which is not finished. {again}"
    return f"{store} could not do that with {uri}"


def _is_connection_error(error: BaseException) -> bool:
    """Return True for an error of the network; the HTTP library differs between versions of the clients."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _detail(error: Exception) -> str:
    """Return the client's own message on one line, shortened, without secrets."""
    cause = error.__cause__ if error.__cause__ is not None and status_of(error) is None else error
    words = " ".join(redact_secrets(str(cause)).split()) or type(cause).__name__
    return words if len(words) <= _MAX_DETAIL_CHARACTERS else words[:_MAX_DETAIL_CHARACTERS] + " ..."
