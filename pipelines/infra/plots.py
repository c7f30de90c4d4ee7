"""TODO: describe this module."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_INK, _ACCENT, _SOFT = "#1f3a5f", "#c8553d", "#8aa1b8"


def png(figure: Figure) -> bytes:
    """A figure as a file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _axes(width_in: float, height_in: float) -> tuple[Figure, Any]:
    figure = _figure(width_in, height_in)
    return figure, _plain(figure.subplots())


def _row(n: int, width_in: float, height_in: float) -> tuple[Figure, Any]:
    figure = _figure(width_in, height_in)
    return figure, [_plain(axes) for axes in figure.subplots(1, n)]


def _figure(width_in: float, height_in: float) -> Figure:
    """A figure outside pyplot's registry, that notebooks draw by itself: shown once, and nothing has to be closed."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture(figsize=(width_in, height_in), layout="constrained")


def _plain(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    return axes
