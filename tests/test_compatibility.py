"""Artefacts of an earlier version are opened, resumed and compared by this one, and every digest is what it was.

tests/fixtures/make.py made them. Each test works in a copy of that folder, which is the current folder, too: all paths
in the artefacts are relative to it. Bytes are compared where the machine computes as the one that made them did;
elsewhere numbers may differ by rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_recorder import record_log

from pipelines import recipes
from pipelines.experiments import evaluation, run_log, test_set_log
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.comparison import compare, lookup
from pipelines.experiments.sweeps import search_space, sweep
from pipelines.experiments.sweeps.trials import Record
from pipelines.features import identity
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache, open_cache
from pipelines.inference import feedback
from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.batch import job as batch_job
from pipelines.inference.batch import run as batch_run
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment, feedback_log, manifest
from pipelines.recipes import settings
from pipelines.speech.audio import Waveform
from pipelines.speech.recordings import detection
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.checkpoints import fork as checkpoints_fork
from pipelines.whisper import export
from pipelines.whisper import model as whisper_model
from pipelines.worker import whisper_tasks
from pipelines.worker.jobs import Jobs

FIXTURES = Path(__file__).with_name("fixtures")
WORKER_TRAINING = {"epochs": 4.0, "learning_rate": 0.02, "warmup_ratio": 0.125}
"""The toy recipe's own steps, rate and warm-up, in the worker's terms: the run is the same."""
SOURCE = {"kind": "folder", "seed": "7", "table_sha256": "0" * 64, "files_by": "content", "files_sha256": "1" * 64}
"""What a source tells of itself, for identities that no file decides."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "seed": {"training.seed": 1},
    "language": {"language": "da"},
    "float16": {"features.dtype": "float16"},
    "durations": {"features.min_duration_s": 0.5, "features.max_duration_s": 20, "features.workers": 2},
    "curated": {"curation.leaks": "drop", "curation.unique_audio": True, "curation.min_snr_db": 5.0},
    "labels": {"curation.max_label_cer": 0.5, "curation.label_errors": "repair", "curation.label_model": "./base"},
    "planted": {"source.kind": "planted", "source.faults.noise": 0.1, "source.men": 0.2},
    "hub": {"source.kind": "hub", "source.path": "owner/name", "source.splits.train": "train+other"},
    "mix": {
        "source.kind": "mix",
        "source.parts": [
            {"name": "a", "kind": "tour", "weight": 0.5, "gives": ["train", "test"]},
            {"name": "b", "kind": "hub", "path": "owner/name", "weight": 1, "own_names": True},
        ],
    },
    "augmented": {"augment.noise_share": 0.5, "augment.mel_masks": 1},
    "masked": {"model.spec_augment": True, "model.freeze_encoder": True},
    "lora": {"model.adapter": "lora", "model.lora_rank": 4, "model.lora_targets": ["q_proj", "fc1"]},
    "schedule": {"training.scheduler": "cosine", "training.optimizer": "sgd", "training.beta1": 0.8},
    "windows": {"training.window_share": 0.5, "training.window_timestamps": True},
    "student": {"distillation.teacher": "./base", "distillation.decoder_layers": 1, "distillation.kl_weight": 0.5},
    "search": {"search.trials": 9, "search.min_steps": 20, "search.sampler": "tpe"},
    "no_identity": {"training.workers": 2, "training.max_hours": 1.0, "training.tracker": "trackio"},
}
"""Overrides of the toy recipe, by a name for each."""
LATER_SETTINGS = (
    "features.max_rejected_share", "source.allow_missing_files", "source.aligner", "source.min_logprob",
    "source.test_voices", "source.adapt_steps",
    "source.label_model", "source.min_confidence", "source.agreement_model", "source.max_disagreement",
    "source.language_model", "source.exclude", "curation.marks", "curation.non_speech_share",
    "evaluation.beam_size", "training.ema_decay", "training.remove_checkpoints",
    "training.window_fill", "training.window_prompt", "evaluation.stock_pipeline",
    "model.layer_drop", "training.layer_decay", "training.label_smoothing",
    "training.bpe_dropout", "training.precision",
    "training.checkpoint_activations", "model.load_in_8bit",
)  # fmt: skip
"""Settings that were added after the fixtures were made."""
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


