"""Error messages of stores."""

from __future__ import annotations

import time

import pytest

from pipelines.infra import redact
from pipelines.infra.stores import errors as store_errors


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Invalid token Bearer abcdef", "Invalid token Bearer ***"),
        ("ApiKey abc.def!", "ApiKey ***"),
        ("https://u:p@host/x", "https://***@host/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?token=abc", "https://h/x?token=***"),
        ("hf_" + "abcdefgh is bad", "*** is bad"),
        ("my own-key here", "my *** here"),
        ("nothing to hide: 12 files", "nothing to hide: 12 files"),
    ],
)
def test_redact_secrets_hides_tokens_in_text(monkeypatch, text, left):
    monkeypatch.setenv("HOPSWORKS_API_KEY", "own-key")
    assert store_errors.redact_secrets(text) == left


@pytest.mark.parametrize("unit", ["://a:", "a:", "?a", "-", "/", "~/", "a.", "file:", "@", "://a:b"])
@pytest.mark.parametrize("head", ["", "://", "?", "Bearer "])
def test_long_text_of_a_server_takes_no_time(head, unit):
    text = head + unit * (200_000 // len(unit))
    started = time.process_time()
    redact.redact_text(text)
    store_errors.redact_secrets(text)
    error = store_errors.explain(RuntimeError(text), store="the Hub", uri="hub://a/b", credential="HF_TOKEN")
    assert time.process_time() - started < 1
    assert len(str(error)) < 400
