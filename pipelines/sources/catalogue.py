"""Settings to a Source: the one table that names every kind."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.recipe import SourceSettings
from pipelines.sources import Source


def open_source(
    settings: SourceSettings, language: str = "sv", *, log: Callable[[str], None] = lambda line: None
) -> Source:
    """The corpus that a recipe's `[source]` names; `language` is the recipe's, `log` is told what was left out."""
    if settings.kind == "common_voice":
        return _common_voice(settings, language, log)
    if settings.kind == "mozilla":
        return _mozilla(settings, language, log)
    return {"tour": _tour, "folder": _folder}[settings.kind](settings)


def _tour(settings: SourceSettings) -> Source:
    from pipelines.sources.tour import TourSource

    return TourSource(settings.train, settings.validation, settings.test, settings.seed)


def _folder(settings: SourceSettings) -> Source:
    from pipelines.sources.folder import FolderSource

    return FolderSource(settings.path, settings.seed)


def _common_voice(settings: SourceSettings, language: str, log: Callable[[str], None]) -> Source:
    from pipelines.sources.common_voice import CommonVoiceSource

    return CommonVoiceSource(settings.path, language, settings.pool, settings.seed, log)


def _mozilla(settings: SourceSettings, language: str, log: Callable[[str], None]) -> Source:
    from pipelines.sources.mozilla import MozillaSource

    return MozillaSource(settings.dataset, language, settings.pool, settings.seed, log)
