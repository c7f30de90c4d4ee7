"""TODO: describe this module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """What every group of settings is: frozen, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class SplitSettings(Settings):
    """hub, parquet: the data set's own splits behind the lab's. Empty: guessed by name and told. `none`: left empty.
    validation, test: `5%` draws so many of the training speakers."""

    train: str = ""
    """One name, or several as in `train+validated`."""
    validation: str = ""
    test: str = ""

    @model_validator(mode="after")
    def _selects_by_no_test_split(self) -> SplitSettings:
        for name in self.validation.split("+"):
            if _TEST.search(name):
                raise ValueError(
                    f"source.splits.validation must not be a test split: training selects by it, got {name.strip()!r}. "
                    "Name another, or draw one from the training speakers with '5%'"
                )
        return self


_SPACE = "search.space."
"""Before the dotted name of a searched setting, and the name of what is told of it."""
_TEST = re.compile(r"(?<![a-z])test(ing)?(?![a-z])", re.IGNORECASE)
"""What a data set's own test split is called: test, test.clean, partial-test."""


class FaultSettings(Settings):
    """planted: shares of the training clips that have a fault; no clip has two. See sources/synthetic/planted.py."""

    label_swap: float = Field(0.0, ge=0, le=1)
    """The transcript is another clip's."""
    label_word: float = Field(0.0, ge=0, le=1)
    """One word of the transcript was dropped, doubled or exchanged."""
    noise: float = Field(0.0, ge=0, le=1)
    """Noise about as loud as the speech."""
    clipping: float = Field(0.0, ge=0, le=1)
    """A quarter of the samples at full scale."""
    duplicate: float = Field(0.0, ge=0, le=1)
    """The very clip was there before."""
    leak: float = Field(0.0, ge=0, le=1)
    """A speaker, a sentence or a clip of the test."""


class SourceSettings(Settings):
    """Which speech: see pipelines/features/sources/."""

    kind: Literal["tour", "planted", "folder", "common_voice", "mozilla", "hub", "parquet", "feedback", "mix"] = "tour"
    """`tour`: synthetic Swedish made at run time. `planted`: the same, with known faults in training.
    `folder`: your own audio files and a table of transcripts.
    `common_voice`: an archive of Common Voice, or its folder. `mozilla`: the same from Mozilla Data Collective.
    `hub`: a Parquet data set on the Hugging Face Hub. `parquet`: such files on a disk. `feedback`: what listeners
    corrected in the app. `mix`: several of these, see `parts`."""
    path: str = ""
    """folder: where the audio and its table lie. common_voice: the .tar.gz, or the folder that it unpacks to.
    hub: `owner/name`. parquet: a file or a folder. feedback: the log."""
    dataset: str = ""
    """mozilla: the data set's id or slug at Mozilla Data Collective."""
    pool: Literal["train", "train+validation", "validated"] = "train"
    """common_voice, mozilla: which clips are trained on (see pipelines/features/sources/common_voice/release.py)."""
    revision: str = ""
    """hub: branch, tag or commit; empty takes main, or the Hub's own conversion where main has no Parquet."""
    config: str = ""
    """hub, parquet: the configuration (sv_se); empty takes the only one, or that of the recipe's language."""
    audio_column: str = ""
    """hub, parquet: empty takes the only column of audio files."""
    text_column: str = ""
    """hub, parquet: empty takes the only column that is called text, sentence, transcription or the like."""
    speaker_column: str = ""
    """hub, parquet: empty takes speaker, speaker_id or client_id where there is one."""
    splits: SplitSettings = SplitSettings()
    parts: tuple[PartSettings, ...] = ()
    """mix: the sources, each a table `[[source.parts]]`: the settings of a source, and `name, gives, weight, count`."""
    train: int = Field(960, ge=1)
    """tour, planted: number of training utterances."""
    validation: int = Field(120, ge=1)
    """tour, planted: number of validation utterances."""
    test: int = Field(160, ge=1)
    """tour, planted: number of test utterances."""
    faults: FaultSettings = FaultSettings()
    men: float = Field(0.5, ge=0, le=1)
    """planted: share of the training utterances that men speak."""
    sentences: str = ""
    """planted: a text file whose lines are spoken in training; empty: the tour's sentences."""
    seed: int = 7
    """Draws sentences, speakers and splits."""

    @model_validator(mode="after")
    def _has_its_place(self) -> SourceSettings:
        if self.kind in _PLACES and not self.path:
            raise ValueError(f"source.kind is {self.kind!r}, so source.path must name {_PLACES[self.kind]}")
        if self.kind == "mozilla" and not self.dataset:
            raise ValueError("source.kind is 'mozilla', so source.dataset must name the data set's id")
        if (self.kind == "mix") != bool(self.parts):
            raise ValueError("source.kind 'mix' and source.parts belong together: give both or none")
        return self