# --- what is computed, here and when the fixtures were made -----------------------------------------------------------


def machine() -> str:
    """Name all that decides how sums are rounded here."""
    import torch

    about = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in about if line.startswith("vendor_id")), "")
    return f"torch {torch.__version__}, {platform.machine()} {vendor} {torch.backends.cpu.get_cpu_capability()}"


def toy(overrides: Mapping[str, Any] | None = None) -> settings.Recipe:
    """Return the recipe of the fixtures."""
    return recipes.load("toy.toml", overrides)


def toy_cache() -> FeatureCache:
    """Return the cache of the fixtures, whatever it is called."""
    (folder,) = Path("runs/features").iterdir()
    return open_cache(folder)


def tuned_model() -> Path:
    """Return the folder of the tuned model."""
    (folder,) = Path("runs/toy").glob("train-*/model")
    return folder


def settings_digest(recipe: settings.Recipe) -> str:
    """Return the digest of the settings that existed when the fixtures were made."""
    return recipes.digest({name: value for name, value in recipe.settings().items() if name not in LATER_SETTINGS})


def names_of(
    recipe: settings.Recipe, cache: FeatureCache, base: whisper_model.ModelRef, processor: Any
) -> dict[str, str]:
    """Return the digests of a recipe's settings and of the identities that hang on them."""
    features = identity.cache_identity(recipe, SOURCE, processor)
    lasting = {name: value for name, value in features.items() if not name.startswith("library.")}
    return {
        "settings": settings_digest(recipe),
        "search": recipes.digest(recipe.search_settings()),
        "features": recipes.digest(lasting),
        "run": training_pipeline.run_folder(recipe, cache, base).name,
        "sweep": sweep.folder_of(recipe).name,
    }


def shipped_names() -> dict[str, dict[str, str]]:
    """Return the names of every shipped recipe, as it is and on the base model of the fixtures."""
    base, names = whisper_model.resolve("./base"), {}
    toys = toy_cache(), base, whisper_model.load_processor(base, "sv")
    for name in recipes.names():
        plain = recipes.load(name)
        labelled = {"curation.label_model": "./base"} if plain.curation.label_model else {}
        on_toy = names_of(recipes.load(name, {"model.base": "./base", **labelled}), *toys)
        own = {"settings": settings_digest(plain), "sweep": sweep.folder_of(plain).name}
        names[name] = {**own, **{f"toy_{what}": value for what, value in on_toy.items()}}
    return names


def override_names() -> dict[str, dict[str, str]]:
    """Return the names of the toy recipe under each of SETTINGS, and of a fork."""
    cache, base = toy_cache(), whisper_model.resolve("./base")
    processor = whisper_model.load_processor(base, "sv")
    names = {name: names_of(toy(overrides), cache, base, processor) for name, overrides in SETTINGS.items()}
    fork = checkpoints_fork.find_weights(str(tuned_model().parent), base)
    return {**names, "fork": {"run": training_pipeline.run_folder(toy(), cache, base, fork=fork).name}}


def cache_contents() -> dict[str, Any]:
    """Return what the cache is called, and digests of all that it holds."""
    cache = toy_cache()
    frames = hashlib.sha256(b"".join(cache.log_mel(row).frames.tobytes() for row in range(len(cache.rows))))
    columns = ["id", "split", "text", "speaker", "frames"]
    rows = cache.rows[columns].to_csv(index=False, lineterminator="\n")
    return {
        "folder": cache.folder.name,
        "digest": cache.digest,
        "counts": cache.counts,
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "frames_sha256": frames.hexdigest(),
        "labels_sha256": hashlib.sha256(cache.token_ids.astype("<i4").tobytes()).hexdigest(),
    }


def run_contents() -> dict[str, Any]:
    """Return what the finished run came to."""
    model = training_run.finished_model(tuned_model().parent)
    timed = ("seconds", "clips_per_s")
    steps = [{name: row[name] for name in sorted(row) if name not in timed} for row in model.history]
    return {
        "folder": Path(model.uri).parent.name,
        "digest": model.digest,
        "weights_sha256": weights_sha256(Path(model.uri)),
        "history": steps,
    }


