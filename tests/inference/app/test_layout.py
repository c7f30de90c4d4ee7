"""Components of the page and their texts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.inference.app import assets
from pipelines.inference.app.i18n import ENGLISH, SWEDISH
from pipelines.inference.app.launch import build
from pipelines.recipes import languages
from tests.inference.app.app_fakes import (
    FakeTranscriber,
)

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[3]


def test_every_component_with_text_is_translated(tmp_path):
    demo = build(FakeTranscriber(tmp_path, base_model="x"), tmp_path / "log.csv")
    switches = [fn for fn in demo.fns.values() if fn.targets and fn.targets[0][1] == "input" and fn.fn]
    [switch] = switches
    [first] = [fn for fn in demo.fns.values() if fn.targets and fn.targets[0][1] == "load" and fn.fn]
    swedish = switch.fn("sv", None)
    assert swedish[0] == "sv"
    assert len(swedish) == len(switch.outputs)
    request = SimpleNamespace(headers={"accept-language": "sv"})
    assert first.fn(request)[:2] == swedish[:2]
    assert len(first.fn(request)) == len(first.outputs)
    assert switch.fn("nonsense", None)[0] == "en"
    values = json.dumps([update for update in swedish if isinstance(update, dict)], ensure_ascii=False, default=str)
    for key in (
        "transcribe",
        "live_tab",
        "keep",
        "wrong",
        "compare",
        "live_hint",
        "correction_hint",
        "options",
        "usual",
    ):
        assert SWEDISH[key] in values


@pytest.mark.parametrize(
    ("code", "english", "swedish", "has_examples"),
    [("sv", "Swedish", "svenska", True), ("da", "Danish", "danska", False), ("jw", "Javanese", "Javanese", False)],
)
def test_page_names_the_language_of_its_model(tmp_path, code, english, swedish, has_examples):
    transcriber = FakeTranscriber(tmp_path)
    transcriber.language = code
    demo = build(transcriber, tmp_path / "log.csv")
    blocks = {block.elem_id: block for block in demo.blocks.values()}
    assert demo.title == f"{english} speech to text"
    assert blocks["head"].value.startswith(f"# {english} speech to text\nRecord or upload {english} speech")
    assert blocks["examples"].visible == blocks["examples-label"].visible == has_examples
    [switch] = [fn for fn in demo.fns.values() if fn.targets and fn.targets[0][1] == "input" and fn.fn]
    assert f"Tal till text på {swedish}" in json.dumps(switch.fn("sv", None), ensure_ascii=False, default=str)
    assert f'"speech": "{languages.tag(code)}"' in assets.script(code)


@pytest.mark.parametrize(
    ("space", "log", "lost"), [("", "log.csv", 0), ("a/b", "log.csv", 1), ("a/b", "/data/l.csv", 0)]
)
def test_page_says_what_is_stored_and_if_it_is_lost(tmp_path, monkeypatch, space, log, lost):
    monkeypatch.setenv("SPACE_ID", space) if space else monkeypatch.delenv("SPACE_ID", raising=False)
    demo = build(FakeTranscriber(tmp_path), ROOT / log)
    [stored] = [block for block in demo.blocks.values() if block.elem_id == "stored"]
    assert stored.value.startswith(ENGLISH["stored"])
    assert stored.value.count(ENGLISH["fleeting"]) == lost