_PLACES = {
    "folder": "the folder",
    "common_voice": "the archive or its folder",
    "hub": "the data set as owner/name",
    "parquet": "a Parquet file or a folder of them",
    "feedback": "the app's log",
}


class PartSettings(SourceSettings):
    """One source of a mix."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=32)
    """Goes before the ids of its rows, and stands in their column `origin`."""
    gives: tuple[Literal["train", "validation", "test"], ...] = Field(("train",), min_length=1)
    """The splits that are taken from it; the others are not read."""
    weight: float = Field(0.0, ge=0)
    """Its share of the training rows, relative to the others'; the mix ends with the first part that does. In all
    parts that give train, or in none: then every row is taken."""
    count: int = Field(0, ge=0)
    """Training rows that are taken, the first in its order; 0 takes them all."""
    own_names: bool = False
    """Its rows keep the ids and speakers that they have without the mix, so that reports can be compared with reports
    on it alone. In one part at most."""

    @model_validator(mode="after")
    def _is_no_mix(self) -> PartSettings:
        if self.kind == "mix":
            raise ValueError("a part cannot be a mix itself: list its parts here")
        return self


class ModelSettings(Settings):
    """Where training starts from."""

    base: str = "openai/whisper-tiny"
    """A Hub id, `hub://owner/name@revision`, a folder, or a quantised model such as `openai/whisper-small@q8`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in encoder and decoder while training. Whisper had none, and whisper-tiny does not bear 0.1."""
    spec_augment: bool = False
    """Mask stretches of time and of mel bands while training (SpecAugment, Park et al. 2019)."""
    freeze_encoder: bool = False
    """Leave the encoder as it is, without dropout, and tune the decoder alone: less memory, and no step back
    through the encoder."""
    adapter: Literal["", "lora"] = ""
    """`lora`: tune small matrices beside the frozen weights (Hu et al. 2021); they are merged into them at the end.
    With `freeze_encoder` they lie in the decoder alone."""
    lora_rank: int = Field(8, ge=1)
    """lora: inner size of the matrices."""
    lora_alpha: float = Field(16.0, gt=0)
    """lora: what they add is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """lora: dropout before the matrices."""
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = Field(
        ("q_proj", "v_proj"), min_length=1
    )
    """lora: the layers that have them: the attention's four, and the two of the feed-forward part."""

    @model_validator(mode="after")
    def _has_its_adapter(self) -> ModelSettings:
        fields = {name: field for name, field in type(self).model_fields.items() if name.startswith("lora_")}
        told = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if told and not self.adapter:
            raise ValueError(f"model.{told[0]} is set, so model.adapter must be 'lora'")
        return self


class FeatureSettings(Settings):
    """What is kept of each clip."""

    dtype: Literal["float32", "float16"] = "float32"
    """float32 rebuilds the stock extractor's tensor; float16 halves the cache, error at most 5e-4."""
    min_duration_s: float = Field(0.1, ge=0)
    """Shorter clips are rejected as `too_short`."""
    max_duration_s: float = Field(30.0, gt=0, le=30)
    """Longer clips are rejected as `too_long`: the extractor would cut the sound and keep the whole transcript."""
    min_peak: float = Field(1e-3, ge=0, le=1)
    """Clips whose largest sample is below this share of full scale are rejected as `silent`."""
    shard_clips: int = Field(256, ge=1)
    """Clips to a shard: the unit that a killed run repeats."""
    workers: int = Field(0, ge=0)
    """Processes that extract side by side; 0 takes every core for a corpus that is large enough. Changes no byte."""


