"""Error messages of stores."""

from __future__ import annotations

import pytest

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