def weights_sha256(model: Path) -> str:
    """Return the sha256 of a model's weights."""
    return manifest.sha256(model / "model.safetensors")


def transcriber_of(model: Path | str) -> Transcriber:
    """Return a transcriber whose name is the same on every machine."""
    ref = whisper_model.resolve(str(model))
    engine = "auto" if export.is_export(ref) else "transformers"
    return Transcriber(ref, engine=engine, device="cpu", max_new_tokens=12)


def transcripts_of(model: Path | str, beam_size: int = 1) -> dict[str, str]:
    """Return what a model writes for three of the recordings, which are tones and no speech to Silero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "is_packaged", lambda: False)
        # by default greedy and without timestamps, as the version that made the fixtures decoded
        plain = {"timestamps": False, "beam_size": beam_size, "min_logprob": -100.0}
        transcriber = transcriber_of(model).with_options(**plain)
        recordings = sorted(Path("speech/clips").glob("[agk]0.wav"))
        return {path.name: transcriber.transcribe(path).text for path in recordings}


def report_contents() -> dict[str, Any]:
    """Return names and scores of the two reports, and of their comparison."""
    reports = {path.name: evaluation.read_report(path) for path in sorted(Path("runs/toy/reports").iterdir())}
    compared = compare.compare(["toy"], runs="runs")
    return {
        "reports": {
            name: {"test_set": one.test_set, "wer": one.score.wer, "ci95": list(one.score.ci95), "cer": one.score.cer}
            for name, one in reports.items()
        },
        "comparison": {"digest": compared.digest, "verdicts": [finding.verdict for finding in compared.findings]},
    }


def sweep_contents() -> dict[str, Any]:
    """Return the sweep's name, its trials, and the settings of the next one."""
    folder = sweep.folder_of(toy(), "runs")
    names = ("number", "settings", "target", "state", "looks", "run")
    trials = list(Record(folder).trials.values())
    facts = [{name: getattr(trial, name) for name in names} for trial in trials]
    return {
        "folder": folder.name,
        "trials": json.loads(json.dumps(facts)),
        "next": search_space.proposal(toy(), len(trials) + 1, trials),
    }


def recorded() -> dict[str, Any]:
    """Return all that expected.json holds, computed from the current folder."""
    (graphs,) = Path("exports/onnx").iterdir()
    return {
        "shipped_recipes": shipped_names(),
        "overrides": override_names(),
        "cache": cache_contents(),
        "run": run_contents(),
        "transcripts": transcripts_of(tuned_model()),
        "export": {"folder": graphs.name, "transcripts": transcripts_of(graphs)},
        "half_precision": export.convert(whisper_model.resolve(str(tuned_model())), "safetensors-float16").name,
        **report_contents(),
        "sweep": sweep_contents(),
    }


# --- the tests --------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the earlier version computed; the current folder is a copy of the fixtures, which no variable overrides."""
    shutil.copytree(FIXTURES, tmp_path / "lab", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path / "lab")
    for name in ("LAB_RUNS", "LAB_FEATURE_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAB_CACHE", "exports")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return json.loads(Path("expected.json").read_text("utf-8"))


def assert_same_weights(model: Path, expected: dict[str, Any], *, by_bytes: bool) -> None:
    """Compare a model with the tuned one up to rounding; with `by_bytes` exactly, on a machine like its maker.

    Training in another thread than the main one ignores `one_thread`: with more threads sums are rounded differently.
    """
    from safetensors.numpy import load_file

    actual, wanted = (load_file(folder / "model.safetensors") for folder in (model, tuned_model()))
    assert actual.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(actual[name], wanted[name], **TOLERANCE, err_msg=name)
    if by_bytes and machine() == expected["made_with"]["machine"]:
        assert weights_sha256(model) == expected["run"]["weights_sha256"]


def test_shipped_recipes_have_the_recorded_digests(expected):
    assert shipped_names() == expected["shipped_recipes"]


def test_overridden_recipes_have_the_recorded_digests(expected):
    assert override_names() == expected["overrides"]


def test_cache_opens_with_the_recorded_contents(expected):
    assert cache_contents() == expected["cache"]


