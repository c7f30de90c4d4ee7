"""Console output of the lab's loggers: one handler, which cooperates with progress bars; and the bars of notebooks.

Modules write messages with `logging.getLogger(__name__)`. The commands, the notebooks and the app call
`configure`. Until then Python prints warnings only.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from pipelines.infra.errors import LabError, shortened

LOGGER = logging.getLogger("pipelines")


MAX_LINE = 4_000
"""Most characters of a printed line."""


BAR = "{desc}: {percentage:3.0f} %|{bar:24}| {n_fmt} of {total_fmt} {unit}s, {elapsed} done, {remaining} left{postfix}"
"""Text of a notebook's progress bar, as tqdm's `bar_format`."""


class ConsoleHandler(logging.Handler):
    """Print each message as one plain line, above progress bars that are drawn at the moment."""

    def __init__(self, stream: TextIO | None = None):
        super().__init__()
        self.stream = stream
        """Where lines go; None is standard output as it is when a message is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self.stream or sys.stdout
            bars = sys.modules["tqdm"].tqdm if "tqdm" in sys.modules else None
            if bars and getattr(bars, "_instances", None):
                bars.write(shortened(record.getMessage(), MAX_LINE), file=stream)
            else:
                print(shortened(record.getMessage(), MAX_LINE), file=stream, flush=True)
        except Exception:
            self.handleError(record)


class _ForwardingHandler(logging.Handler):
    def __init__(self, receive: Callable[[str], None]):
        super().__init__()
        self.receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        self.receive(shortened(record.getMessage(), MAX_LINE))


def configure(stream: TextIO | None = None) -> None:
    """Print messages of level INFO and above on `stream`; None is standard output. Replace an earlier handler."""
    for handler in [
        handler for handler in LOGGER.handlers if isinstance(handler, ConsoleHandler | logging.NullHandler)
    ]:
        LOGGER.removeHandler(handler)
    LOGGER.addHandler(ConsoleHandler(stream))
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # the root logger may have a handler, too (in the app, in Colab): lines would appear twice


def show_errors_in_one_line(describe: Callable[[BaseException], str]) -> None:
    """Show a LabError in a notebook as its message alone. The cell still fails, also in papermill.

    The same for other errors for which `describe` has a line.

    Outside IPython it has no effect.
    """
    if (shell := _ipython()) is None:
        return

    def show(shell: Any, kind: type, error: BaseException, traceback: Any, tb_offset: int | None = None) -> None:
        line = str(error) if isinstance(error, LabError) else describe(error)
        if line:
            shell._showtraceback(kind, error, [f"{kind.__name__}: {line}"])
        else:
            shell.showtraceback((kind, error, traceback), tb_offset=tb_offset)

    shell.set_custom_exc((Exception,), show)


def progress_bar(**options: Any) -> Any:
    """Return a tqdm progress bar with these options: one line of text in a notebook, as usual in a terminal.

    The line is an output of the cell. So it is also in a copy that papermill executed, and it needs no widgets.
    """
    if (shell := _ipython()) is None or not hasattr(shell, "kernel"):
        from tqdm import tqdm

        return tqdm(**options)
    return _notebook_bar_class()(bar_format=BAR, mininterval=0.5, ascii=False, file=io.StringIO(), **options)


@functools.cache
def _notebook_bar_class() -> Any:
    from IPython.display import display
    from tqdm import tqdm

    class NotebookBar(tqdm):
        """A tqdm bar whose line is an output that is replaced in place. It appears with the first progress."""

        shown_in = None

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            output = {"text/plain": str(self)}
            if self.n == self.initial:
                return  # nothing may be left to do, and a bar at 0 % would stay in the notebook
            if self.shown_in is None:
                self.shown_in = display(output, raw=True, display_id=True)
            else:
                self.shown_in.update(output, raw=True)

    return NotebookBar


def _ipython() -> Any:
    """Return the IPython shell that this process runs in, or None."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def mute() -> None:
    """Print nothing in this process: of several processes that train together, only the first prints."""
    LOGGER.handlers = [logging.NullHandler()]
    LOGGER.propagate = False


@contextlib.contextmanager
def forwarded(receive: Callable[[str], None]) -> Iterator[None]:
    """Pass each message to `receive` instead of printing it."""
    handlers, propagate, level = LOGGER.handlers, LOGGER.propagate, LOGGER.level
    LOGGER.handlers, LOGGER.propagate = [_ForwardingHandler(receive)], False
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers, LOGGER.propagate = handlers, propagate
        LOGGER.setLevel(level)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Print no message."""
    with forwarded(lambda line: None):
        yield


@contextlib.contextmanager
def rewritten(rewrite: Callable[[str], str]) -> Iterator[None]:
    """Print each message as `rewrite` returns it."""
    handlers = LOGGER.handlers

    def pass_on(line: str) -> None:
        record = logging.LogRecord(LOGGER.name, logging.INFO, __file__, 0, rewrite(line), None, None)
        for handler in handlers:
            handler.handle(record)

    with forwarded(pass_on):
        yield