class CurationSettings(Settings):
    """What is kept of the training split. Validation and test stay as their source has them: they are the measure."""

    leaks: Literal["refuse", "drop", "ignore"] = "refuse"
    """Training clips that share a speaker, a sentence or the very audio with a validation or test row: `refuse` stops
    with counts and first examples, `drop` leaves them out, `ignore` trains on them."""
    held_out: tuple[str, ...] = ()
    """More rows that must not be trained on: tables (.tsv, .csv) such as another release's `test.tsv`, or caches."""
    min_up_votes: int = Field(0, ge=0)
    """Fewer listeners who found sound and text alike: `votes`. Rows that tell no votes pass."""
    max_down_votes: int = Field(-1, ge=-1)
    """More listeners who found them unlike: `votes`. -1 sets no limit."""
    unique_sentences: bool = False
    """Keep the first of the clips in which one speaker says one sentence; rows without a speaker pass."""
    unique_audio: bool = False
    """Keep the first of the clips that sound alike to the last sample, whatever file format they came in."""
    balance_by: Literal["", "gender", "accent", "age"] = ""
    """Thin the larger groups of this column; rows whose source does not tell it pass."""
    balance_ratio: float = Field(1.0, ge=1)
    """The largest group keeps at most this many clips for each clip of the smallest."""
    max_per_speaker: int = Field(0, ge=0)
    """At most so many clips of one speaker; 0 sets no limit."""
    full_stop: bool = False
    """Put a full stop after transcripts that end without punctuation: no word changes."""
    min_chars_per_s: float = Field(0.0, ge=0)
    """Fewer letters and digits in a second: `slow_speech` (a cut transcript, or a long silence)."""
    max_chars_per_s: float = Field(0.0, ge=0)
    """More letters and digits in a second: `fast_speech` (a cut recording). 0 sets no limit."""
    min_level_dbfs: float = Field(-120.0, ge=-120, le=0)
    """Clips whose root mean square is lower: `quiet`. -120 sets no limit."""
    max_clipped_share: float = Field(1.0, ge=0, le=1)
    """Clips with a larger share of samples at full scale: `clipped`."""
    max_silence_share: float = Field(1.0, ge=0, le=1)
    """Clips with a larger share of silence before and after the speech: `silence`."""
    min_snr_db: float = Field(0.0, ge=0)
    """Clips with a lower estimate of signal over noise: `noisy`. 0 sets no limit."""
    max_label_cer: float = Field(0.0, ge=0)
    """Clips of which `label_model` hears something with a higher character error rate: `label_error`. 0: not asked."""
    label_errors: Literal["drop", "repair"] = "drop"
    """What becomes of them: left out, or given what the model heard as their transcript."""
    label_model: str = ""
    """The model that is asked; empty: the recipe's base model. `run:<recipe>`: what that recipe trained on this machine
    with the same `training.seed`, the newest."""
    seed: int = 11
    """Draws what balance and `max_per_speaker` keep."""


class DistillationSettings(Settings):
    """A smaller student, taught by a tuned model; see training/distillation.py. Without a teacher: plain tuning."""

    teacher: str = ""
    """Who teaches, and gives the student its first weights: a model's URI, or `run:<recipe>`: what that recipe's
    [model], [augment] and [training] make of this recipe's data and `model.base`."""
    decoder_layers: int = Field(0, ge=0)
    """The student's decoder layers, spaced as far apart in the teacher's as can be; 0 keeps all."""
    encoder_layers: int = Field(0, ge=0)
    """The same of the encoder. With all of them and `model.freeze_encoder` teacher and student share one encoder, which
    runs once."""
    temperature: float = Field(2.0, gt=0)
    """Softens the distributions of both before they are compared."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the divergence from the teacher's distributions beside the cross entropy, which has 1."""
    labels: Literal["teacher", "transcript"] = "teacher"
    """What cross entropy learns: what the teacher hears (pseudo-labels), or the transcripts."""
    max_label_wer: float = Field(0.5, ge=0)
    """Training clips in which the teacher hears something with a higher word error rate are left out; 0 keeps all."""

    @model_validator(mode="after")
    def _has_its_teacher(self) -> DistillationSettings:
        told = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if told and not self.teacher:
            raise ValueError(
                f"distillation.{told[0]} is set, so distillation.teacher must name a model or run:<recipe>"
            )
        return self


