"""Figures of notebooks: transparent, with colours that can be read on a white and on a dark page."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.infra import plots

PAGES = ("#ffffff", "#1e1e1e", "#111111")


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb` (WCAG 2)."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(colour: str, page: str) -> float:
    darker, lighter = sorted((luminance(colour), luminance(page)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("name", "lowest"), [("INK", 3.0), ("ACCENT", 3.0), ("SOFT", 3.0), ("TEXT", 4.0)], ids=lambda value: str(value)
)
def test_colours_contrast_with_light_and_dark_pages(name: str, lowest: float):
    assert min(contrast(getattr(plots, name), page) for page in PAGES) >= lowest


def test_figure_is_transparent_and_has_no_black():
    import matplotlib.image

    figure, axes = plots.figure_with_axes(3, 2)
    axes.plot([0, 1], [1, 0], color=plots.INK, label="loss")
    axes.set(xlabel="step", title="A title")
    axes.legend(frameon=False)
    pixels = matplotlib.image.imread(io.BytesIO(plots.png(figure)))
    assert pixels[0, 0, 3] == 0
    drawn = pixels[pixels[..., 3] > 0.9]
    assert len(drawn) > 100
    assert drawn[:, :3].max(axis=1).min() > 0.3, "black cannot be read on a dark page"


def test_figure_keeps_its_look_with_the_inline_backend(monkeypatch):
    import IPython
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure

    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: b"as that backend draws it")
    figure, axes = plots.figure_with_axes(3, 2)
    axes.set(title="A title")
    shown, _ = shell.display_formatter.format(figure)
    assert shown["image/png"] == plots.png(figure)
