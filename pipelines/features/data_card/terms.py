"""Terms of a cache's sources: licence, consent and how the speech was collected.

They come from what is known of a kind of source, from the card of a data set on the Hub, and from `collection.toml` in
a folder of recordings:

    licence = "CC0-1.0"
    method = "read speech: sentences recorded one by one in a browser"
    [consent]
    en = "I agree that ..."

Fields that are missing or have another type are left out: a card without them is better than none.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.infra import environment
from pipelines.recipes.settings import Recipe
from pipelines.whisper.lineage import DATA_SOURCES

logger = logging.getLogger(__name__)

COLLECTION = "collection.toml"
_MAX_BYTES = 100_000
_MAX_CHARS = 2_000
_TIMEOUT_S = 10
_SYNTHETIC = ("tour", "tour-english", "planted")
_COMMON_VOICE = ("common_voice", "mozilla")
_LICENCES = {**dict.fromkeys(_SYNTHETIC, "apache-2.0"), **dict.fromkeys(_COMMON_VOICE, "cc0-1.0")}
_CONSENT = {
    **dict.fromkeys(_SYNTHETIC, "Not needed: no person was recorded, the voices are synthetic."),
    **dict.fromkeys(_COMMON_VOICE, "Given to Mozilla by each contributor. It is forbidden to find out who speaks."),
    "feedback": "Asked for in the app before a recording is kept.",
}
_METHODS = {
    **dict.fromkeys(_SYNTHETIC, "Sentences of the lab's grammar, spoken by eSpeak NG."),
    **dict.fromkeys(_COMMON_VOICE, "Sentences read by volunteers in a browser; other volunteers voted on the clips."),
    "aligned": "Cut from long recordings where their text matches what a model recognised.",
    "unlabelled": "Recordings without transcripts: a model wrote them, and those that it is sure of are used.",
    "feedback": "Recordings and corrections that users of the lab's app sent.",
}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Terms:
    """What is known of one source; unknown fields are empty."""

    kind: str
    name: str
    """For readers, without a path."""
    licence: str = ""
    """As written by the source, or the Hub's name of it."""
    consent: str = ""
    method: str = ""


def read_terms(identity: Mapping[str, Any], recipe: Recipe | None = None) -> list[Terms]:
    """Return the terms of each source of a cache by its identity; the recipe names the folders on this machine."""
    paths = _paths(recipe)
    return [_terms(source, paths.get(part, "")) for part, source in sources(identity).items()]


def stored_terms(sealed: Mapping[str, Any]) -> list[Terms]:
    """Return the terms in a cache's manifest, as its recipe stated them; empty if it has none that can be read."""
    try:
        return [Terms(**one) for one in sealed.get("terms", ())]
    except TypeError:
        return []


def sources(identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the identity of the cache's source under the name "", or those of the parts of a mix by name."""
    source = {name.removeprefix("source."): value for name, value in identity.items() if name.startswith("source.")}
    if source.get("kind") != "mix":
        return {"": source}
    return {
        part: {name.removeprefix(f"{part}."): value for name, value in source.items() if name.startswith(f"{part}.")}
        for part in str(source.get("parts", "")).split()
    }


def hub_licence(terms: list[Terms]) -> dict[str, str]:
    """Return the licence as the front matter of a card on the Hub states it, if all sources have the same."""
    licences = {one.licence for one in terms}
    licence = licences.pop() if len(licences) == 1 else ""
    name = re.sub(r"[\s_]+", "-", licence.strip().lower())
    if not name or name == UNKNOWN:
        return {"license": UNKNOWN}
    name = {"cc0": "cc0-1.0", "public-domain": "cc0-1.0"}.get(name, name)
    if re.fullmatch(r"(cc0-1\.0|cc-by(-sa|-nc|-nd|-nc-sa|-nc-nd)?-[1-4]\.0|apache-2\.0|mit)", name):
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name).strip("-")[:60] or "own"}


def _paths(recipe: Recipe | None) -> dict[str, str]:
    if recipe is None:
        return {}
    parts = {part.name: part.path for part in recipe.source.parts}
    return parts or {"": recipe.source.path}


def _terms(source: Mapping[str, Any], path: str) -> Terms:
    kind = str(source.get("kind", UNKNOWN))
    if kind == "hub":
        return Terms(kind, str(source.get("dataset", kind)), _licence_on_hub(source), "See its card on the Hub.")
    name = DATA_SOURCES.get(kind, (kind,))[0]
    defaults = Terms(kind, name, _LICENCES.get(kind, ""), _CONSENT.get(kind, ""), _METHODS.get(kind, ""))
    folder = Path(path).expanduser() if path else None
    return _with_collection(defaults, folder / COLLECTION) if folder and (folder / COLLECTION).is_file() else defaults


def _with_collection(defaults: Terms, path: Path) -> Terms:
    """Return the terms with the fields of a `collection.toml` that have the expected type."""
    try:
        with open(path, "rb") as file:
            content = tomllib.loads(file.read(_MAX_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        logger.info(
            f"note: {path} must be TOML with licence, method and [consent], got {str(error)[:200]}: "
            "the data card is written without it. Correct it, remove the cache's README.md and run this again"
        )
        return defaults
    consent = content.get("consent")
    texts = consent.values() if isinstance(consent, dict) else [consent]
    agreed = " / ".join(text.strip() for text in texts if isinstance(text, str) and text.strip())
    licence, method = (_text(content.get(name)) for name in ("licence", "method"))
    return Terms(
        defaults.kind,
        defaults.name,
        licence or _text(content.get("license")) or defaults.licence,
        f"Speakers agreed to: {agreed[:_MAX_CHARS]}" if agreed else defaults.consent,
        method or defaults.method,
    )


def _text(value: Any) -> str:
    return " ".join(value.split())[:_MAX_CHARS] if isinstance(value, str) else ""


def _licence_on_hub(source: Mapping[str, Any]) -> str:
    """Return the licence that the card of a data set on the Hub states; empty if it cannot be read."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=environment.hub_endpoint())
        card = api.dataset_info(source["dataset"], revision=source["commit"], timeout=_TIMEOUT_S).card_data
    except Exception:  # gone, private, offline: no reason to fail
        return ""
    licence = card.get("license") if card else None
    licences = licence if isinstance(licence, list) else [licence]
    return licences[0] if len(licences) == 1 and isinstance(licences[0], str) else ""
