"""Forms as clients send them: a file without a name, and fields that this server would otherwise ignore."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from pipelines.inference.http.guard import Refusal

FILE = "file"
GRANULARITIES = "timestamp_granularities[]"
_GRANULARITIES = re.compile(r"timestamp_granularities(\[\d*\])?")


class _Parser(MultiPartParser):
    """Takes the part `file` as a file even if it has no file name."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        if options.get(b"name") == FILE.encode() and b"filename" not in options:
            part.content_disposition += b'; filename="recording"'
        super().on_headers_finished()


def is_multipart(request: Request) -> bool:
    """Return whether the body is a form with files; curl names a raw body x-www-form-urlencoded."""
    kind, _ = parse_options_header(request.headers.get("content-type", ""))
    return kind == b"multipart/form-data"


class _FormRequest(Request):
    """A request whose form is read by `_Parser`; the list of granularities has one name."""

    async def _get_form(self, **limits: Any) -> FormData:
        if self._form is None and is_multipart(self):
            try:
                self._form = await _Parser(self.headers, self.stream(), **limits).parse()
            except MultiPartException as error:
                raise HTTPException(400, error.message) from None
        form = await super()._get_form(**limits)
        self._form = FormData([pair for name, value in form.multi_items() for pair in _split_list(name, value)])
        return self._form


def _split_list(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return `timestamp_granularities=word,segment` as two fields of OpenAI's name; any other field unchanged."""
    if not (isinstance(value, str) and _GRANULARITIES.fullmatch(name)):
        return [(name, value)]
    return [(GRANULARITIES, word) for word in re.findall(r"[^\s,\[\]\"']+", value)]


class FormRoute(APIRoute):
    """A route that reads forms by `_FormRequest`."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def handle_form(request: Request) -> Response:
            return await handle(_FormRequest(request.scope, request.receive))

        return handle_form


async def refuse_other_fields(request: Request, accepted: Collection[str]) -> None:
    """Raise Refusal (400) for a field or query parameter that would be ignored: an unknown or a repeated one.

    An empty one is accepted: it means nothing.
    """
    form = await request.form() if is_multipart(request) else FormData()
    for name, value in [*form.multi_items(), *request.query_params.multi_items()]:
        printable = "".join(letter if letter.isprintable() else "?" for letter in name[:40])
        is_empty = isinstance(value, str) and not value.strip()
        if not is_empty and (name not in accepted or name in request.query_params):
            raise Refusal(
                400,
                f"{printable}: not supported here: leave it out; the form takes {', '.join(accepted)}",
                param=printable,
            )
        if name != GRANULARITIES and len(form.getlist(name)) > 1:
            raise Refusal(400, f"{printable}: send it once", param=printable)
