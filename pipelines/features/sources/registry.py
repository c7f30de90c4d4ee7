"""Open the source that a recipe's settings describe; each kind is imported on use."""

from __future__ import annotations

from pipelines.features.sources import Source
from pipelines.recipes.data_settings import SourceSettings


def open_source(settings: SourceSettings, language: str = "sv") -> Source:
    """Return the corpus of a recipe's `[source]` settings; `language` is the recipe's."""
    if settings.kind == "mix":
        return _mix(settings, language)
    if settings.kind in ("hub", "parquet"):
        return _parquet(settings, language)
    if settings.kind == "common_voice":
        return _common_voice(settings, language)
    if settings.kind == "mozilla":
        return _mozilla(settings, language)
    return {"tour": _tour, "planted": _planted, "folder": _folder, "feedback": _feedback}[settings.kind](settings)


def _tour(settings: SourceSettings) -> Source:
    from pipelines.features.sources.synthetic.tour import TourSource

    return TourSource(settings.train, settings.validation, settings.test, settings.seed)


def _planted(settings: SourceSettings) -> Source:
    from pipelines.features.sources.synthetic.planted import FaultRates, PlantedSource

    return PlantedSource(
        settings.train,
        settings.validation,
        settings.test,
        settings.seed,
        FaultRates(**settings.faults.model_dump()),
        settings.men,
        settings.sentences,
    )


def _folder(settings: SourceSettings) -> Source:
    from pipelines.features.sources.folder import FolderSource

    return FolderSource(settings.path, settings.seed)


def _common_voice(settings: SourceSettings, language: str) -> Source:
    from pipelines.features.sources.common_voice.release import CommonVoiceSource

    return CommonVoiceSource(settings.path, language, settings.pool, settings.seed)


def _mozilla(settings: SourceSettings, language: str) -> Source:
    from pipelines.features.sources.common_voice.mozilla import MozillaSource

    return MozillaSource(settings.dataset, language, settings.pool, settings.seed)


def _parquet(settings: SourceSettings, language: str) -> Source:
    from pipelines.features.sources.parquet.hub import DATASET_DEFAULTS, HubFiles
    from pipelines.features.sources.parquet.layout import LayoutSettings
    from pipelines.features.sources.parquet.source import LocalFiles, ParquetSource

    on_hub = settings.kind == "hub"
    defaults = DATASET_DEFAULTS.get(settings.path.removeprefix("hub://").partition("@")[0], {}) if on_hub else {}
    layout = LayoutSettings(
        settings.config,
        settings.audio_column,
        settings.text_column or defaults.get("text_column", ""),
        settings.speaker_column,
        settings.splits.model_dump(),
        language,
    )
    files = HubFiles(settings.path, settings.revision) if on_hub else LocalFiles(settings.path)
    return ParquetSource(files, layout, settings.seed)


def _feedback(settings: SourceSettings) -> Source:
    from pipelines.features.sources.feedback import FeedbackSource

    return FeedbackSource(settings.path)


def _mix(settings: SourceSettings, language: str) -> Source:
    from pipelines.features.sources.mix import MixSource, Part

    parts = [
        Part(part.name, open_source(part, language), part.gives, part.weight, part.count, part.own_names)
        for part in settings.parts
    ]
    return MixSource(tuple(parts), settings.seed)