class AugmentSettings(Settings):
    """How training clips are varied, anew in every epoch; see augmentation.py. The defaults leave them as they are."""

    speed: float = Field(0.0, ge=0, le=0.5)
    """Each clip is played at a rate drawn from 1 - speed to 1 + speed; its pitch moves along."""
    gain_db: float = Field(0.0, ge=0, le=40)
    """Each clip is made louder or softer by at most this."""
    noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips that white noise is added to."""
    noise_snr_db: float = Field(15.0, ge=-10, le=60)
    """Signal over noise of the loudest noise; it is drawn from here to 20 dB above."""
    time_masks: int = Field(0, ge=0)
    """SpecAugment: stretches of time that are masked in each clip, each at most `time_mask_share` of it."""
    time_mask_share: float = Field(0.1, gt=0, le=0.5)
    mel_masks: int = Field(0, ge=0)
    """SpecAugment: stretches of mel bands that are masked in each clip, each at most `mel_mask_bands` wide."""
    mel_mask_bands: int = Field(10, ge=1, le=40)
    seed: int = 17


class TrainingSettings(Settings):
    """How the weights are tuned."""

    steps: int = Field(120, ge=1)
    """Optimizer steps in all."""
    batch_size: int = Field(8, ge=1)
    """Clips to a batch, all at one length."""
    micro_batch: int = Field(0, ge=0)
    """Clips of a batch that go through the model at once; 0 takes the batch, and halves where memory runs out.
    Changes the weights by rounding, and by other draws of dropout."""
    accumulation: int = Field(1, ge=1)
    """Batches to an optimizer step."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from 0; after them `scheduler` says how it goes on."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up the learning rate falls to 0 in a line, falls to 0 in half a cosine, or stays."""
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """torch's. `adafactor` (Shazeer and Stern 2018) keeps two sums for each matrix in place of AdamW's two numbers for
    each weight, and takes steps relative to the weights' size. `sgd` keeps one number; it needs far larger rates."""
    weight_decay: float = Field(0.0, ge=0)
    """On matrices alone: biases and layer norms are left out."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """adamw: how slowly the mean of the gradients forgets; sgd: its momentum; adafactor has none."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """adamw: how slowly the mean of their squares forgets; Whisper itself was trained with 0.98."""
    max_grad_norm: float = Field(1.0, gt=0)
    context: Literal["clip", "full"] = "clip"
    """`clip`: the encoder sees each batch at the length of its longest clip. `full`: always 30 s."""
    bucket_batches: int = Field(20, ge=1)
    """Batches that are sorted by length together before they are cut and shuffled; 1 draws batches without sorting."""
    eval_every: int = Field(40, ge=1)
    """Steps between two looks at the validation split, each followed by a checkpoint."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest complete checkpoints that are kept; the best on validation is kept besides."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations without a better WER; 0 never stops early."""
    window_share: float = Field(0.0, ge=0, le=1)
    """Share of the training clips that are joined to windows of 30 s, drawn anew in every epoch: for models that are
    to transcribe long recordings. See training/windows.py."""
    window_timestamps: bool = False
    """The transcripts of windows tell when each clip begins and ends, in Whisper's timestamp tokens."""
    max_hours: float = Field(0.0, ge=0)
    """End after so many hours of one sitting, with a checkpoint that the next sitting goes on from; 0 sets no limit."""
    fast_dev_run: bool = False
    """Two steps and a look at a few clips, in folders of their own: to see that all works. The figures mean nothing."""
    tracker: Literal["", "trackio", "tensorboard", "wandb", "mlflow"] = ""
    """Which experiment tracker is told of losses and scores; each needs its package. trackio and tensorboard write to
    this machine alone."""
    workers: int = Field(0, ge=0)
    """Processes that load batches."""
    seed: int = 42

    @model_validator(mode="after")
    def _has_its_windows(self) -> TrainingSettings:
        if self.window_timestamps and not self.window_share:
            raise ValueError("training.window_timestamps is set, so training.window_share must be above 0")
        return self


