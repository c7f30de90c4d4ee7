"""Settings to a Source: the one table that names every kind."""

from __future__ import annotations

from pipelines.recipe import SourceSettings
from pipelines.sources import Source


def open_source(settings: SourceSettings) -> Source:
    """The corpus that a recipe's `[source]` names."""
    return {"tour": _tour, "folder": _folder}[settings.kind](settings)


def _tour(settings: SourceSettings) -> Source:
    from pipelines.sources.tour import TourSource

    return TourSource(settings.train, settings.validation, settings.test, settings.seed)


def _folder(settings: SourceSettings) -> Source:
    from pipelines.sources.folder import FolderSource

    return FolderSource(settings.path, settings.seed)
