"""Record what the lab logs during a test."""

from __future__ import annotations

import logging

_HANDLERS: list[logging.Handler] = []


class _ListHandler(logging.Handler):
    def __init__(self, lines: list[str]):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def record_log(lines: list[str] | None = None) -> list[str]:
    """Return a list that receives each message from now on; an earlier list receives no more."""
    stop_recording()
    lines = [] if lines is None else lines
    _HANDLERS.append(_ListHandler(lines))
    logger = logging.getLogger("pipelines")
    logger.addHandler(_HANDLERS[0])
    logger.setLevel(logging.INFO)
    return lines


def stop_recording() -> None:
    """Remove the handler of `record_log`."""
    while _HANDLERS:
        logging.getLogger("pipelines").removeHandler(_HANDLERS.pop())
