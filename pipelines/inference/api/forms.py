"""Forms as clients send them: a file without a name, and fields that this server would otherwise ignore."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Form, Request, Response
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from pipelines.inference import channels as recording_channels
from pipelines.inference.http.guard import Refusal
from pipelines.inference.subtitles import CUE_FORMATS, DEFAULT, Style
from pipelines.infra.errors import LabError

FILE = "file"
GRANULARITIES, INCLUDE = "timestamp_granularities[]", "include[]"
_LIST = re.compile(r"(timestamp_granularities|include)(\[\d*\])?")


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
    """A request whose form is read by `_Parser`; its lists have one name each."""

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
    is_list = isinstance(value, str) and _LIST.fullmatch(name)
    if not is_list:
        return [(name, value)]
    return [(f"{is_list[1]}[]", word) for word in re.findall(r"[^\s,\[\]\"']+", value)]


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
        if name not in (GRANULARITIES, INCLUDE) and len(form.getlist(name)) > 1:
            raise Refusal(400, f"{printable}: send it once", param=printable)


@dataclass
class ChannelForm:
    """Whether each channel is transcribed, and its name."""

    channels: Annotated[
        str, Form(description="`split`: transcribe each channel, with its name as the speaker. `mix`: their mean.")
    ] = recording_channels.MIX
    channel_names: Annotated[
        str, Form(description="Names of split channels, separated by commas; else Left, Right or Channel 1, ...")
    ] = ""

    def parse(self) -> tuple[str, ...] | None:
        """Return the names of the channels to split, maybe none; None to mix them. Raises Refusal (400)."""
        mode = self.channels.strip() or recording_channels.MIX
        try:
            is_split, names = recording_channels.parse_mode(mode, self.channel_names)
        except LabError as error:
            param = "channel_names" if mode in recording_channels.MODES else "channels"
            raise Refusal(400, str(error), param=param) from None
        return names if is_split else None


@dataclass
class SubtitleForm:
    """How srt and vtt look, by the names of openai-whisper's options."""

    max_line_width: Annotated[int, Form(description="Most characters in a line of srt and vtt.")] = (
        DEFAULT.max_line_width
    )
    max_line_count: Annotated[int, Form(description="Most lines in a cue of srt and vtt.")] = DEFAULT.max_line_count
    highlight_words: Annotated[bool, Form(description="For srt and vtt: underline each word while it is spoken.")] = (
        False
    )

    def parse(self, response_format: str, times_words: bool) -> Style:
        """Return the style. Raises Refusal (400) for other formats, and for words whose times are not known."""
        param = "max_line_width" if self.max_line_width != DEFAULT.max_line_width else "max_line_count"
        try:
            style = Style(self.max_line_width, self.max_line_count, self.highlight_words)
        except LabError as error:
            raise Refusal(400, str(error), param=param) from None
        param = "highlight_words" if self.highlight_words else param
        if style != DEFAULT and response_format not in CUE_FORMATS:
            raise Refusal(400, f"{param} is for srt and vtt: leave it out", param=param)
        if self.highlight_words and not times_words:
            raise Refusal(400, "this server's model does not support word times: leave it out", param=param)
        return style
