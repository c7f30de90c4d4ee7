"""Text of others within one line of Markdown."""

from __future__ import annotations

import html
import re


def inline(text: str) -> str:
    """Escape text so that it stays within its line and its table cell."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[|`\[\]*_<>]", lambda sign: f"&#{ord(sign[0])};", plain)
