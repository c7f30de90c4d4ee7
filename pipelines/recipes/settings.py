"""A recipe: all settings of one experiment, frozen and typed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.recipes.base_settings import AUTO, OR_AUTO, Seed, Settings, described, flatten
from pipelines.recipes.data_settings import (
    AugmentSettings,
    CurationSettings,
    FeatureSettings,
    GuardSettings,
    SourceSettings,
)
from pipelines.recipes.search_settings import SearchSettings
from pipelines.recipes.training_settings import DistillationSettings, ModelSettings, TrainingSettings

MAX_NEW_TOKENS = 440
"""Most tokens of a transcript: Whisper's decoder has 448 positions, and a prompt of four tokens."""
SPACE_PREFIX = "search.space."
"""Prefix of the flat names of a search space: `search.space.training.steps.low`."""


class EvaluationSettings(Settings):
    """How clips are transcribed and scored."""

    batch_frames: int = Field(24_000, ge=3_000)
    """Maximum log-mel frames (10 ms each) per decoding batch, padding included; at least 3,000."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), *OR_AUTO] = 128
    """Maximum tokens of one transcript, 1 to 440, or `auto`: as many as could be spoken in the longest clip."""
    beam_size: int = Field(1, ge=1, le=32)
    """Hypotheses that are extended side by side, 1 to 32; 1 decodes greedily, as validation always does."""
    stock_pipeline: Annotated[
        Literal["auto"] | bool | Annotated[int, Field(ge=1)], described("'auto', true, false or a number from 1")
    ] = AUTO
    """Also score in transformers' own pipeline, at 30 s: `true` all clips, `false` none, a number so many of them, or
    `auto`: 24 clips of a tuned model, none of others."""
    bootstrap_samples: int = Field(1_000, ge=100)
    """Resamples for each 95 % interval, at least 100."""
    seed: Seed = 13
    """Seed of the resampling."""


class Recipe(Settings):
    """All settings of one experiment."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """Name of the experiment and of its folder; at most 64 characters."""
    language: str = "sv"
    """The language: Whisper's code, such as sv, da or no; `Swedish` and `sv-SE` become `sv`."""
    source: SourceSettings = SourceSettings()
    """Where the speech comes from."""
    model: ModelSettings = ModelSettings()
    """The model that training starts from."""
    features: FeatureSettings = FeatureSettings()
    """How features are computed and stored."""
    curation: CurationSettings = CurationSettings()
    """Which training clips are kept."""
    augment: AugmentSettings = AugmentSettings()
    """Random changes of the training clips."""
    distillation: DistillationSettings = DistillationSettings()
    """Training of a student with a teacher."""
    training: TrainingSettings = TrainingSettings()
    """Batches, optimisation, validation and checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How clips are transcribed and scored."""
    guards: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=24)], GuardSettings] = {}
    """Further test sets by name, `[guards.NAME]`: what tuning must not forget. They change no weight and no digest."""
    search: SearchSettings = Field(SearchSettings(), exclude=True)
    """What a sweep tries. Excluded from dumps and digests: a run is the same with or without a sweep."""
    _origin: str = PrivateAttr("")

    def __eq__(self, other: object) -> bool:
        """Compare all settings; the origin does not count."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    @property
    def origin(self) -> str:
        """Name or path that the recipe was loaded by, for the commands that messages suggest; may be empty."""
        return self._origin

    @field_validator("language")
    @classmethod
    def _language_as_code(cls, language: str) -> str:
        try:
            return languages.parse(language)
        except LabError as error:
            raise ValueError(str(error)) from None

    @field_validator("guards")
    @classmethod
    def _guard_languages_as_codes(cls, guards: dict[str, GuardSettings]) -> dict[str, GuardSettings]:
        def parsed(guard: GuardSettings) -> GuardSettings:
            return guard.model_copy(update={"language": guard.language and cls._language_as_code(guard.language)})

        return {name: parsed(guard) for name, guard in guards.items()}

    @model_serializer(mode="wrap")
    def _without_empty_guards(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `guards` if there are none: recipes of older versions have none."""
        return {name: value for name, value in serialise(self).items() if name != "guards" or value}

    @model_validator(mode="after")
    def _student_has_no_adapter(self) -> Recipe:
        if self.distillation.teacher and self.model.adapter:
            raise ValueError("a student's weights are tuned themselves: distillation.teacher excludes model.adapter")
        return self

    def settings(self, *groups: str) -> dict[str, Any]:
        """Return the settings, flat: `group.name` to JSON value; all of them, or those of `groups`."""
        dump = self.model_dump(mode="json")
        return flatten({name: dump[name] for name in groups} if groups else dump)

    def search_settings(self) -> dict[str, Any]:
        """Return the settings of the search, which `settings` leaves out, as a flat dictionary."""
        flat = flatten({"search": self.search.model_dump(mode="json", exclude_none=True)})
        return {name: value for name, value in flat.items() if not (name.startswith(SPACE_PREFIX) and value == [])}

    def changed(self, group: str) -> dict[str, Any]:
        """Return the settings of `group` that differ from their defaults: `group.name` to JSON value.

        Identities include only these, so that a new setting with its default leaves existing digests unchanged.
        """
        settings = getattr(self, group)
        defaults = type(settings)().model_dump(mode="json")
        values = settings.model_dump(mode="json")
        return {f"{group}.{name}": value for name, value in values.items() if value != defaults.get(name)}