def test_features_stage_reuses_the_cache(expected):
    lines = record_log()
    cache = feature_pipeline.run(toy(), runs="runs")
    assert cache.folder.name == expected["cache"]["folder"]
    assert any("nothing is extracted again" in line for line in lines)
    assert feature_pipeline.open_cache(toy(), runs="runs").digest == expected["cache"]["digest"]


def test_features_stage_extracts_the_recorded_cache(expected):
    extracted = feature_pipeline.run(toy(), runs="anew")
    assert (extracted.folder.name, extracted.counts) == (expected["cache"]["folder"], expected["cache"]["counts"])
    cache = toy_cache()
    for row in range(len(cache.rows)):
        np.testing.assert_allclose(extracted.log_mel(row).frames, cache.log_mel(row).frames, atol=1e-4)
        assert extracted.labels(row) == cache.labels(row)


def test_interrupted_run_ends_with_the_recorded_weights(expected):
    lines = record_log()
    model = training_pipeline.run(toy(), toy_cache(), runs="interrupted")
    assert lines[0] == "resuming from checkpoint-8"
    assert (Path(model.uri).parent.name, model.digest) == (expected["run"]["folder"], expected["run"]["digest"])
    assert_same_weights(Path(model.uri), expected, by_bytes=True)
    for actual, wanted in zip(model.history, expected["run"]["history"], strict=True):
        assert {name: actual[name] for name in wanted} == pytest.approx(wanted, rel=1e-2, abs=1e-3)


def test_finished_run_is_not_trained_again(expected):
    lines = record_log()
    model = training_pipeline.run(toy(), toy_cache(), runs="runs")
    assert lines == [f"this run is finished: {model.uri}"]
    assert run_contents() == expected["run"]


@pytest.fixture
def any_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tones of the fixtures for speech, as the version that made them did with short recordings."""
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)


def test_tuned_model_transcribes_as_recorded(expected, any_sound):
    assert transcripts_of(tuned_model()) == expected["transcripts"]
    by_notes = inference_pipeline.load_transcriber(toy(), runs="runs")
    assert by_notes.ref.revision == expected["run"]["digest"]


def test_export_of_an_earlier_format_transcribes_as_recorded(expected, any_sound):
    """The fixture's graphs have format 4: with beams each text has its own copy of its window's states."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    earlier = environment.cache_folder() / "onnx" / expected["export"]["folder"]
    assert transcripts_of(earlier) == expected["export"]["transcripts"]
    again = export.convert(whisper_model.resolve(str(tuned_model())), "onnx")
    assert again != earlier, "the format of the fixture is read faster now: test that it is used again"
    assert transcripts_of(again) == expected["export"]["transcripts"]
    assert transcripts_of(earlier, beam_size=3) == transcripts_of(again, beam_size=3)
    lines = record_log()
    assert (export.convert(whisper_model.resolve(str(tuned_model())), "onnx"), lines) == (again, [])


def test_new_export_has_the_recorded_name(expected):
    folder = export.convert(whisper_model.resolve(str(tuned_model())), "safetensors-float16")
    assert folder.name == expected["half_precision"]


def test_reports_are_read_and_compared_as_recorded(expected):
    actual = report_contents()
    assert actual["comparison"] == expected["comparison"]
    assert actual["reports"].keys() == expected["reports"].keys()
    for name, wanted in expected["reports"].items():
        assert {**actual["reports"][name], "ci95": 0} == {**wanted, "ci95": 0}
        assert actual["reports"][name]["ci95"] == pytest.approx(wanted["ci95"])


def test_scored_models_are_not_scored_again(expected):
    decoded: list[int] = []
    for uri in ("./base", str(tuned_model())):
        report = experiment_pipeline.evaluate(toy(), toy_cache(), uri, runs="runs", on_clips=decoded.append)
        assert report.folder.name in expected["reports"]
        assert report.page is not None
    assert decoded == []
    assert len(lookup.find("toy", "runs")) == 1


def test_new_scoring_has_the_recorded_name_and_score(expected):
    shutil.rmtree("runs/toy/reports")
    report = experiment_pipeline.evaluate(toy(), toy_cache(), str(tuned_model()), runs="runs")
    assert report.score.wer == pytest.approx(expected["reports"][report.folder.name]["wer"])