class EvaluationSettings(Settings):
    """How transcripts are made and scored."""

    batch_frames: int = Field(24_000, ge=3_000)
    """Most log-mel frames (10 ms each) in one decoding batch, padding counted."""
    max_new_tokens: int = Field(128, ge=1, le=440)
    """Tokens after which a transcript is cut."""
    bootstrap_samples: int = Field(1_000, ge=100)
    """Resamples behind every 95 % interval."""
    seed: int = 13


class ParameterSettings(Settings):
    """What a sweep may set one setting to."""

    kind: Literal["choice", "uniform", "loguniform", "int"]
    """`choice`: one of `values`. `uniform`: any number from `low` to `high`; `loguniform`: the same, drawn by its
    logarithm, for what spans powers of ten. `int`: a whole number, both ends included."""
    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _has_its_range(self) -> ParameterSettings:
        if self.kind == "choice":
            if len(self.values) < 2 or self.low is not None or self.high is not None:
                raise ValueError("a choice needs two or more `values`, and neither `low` nor `high`")
            return self
        if self.values or self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"{self.kind} needs `low` below `high`, and no `values`")
        if self.kind == "loguniform" and self.low <= 0:
            raise ValueError("loguniform needs a `low` above 0")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("int needs whole numbers")
        return self


class SearchSettings(Settings):
    """What a sweep tries (see pipelines/sweeps): no part of what a single run is."""

    trials: int = Field(16, ge=1)
    """How many settings are tried; raised later, the sweep goes on."""
    sampler: Literal["random", "tpe"] = "random"
    """`tpe`: Optuna's tree-structured Parzen estimator, which looks where earlier trials did well."""
    reduction: int = Field(3, ge=1)
    """ASHA: at each rung one trial of so many goes on, to so many times the steps. 1: all are trained to the end."""
    min_steps: int = Field(0, ge=0)
    """ASHA: steps up to the first rung; 0 takes `training.eval_every`, of which every rung is a multiple."""
    max_hours: float = Field(0.0, ge=0)
    """No trial is begun after so many hours of training, all trials and sittings together; 0 sets no limit."""
    seed: int = 19
    """Draws the settings."""
    space: dict[str, ParameterSettings] = {}
    """Each searched setting, by its dotted name, as a table: `[search.space.training.learning_rate]`."""


class Recipe(Settings):
    """A whole experiment."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    language: str = Field("sv", pattern=r"^[a-z]{2,3}$")
    """Whisper's language code: sv, da, nb ..."""
    source: SourceSettings = SourceSettings()
    model: ModelSettings = ModelSettings()
    features: FeatureSettings = FeatureSettings()
    curation: CurationSettings = CurationSettings()
    augment: AugmentSettings = AugmentSettings()
    distillation: DistillationSettings = DistillationSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    search: SearchSettings = Field(SearchSettings(), exclude=True)
    """Left out of every dump, and so of all identities: a run is the same whether a sweep made it or not."""

    @model_validator(mode="after")
    def _tunes_what_a_student_has(self) -> Recipe:
        if self.distillation.teacher and self.model.adapter:
            raise ValueError("a student's weights are tuned themselves: distillation.teacher excludes model.adapter")
        return self

    def settings(self, *groups: str) -> dict[str, Any]:
        """The settings as a flat dictionary, `group.name` to value; all of them, or those of `groups`."""
        dump = self.model_dump(mode="json")
        return flatten({name: dump[name] for name in groups} if groups else dump)

    def changed(self, group: str) -> dict[str, Any]:
        """The settings of `group` that are not at their defaults, flat: what a later group adds to an identity.

        A group whose defaults change nothing leaves the digests of all that was made before it as they are.
        """
        plain = type(getattr(self, group))().model_dump(mode="json")
        told = getattr(self, group).model_dump(mode="json")
        return {f"{group}.{name}": value for name, value in told.items() if value != plain[name]}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
