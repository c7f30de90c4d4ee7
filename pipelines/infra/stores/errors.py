"""What went wrong between us and a store, in one line that tells what to do, and without a secret in it."""

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
    re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)"),  # user:password@host
    re.compile(
        r"(?<=[?&])((?:[\w-]*(?:signature|token|credential|api_?key|secret|password))=)[^&\s'\"]+", re.IGNORECASE
    ),
)
_OUR_OWN = (TypeError, AttributeError, NameError, LookupError, ImportError)
_HIDDEN = "***"
_MIN_SECRET_CHARACTERS = 6
"""A shorter value is no token, and taking it out would garble every message."""
_MAX_DETAIL_CHARACTERS = 200


def redact(text: str) -> str:
    """`text` without the tokens that this process knows of, and without what looks like one."""
    for secret in (os.environ.get(name, "").strip() for name in _SECRET_VARIABLES):
        if len(secret) >= _MIN_SECRET_CHARACTERS:
            text = text.replace(secret, _HIDDEN)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda found: (found[1] if found.re.groups else "") + _HIDDEN, text)
    return text


def explain(error: Exception, *, store: str, uri: str, credential: str) -> LabError:
    """The one line for an error of a store's client.

    `store` and `uri` name what was talked to, `credential` the variable that holds its token. What looks like a defect
    of the program is raised as it is.
    """
    if isinstance(error, LabError):
        return error
    if isinstance(error, _OUR_OWN):
        raise error
    status = status_of(error)
    if status is None:
        return LabError(f"{_without_answer(error, store, uri)} ({_detail(error)})")
    return LabError(f"{_refusal(status, store, uri, credential)} ({_detail(error)})")


def explain_hub(error: Exception, uri: str, page: str) -> LabError | None:
    """Return the line for an error of huggingface_hub about `uri`, without the server's words; None for other errors.

    `page` is the web page of the repository.
    """
    lines = {
        "GatedRepoError": f"{uri} is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account",
        "RepositoryNotFoundError": f"{uri} does not exist, or is private: check owner/name, or set HF_TOKEN",
        "DisabledRepoError": f"{uri} was disabled by the Hub: name another repository",
        "OfflineModeIsEnabled": f"{uri} is on the Hub, and HF_HUB_OFFLINE forbids access to it: unset HF_HUB_OFFLINE",
    }
    if line := next((lines[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in lines), None):
        return LabError(line)
    status = status_of(error)
    return None if status is None else LabError(_refusal(status, "the Hub", uri, "HF_TOKEN"))


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an exception of a client, or None where no answer came."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


class RedactingFilter(logging.Filter):
    """Takes secrets out of what a client logs: it names the addresses of uploads, and those may be signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def _refusal(status: int, store: str, uri: str, credential: str) -> str:
    again = "Run this again: what has arrived is kept"
    known = {
        401: f"{store} does not accept the token for {uri} (401). Set {credential} to a valid token",
        403: f"{store} does not allow this token to do that with {uri} (403). Use a token with access to it",
        404: f"{store} has no {uri} (404). Check the name; a private one needs {credential}",
        409: f"{uri} was changed on {store} at the same time (409). {again}",
        412: f"{uri} was changed on {store} at the same time (412). {again}",
        413: f"{store} does not take files as large as those of {uri} (413). Use smaller shards",
        429: f"{store} asks to slow down (429) at {uri}. Wait some minutes. {again}",
        507: f"{store} has no room left for {uri} (507). Free some space. {again}",
    }
    if status >= 500 and status not in known:
        return f"{store} failed ({status}) at {uri}, which is not finished. {again}"
    return known.get(status, f"{store} refused {uri} ({status})")


def _without_answer(error: Exception, store: str, uri: str) -> str:
    again = "Run this again: what has arrived is kept"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of this machine is full at {uri}. Free some space. {again}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{uri} is on {store}, and HF_HUB_OFFLINE forbids to ask it. Unset HF_HUB_OFFLINE"
    if any(_is_of_connection(cause) for cause in _chain(error)):
        return f"the connection to {store} broke off at {uri}, which is not finished. {again}"
    return f"{store} could not do that with {uri}"


def _is_of_connection(error: BaseException) -> bool:
    """Whether the network failed: clients raise the errors of their HTTP libraries, which have changed."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _detail(error: Exception) -> str:
    """The client's own words on one line, cut short, secrets taken out."""
    cause = error.__cause__ if error.__cause__ is not None and status_of(error) is None else error
    words = " ".join(redact(str(cause)).split()) or type(cause).__name__
    return words if len(words) <= _MAX_DETAIL_CHARACTERS else words[:_MAX_DETAIL_CHARACTERS] + " ..."
