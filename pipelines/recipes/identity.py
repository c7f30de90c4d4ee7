"""Digests of identities: the settings, sources and versions that an artefact was created from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(identity: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the sha256 of `identity` (JSON values only)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Return one line for each field in which two identities differ, sorted by name."""
    return [
        f"{name}: wanted {expected.get(name, 'nothing')}, found {actual.get(name, 'nothing')}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