def test_sweep_goes_on_with_a_third_trial(expected):
    assert sweep_contents() == expected["sweep"]
    lines = record_log()
    result = sweep.run(toy({"search.trials": 3}), runs="runs")
    assert lines[0].startswith("resuming 2 trial(s) of ")
    assert result.folder.name == expected["sweep"]["folder"]
    assert [trial.number for trial in result.trials] == [1, 2, 3]
    assert result.trials[2].settings == expected["sweep"]["next"]
    for trial, wanted in zip(result.trials, expected["sweep"]["trials"]):
        assert (trial.settings, trial.run) == (wanted["settings"], wanted["run"])
        assert {str(step): trial.looks[int(step)] for step in wanted["looks"]} == wanted["looks"]
    assert result.trials[2].looks


@pytest.mark.slow
def test_worker_goes_on_with_its_interrupted_training(expected):
    state = json.loads(Path("worker/state.json").read_text("utf-8"))
    run = state["job"]["params"]["run"]
    shutil.copytree("runs/features", "worker/features")
    shutil.copytree("interrupted/toy", Path("worker/tuned") / run / "toy")
    folder = Path("worker").absolute()
    jobs = Jobs(whisper_tasks.WhisperFineTuning(toy(), folder), folder)
    try:
        assert jobs.state == "Busy training"
        jobs.job.done.result(120)
        texts = [line["text"] for line in jobs.events.after(0)]
    finally:
        jobs.close()
    assert texts[0] == "dataset began"
    assert "train goes on: the server was ended while it ran" in texts
    assert "resuming from checkpoint-8" in texts
    assert jobs.logs["model"] == f"toy-{expected['run']['digest']}"
    assert_same_weights(Path(jobs.logs["model_uri"]), expected, by_bytes=False)


def test_ledger_is_read_and_appended_to(expected):
    model = whisper_model.resolve(str(tuned_model()))
    before = test_set_log.read(Path("runs"))
    assert [row["tuned"] for row in before] == ["no", "yes"]
    (folder,) = [path for path in Path("runs/toy/reports").iterdir() if before[1]["report"].endswith(path.name)]
    looks = test_set_log.add(Path("runs"), evaluation.read_report(folder), model, "toy", is_new=True)
    assert (looks.scorings, looks.of_model, looks.models) == (3, 2, 2)
    *earlier, last = test_set_log.read(Path("runs"))
    assert earlier == before
    assert {**last, "when": ""} == {**before[1], "when": ""}


def test_history_is_read_and_appended_to(expected):
    runs = Path("runs").absolute()
    (row,) = run_log.read(runs)
    report = evaluation.read_report(runs / row["report"])
    assert row["model"] == expected["run"]["digest"]
    assert row["wer"] == f"{expected['reports'][report.folder.name]['wer']:.6f}"
    assert not run_log.add(report, runs), "a model has one row for each test set"
    path = runs / run_log.FILE
    path.write_text(path.read_text("utf-8").replace(row["model"], "0" * 12), "utf-8")
    assert run_log.add(report, runs)
    old, new = run_log.read(runs)
    unlike = ("when", "model", "code")
    assert {**new, **dict.fromkeys(unlike)} == {**old, **dict.fromkeys(unlike)}


def test_feedback_log_is_read_and_appended_to(expected):
    log = Path("runs/feedback.csv")
    before = feedback_log.read(log)
    assert [row["flag"] for row in before] == ["right", "wrong"]
    assert before[1]["reference"] == "ja, nej; å"
    sound = Waveform(np.full(400, 0.1, dtype=np.float32))
    row = feedback.append(log, feedback.Feedback(output="nej", flag="right", model="toy @ 1", recording=sound))
    assert feedback_log.read(log) == [*before, row]


def test_transcription_goes_on_after_its_journal(expected):
    job = batch_job.plan([Path("talks/talks.csv")])
    assert batch_run.Outline(job).fields["rows_done"] == 2
    lines = record_log()
    summary = batch_run.run(job, transcriber_of(tuned_model())).summary
    assert lines == ["continuing after 2 of 4 rows"]
    assert (summary.rows, summary.errors) == (4, 0)
    assert job.out.is_file() and not job.partial.exists()
