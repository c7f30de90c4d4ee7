"""Open the source that a recipe's settings describe; each kind is imported on use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.features.sources import Source
from pipelines.recipes.data_settings import SourceSettings

if TYPE_CHECKING:
    from pipelines.whisper.model import ModelRef

FindModel = Callable[[str, str], "ModelRef"]
"""Maps the name of a model and the setting that names it to the model, which is downloaded if necessary."""


def _resolve(name: str, setting: str) -> ModelRef:
    from pipelines.whisper import model as whisper_model

    return whisper_model.resolve(name)


def open_source(
    settings: SourceSettings, language: str = "sv", find_model: FindModel = _resolve, processes: int = 1
) -> Source:
    """Return the corpus of a recipe's `[source]` settings; `language` is the recipe's.

    `find_model` is called when the source needs a model. features.identity.source_of knows models of other recipes.
    `processes`: how many a source with models may start.
    """
    sizes = (settings.train, settings.validation, settings.test, settings.seed)
    match settings.kind:
        case "tour":
            from pipelines.features.sources.synthetic.tour import TourSource

            return TourSource(*sizes)
        case "tour-english":
            from pipelines.features.sources.synthetic.english import EnglishSource

            return EnglishSource(*sizes)
        case "planted":
            from pipelines.features.sources.synthetic.planted import FaultRates, PlantedSource

            faults = FaultRates(**settings.faults.model_dump())
            return PlantedSource(*sizes, faults, settings.men, settings.sentences, settings.test_voices)
        case "folder":
            from pipelines.features.sources.folder import FolderSource

            return FolderSource(settings.path, settings.seed)
        case "aligned":
            return _aligned(settings, language, find_model, processes)
        case "unlabelled":
            return _unlabelled(settings, language, find_model)
        case "feedback":
            from pipelines.features.sources.feedback import FeedbackSource

            return FeedbackSource(settings.path)
        case "common_voice":
            from pipelines.features.sources.common_voice.release import CommonVoiceSource

            return CommonVoiceSource(settings.path, language, settings.pool, settings.seed)
        case "mozilla":
            from pipelines.features.sources.common_voice.mozilla import MozillaSource

            return MozillaSource(settings.dataset, language, settings.pool, settings.seed)
        case "mix":
            return _mix(settings, language, find_model, processes)
        case _:
            return _parquet(settings, language)


def local_identity(settings: SourceSettings, language: str = "sv", find_model: FindModel = _resolve) -> dict[str, str]:
    """Return the part of the source's identity that files on this machine decide, read from them now.

    An archive is left out: reading it takes long, and it is one file.
    """
    if settings.kind == "mix":
        parts = {part.name: local_identity(part, language, find_model) for part in settings.parts}
        return {f"{name}.{field}": value for name, fields in parts.items() for field, value in fields.items()}
    is_local = settings.kind in ("folder", "parquet", "feedback", "common_voice", "aligned", "unlabelled")
    if not is_local or (settings.kind == "common_voice" and Path(settings.path).expanduser().is_file()):
        return {}
    return open_source(settings, language, find_model).identity()


def _aligned(settings: SourceSettings, language: str, find_model: FindModel, processes: int) -> Source:
    from pipelines.features.sources.aligned.source import AlignedSource

    values = {name: getattr(settings, name) for name in "path aligner min_logprob seed adapt_steps".split()}
    return AlignedSource(**values, language=language, processes=processes, find_model=find_model)


def _unlabelled(settings: SourceSettings, language: str, find_model: FindModel) -> Source:
    from pipelines.features.sources.unlabelled.source import UnlabelledSource

    names = "path label_model min_confidence agreement_model max_disagreement language_model exclude".split()
    values = {name: getattr(settings, name) for name in names}
    return UnlabelledSource(**values, language=language, find_model=find_model)


def _parquet(settings: SourceSettings, language: str) -> Source:
    from pipelines.features.sources.parquet.hub import DATASET_DEFAULTS, HubFiles
    from pipelines.features.sources.parquet.layout import LayoutSettings
    from pipelines.features.sources.parquet.local import LocalFiles
    from pipelines.features.sources.parquet.source import ParquetSource

    on_hub = settings.kind == "hub"
    defaults = DATASET_DEFAULTS.get(settings.path.removeprefix("hub://").partition("@")[0], {}) if on_hub else {}
    layout = LayoutSettings(
        settings.config,
        settings.audio_column,
        settings.text_column or defaults.get("text_column", ""),
        settings.speaker_column,
        settings.splits.model_dump(),
        language,
        settings.allow_missing_files,
    )
    files = HubFiles(settings.path, settings.revision) if on_hub else LocalFiles(settings.path)
    return ParquetSource(files, layout, settings.seed)


def _mix(settings: SourceSettings, language: str, find_model: FindModel, processes: int) -> Source:
    from pipelines.features.sources.mix import MixSource, Part

    parts = [
        Part(
            *(part.name, open_source(part, language, find_model, processes)),
            *(part.gives, part.weight, part.count, part.own_names),
        )
        for part in settings.parts
    ]
    return MixSource(tuple(parts), settings.seed)
