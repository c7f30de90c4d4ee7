"""Progress bars: text that is replaced in place in a notebook, tqdm's usual bar elsewhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import IPython.display
import pytest

from pipelines.infra import console


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend to run in a notebook; return the lines that its cell has shown, the last one being what remains."""
    lines: list[str] = []
    handle = SimpleNamespace(update=lambda output, raw: lines.append(output["text/plain"]))

    def display(output, raw, display_id):
        lines.append(output["text/plain"])
        return handle

    monkeypatch.setattr(console, "_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", display)
    console._notebook_bar_class.cache_clear()
    yield lines
    console._notebook_bar_class.cache_clear()


def test_bar_of_a_notebook_ends_with_all_done(outputs, capsys):
    with console.progress_bar(desc="log-mel", total=4, unit="clip") as bar:
        for _ in range(4):
            bar.update()
    assert outputs[-1].startswith("log-mel: 100 %|████")
    assert "4 of 4 clips" in outputs[-1] and "00:00 left" in outputs[-1]
    assert capsys.readouterr() == ("", ""), "a cell's copy has no text on standard error"


def test_bar_of_a_notebook_without_total_counts(outputs):
    with console.progress_bar(desc="log-mel", total=None, unit="clip") as bar:
        bar.update(3)
    assert "3 of ? clips" in outputs[-1]


def test_bar_without_progress_is_not_shown(outputs):
    with console.progress_bar(desc="log-mel", total=4, unit="clip"):
        pass
    assert outputs == []


def test_message_does_not_break_a_notebook_bar(outputs, capsys):
    console.configure()
    with console.progress_bar(desc="training", total=2, unit="step") as bar:
        bar.update()
        console.LOGGER.info("step 1: validation WER 0.5")
        bar.update()
    assert capsys.readouterr().out == "step 1: validation WER 0.5\n"
    assert "2 of 2 steps" in outputs[-1]


def test_bar_elsewhere_is_on_standard_error(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with console.progress_bar(desc="log-mel", total=2, unit="clip") as bar:
        bar.update(2)
    assert "log-mel: 100%" in capsys.readouterr().err
