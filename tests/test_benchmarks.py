"""Benchmarks run and say what they promise to say; their figures need a quiet machine and more clips than this."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from benchmarks import aligned_data, alignment, gpu, precision, pseudo_data, rare_names, recordings, sides
from pipelines.features.sources.synthetic.planted import PlantedSource
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.features.sources.synthetic.tour_text import hand_sentences
from pipelines.speech import text
from pipelines.whisper import model as whisper_model

ROOT = Path(__file__).parents[1]
PEERS = [name for name in sides.DEFAULT if name != "whisper.cpp"]


@pytest.mark.slow
def test_the_feature_benchmark_ends_with_its_figures(tiny_folder, tmp_path):
    command = [sys.executable, "benchmarks/features.py", "--smoke", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} == {
        "speedup", "floor_fraction", "bytes_ratio_f32", "bytes_ratio_f16", "reads_per_s", "rss_growth", "rate_growth"
    }  # fmt: skip
    assert all(value > 0 for value in result.values())
    assert result["bytes_ratio_f32"] < 1 / 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_window_benchmark_scores_clips_and_windows(toy_cache, toy_model):
    command = [sys.executable, "benchmarks/windows.py", "--cache", toy_cache.uri, str(toy_model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert found["clips"]["n"] == len(toy_cache.split("test")) >= found["windows"]["n"]
    assert found["clips"]["words"] == found["windows"]["words"]
    assert found["clips"]["speakers"] == found["windows"]["speakers"]


@pytest.mark.slow
def test_the_training_benchmark_ends_with_its_figures(toy_model, tmp_path):
    command = [
        sys.executable,
        "benchmarks/training.py",
        "--smoke",
        "--model",
        str(toy_model),
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} - {"mfu"} == {
        "speedup", "speedup_4s", "eval_speedup", "memory_ratio", "device", "wer_classic", "wer_ours", "delta_wer_ci95"
    }  # fmt: skip
    low, high = result["delta_wer_ci95"]
    assert low <= result["wer_ours"] - result["wer_classic"] <= high
    assert "mfu" not in result or torch.cuda.is_available()
    assert min(result["speedup"], result["speedup_4s"], result["eval_speedup"], result["memory_ratio"]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_review_benchmark_counts_the_errors_of_each_order(toy_model, tmp_path):
    command = [sys.executable, "benchmarks/review.py", "--smoke", "--model", str(toy_model), "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    n_wrong = result["swapped"] + result["by_word"]
    assert result["clips"] == 48 and 0 < n_wrong < 48
    assert {*result["found"]} == {"random", "CER", "loss per token", "gap (the page's)"}
    for found in result["found"].values():
        assert 0 < found["25"] <= found["50"] == found["200"] == n_wrong, "all clips are among the first 50"
    page = result["page"]["25"]
    assert 0 < page["wrong"] <= n_wrong and 0 < page["estimate"] <= 1


def test_precision_benchmark_times_both_in_turns(toy_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--model", str(toy_model), "--seconds", "1", "--steps", "2"])
    precision.main()
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    low, high = found["quartiles"]
    assert 0 < low <= found["ratio"] <= high
    assert min(found["float32_s"], found["bfloat16_s"]) >= 0


@pytest.mark.slow
def test_the_benchmark_of_the_api_ends_with_its_figures(toy_model):
    if not importlib.util.find_spec("locust"):  # importing it here would exchange this process's threads for greenlets
        pytest.skip("locust is not installed")
    command = [sys.executable, "benchmarks/serving.py", "--smoke", "--model", str(toy_model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} == {"users", "peak_mb", "model", "engine", "cores", "load"}
    assert {*result["users"]} == {"1", "3"}
    for told in result["users"].values():
        assert told["requests"] > 0 and told["failed"] == 0
        assert 0 < told["p50_s"] <= told["p95_s"] and told["per_s"] > 0


@pytest.mark.slow
def test_the_soak_with_a_microphone_ends_with_its_figures(toy_model):
    if not importlib.util.find_spec("locust"):
        pytest.skip("locust is not installed")
    command = [
        sys.executable,
        "benchmarks/serving.py",
        "--smoke",
        "--model",
        str(toy_model),
        "--engine",
        "transformers",
    ]
    command += ["--soak-minutes", "0.05", "--users", "2", "--microphones", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == [] and result["failed"] == 0 and result["requests"] > 0
    assert result["routes"]["/live"]["requests"] > 0
    talks = result["microphones"]
    assert talks["talks"] > 0 and talks["unfinished"] == []
    assert talks["transcribed_s"] == pytest.approx(talks["spoken_s"], abs=0.1 * talks["talks"])
    assert {server: one["files_left"] for server, one in result["servers"].items()} == {"api": 0, "app": 0}


@pytest.fixture(scope="module")
def training():
    """benchmarks/training.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_of_training", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("n_frames", "n_tokens"), [(240, 9), (3000, 30)])
def test_the_formula_counts_what_the_model_computes(training, toy_model, n_frames, n_tokens):
    from torch.utils.flop_counter import FlopCounterMode

    config = WhisperConfig.from_pretrained(toy_model, attn_implementation="eager", use_cache=False)
    model = WhisperForConditionalGeneration(config)
    whisper_model.allow_short_context(model)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(1, config.num_mel_bins, n_frames), decoder_input_ids=torch.zeros(1, n_tokens, dtype=int))
    assert 3 * counted.get_total_flops() == pytest.approx(training.flops.flops(config, n_frames, n_tokens), rel=0.01)


def test_utilisation_is_told_of_a_gpu_whose_peak_is_known(training, toy_cache, toy_model, monkeypatch):
    side, given = training.Side(1000.0, 1.0, 1.0, []), {"model.base": str(toy_model)}
    corpora = {"": (toy_cache, given, side, side)}
    assert training.utilisation(corpora) == {}
    monkeypatch.setattr(training, "_device", lambda: "NVIDIA A100-SXM4-40GB")
    classic, ours = training.utilisation(corpora)["mfu"].values()
    assert 0 < ours < classic < 1, "at the same pace the longer context is more work"


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H200", 989e12), ("Tesla T4", 65e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
     ("NVIDIA H100 PCIe", 756e12), ("Tesla V100-SXM2-16GB", 125e12), ("cpu, 2 cores", 0), ("NVIDIA Foo L400", 0)],
)  # fmt: skip
def test_peaks_are_found_by_name(training, device, peak):
    assert training.flops.peak_of(device) == peak


@pytest.mark.slow
def test_the_benchmark_of_copies_ends_with_its_figures(toy_model, tmp_path):
    command = [sys.executable, "benchmarks/copies.py", "--smoke", "--model", str(toy_model), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {*result} == {"folder", "hub", "mb", "step_cpu_s", "eval_every", "load", "cores"}
    for store in ("folder", "hub"):
        assert {*result[store]} == {"overhead", "held_s", "cpu_s", "bound"}
        assert min(result[store][name] for name in ("held_s", "cpu_s", "bound")) > 0
    toy = sum(path.stat().st_size for path in toy_model.glob("*.safetensors")) / 1e6
    assert result["mb"] > 2 * toy, "a checkpoint with its optimizer, not the model"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_inference_runs_all_sides_and_ends_with_one_json_object(toy_model, tmp_path):
    command = [sys.executable, "benchmarks/inference.py", "--smoke", "--model", str(toy_model)]
    environ = {**os.environ, "LAB_CACHE": str(tmp_path)}  # where the exported weights land
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whisper.cpp is left out" in done.stdout, "not installed, or it cannot read the toy's vocabulary"
    result = json.loads(done.stdout.splitlines()[-1])
    ratios = {"speedup_vs_faster_whisper", "speedup_vs_transformers", "longform_speedup", "memory_ratio"}
    assert all(result[name] > 0 for name in ratios)
    assert set(result["sides"]) == set(PEERS) and set(result["wer"]) == set(PEERS) - {"faster-whisper-batched"}
    for name, side in result["sides"].items():
        assert side["arguments"]["recordings"] is not None and side["0.5"]["wer"] > 0
        if name != "ours":
            difference = result["sides"]["ours"]["0.5"]["wer"] - side["0.5"]["wer"]
            assert side["0.5"]["minus"]["delta"] == pytest.approx(difference, abs=2e-4)


def test_peers_have_no_arguments_but_what_their_names_say():
    request = sides.Request(None, threads=2)
    arguments = {name: side.arguments(request) for name, side in sides.SIDES.items()}
    swedish = {"generate_kwargs": {"language": "sv", "task": "transcribe"}}
    assert arguments["faster-whisper"]["clips"] == arguments["faster-whisper"]["recordings"] == {"language": "sv"}
    assert arguments["faster-whisper-greedy"]["clips"] == {"language": "sv", "beam_size": 1}
    assert arguments["faster-whisper-batched"]["clips"] is None
    assert arguments["transformers"]["clips"] == swedish
    assert arguments["transformers"]["recordings"] == {**swedish, "chunk_length_s": 30}
    assert arguments["transformers-timestamps"]["recordings"] == {**swedish, "return_timestamps": True}
    assert arguments["whisper.cpp"]["clips"] == {"language": "sv"}


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("Ett två. Tre fyra!", [0, 0]),
        ("ett två och tre fyra", [1, 0]),  # an insertion belongs to the word before it
        ("nu ett två tre fyra", [1, 0]),
        ("ett två fyra", [0, 1]),
        ("ett tu tre fyra fem", [1, 1]),
        ("", [2, 2]),
    ],
)
def test_edits_belong_to_the_clip_of_their_word(transcript, expected):
    edits = recordings.aligned_edits(["Ett två.", "Tre fyra."], transcript)
    assert edits.word_edits.tolist() == expected and edits.words.tolist() == [2, 2]


@pytest.mark.slow
def test_the_benchmark_of_non_speech_ends_with_its_figures(toy_model):
    pytest.importorskip("silero_vad")
    command = [
        sys.executable,
        "benchmarks/non_speech.py",
        "--smoke",
        "--model",
        str(toy_model),
        "--engine",
        "transformers",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["sounds"], result["words"]) == (5, 2)
    assert result["with_silero"] == {
        "invented_words": 0, "sounds_with_words": 0, "words_kept": 2, "quiet_words_kept": 2
    }  # fmt: skip
    assert result["without_silero"].keys() == result["with_silero"].keys()


@pytest.mark.slow
def test_rare_names_are_scored_with_each_kind_of_help(toy_model):
    command = [sys.executable, "benchmarks/rare_names.py", "--smoke", "--model", str(toy_model)]
    done = subprocess.run([*command, "--engine", "transformers"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert tuple(result["help"]) == rare_names.HELP
    for kind, found in result["help"].items():
        assert 0 <= found["recall"]["value"] <= 1 and found["wer"]["value"] > 0
        assert ("minus_none" in found["control_wer"]) == (kind != "none")


def test_rare_names_are_in_no_sentence_of_the_tour():
    names = rare_names.PEOPLE + rare_names.PLACES
    assert len(names) == len(set(names)) == 50
    known = " ".join(hand_sentences()).lower()
    assert [name for name in names if name.lower() in known] == []


@pytest.mark.parametrize(
    ("transcript", "missed"), [("Ring Brånkvill nu.", 0), ("ring brånkvill", 0), ("Ring Brånkvills.", 1), ("", 1)]
)
def test_name_counts_only_as_it_is_spelled(transcript, missed):
    sentence = rare_names.Sentence(None, "Ring Brånkvill nu.", "f2-01", (), "Brånkvill")
    assert rare_names.missed_names([sentence], [transcript]).word_edits.tolist() == [missed]


@pytest.mark.slow
def test_gpu_benchmark_writes_its_page_and_continues(toy_model, tmp_path):
    docs = tmp_path / "page.md"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--model", str(toy_model), "--docs", str(docs)]
    command += ["--folder", str(tmp_path / "work")]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"cells": 5, "failed": 1}
    rows = [json.loads(line) for line in (tmp_path / "work" / "results.jsonl").read_text("utf-8").splitlines()]
    results = {row["cell"]: row for row in rows}
    assert len(rows) == len(results) == 5, "the second call runs no cell again"
    assert "needs an NVIDIA GPU" in results["memory tiny 4s ours LoRA, 8-bit base"]["failed"]
    assert results["resume tiny 4s ours"]["equal"] is True
    assert results["classic tiny 2s ours"]["samples_per_s"] > 0 and results["classic tiny 2s classic"]["peak_gb"] > 0
    text = docs.read_text("utf-8")
    assert text.count("| tiny |") == 5 and "failed: model.load_in_8bit needs an NVIDIA GPU" in text


def test_gpu_benchmark_keeps_failures_as_rows(tmp_path, monkeypatch):
    results = {"classic": {"samples_per_s": 2.5, "peak_gb": 1.0, "weights": "random"}}
    monkeypatch.setattr(gpu, "run_in_process", lambda cell, options: results.get(cell.side, {"failed": "a | b"}))
    arguments = ["--sizes", "tiny", "--only", "classic", "--folder", str(tmp_path), "--docs", str(tmp_path / "page.md")]
    gpu.measure_all(gpu._options(arguments))
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| tiny | random | 8 s | classic | 2.5 | 1.0 |  |  |" in page
    assert "| tiny |  | 8 s | ours | failed: a / b |  |  |  |" in page
    monkeypatch.setattr(gpu, "run_in_process", lambda cell, options: results["classic"])
    gpu.measure_all(gpu._options(arguments))
    assert "failed: a / b" in (tmp_path / "page.md").read_text("utf-8")
    gpu.measure_all(gpu._options([*arguments, "--again"]))
    assert "failed" not in (tmp_path / "page.md").read_text("utf-8")


def test_gpu_benchmark_ends_a_cell_that_takes_too_long(tmp_path):
    options = gpu._options(["--timeout-s", "0.05", "--folder", str(tmp_path)])
    assert gpu.run_in_process(gpu.cells(("tiny",))[0], options) == {"failed": "not finished after 0.05 s"}


def test_cells_have_different_names():
    names = [cell.name for cell in gpu.cells(gpu.SIZES)]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_the_alignment_benchmark_ends_with_its_figures(tiny_folder):
    command = [sys.executable, "benchmarks/alignment.py", "--smoke", "--model", str(tiny_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["minutes"] >= 1 and result["sentences"] > result["clips"] > 0
    assert result["recovered"] > 0.4 and 0 <= result["wrong"] < 0.3
    assert result["start_s"] < 0.2 and result["end_s"] < 0.3 and result["real_time"] > 0


def test_alignment_is_scored_by_what_is_spoken_in_each_clip():
    sentences = [
        alignment.Sentence(0.0, 2.0, "Hej.", "Hej."),
        alignment.Sentence(3.0, 5.0, "Hej då.", "Hej."),
        alignment.Sentence(6.0, 8.0, "Kom nu.", "Kom nu."),
    ]
    found = alignment.score(sentences, [(0.1, 2.2, "Hej."), (3.0, 5.0, "Hej.")])
    expected = {"clips": 2, "recovered": 0.5, "of_all": 0.333, "unusable": 0.333, "wrong": 0.5}
    assert found == expected | {"start_s": 0.1, "end_s": 0.2}
    assert alignment.score(sentences, []) == {
        "clips": 0,
        "recovered": 0.0,
        "of_all": 0.0,
        "unusable": 0.333,
        "wrong": 0.0,
        "start_s": None,
        "end_s": None,
    }


def test_pseudo_data_has_the_same_recordings_with_and_without_text(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_data, "VALIDATION", 2)
    monkeypatch.setattr(pseudo_data, "TEST", 2)
    monkeypatch.setattr(sys, "argv", ["", "--to", str(tmp_path), "--labelled", "3", "--unlabelled", "4"])
    pseudo_data.main()
    sounds = {folder.name: {path.read_bytes() for path in folder.glob("*.wav")} for folder in tmp_path.iterdir()}
    assert sounds["unlabelled"] == sounds["true"] and len(sounds["true"]) == 4
    assert not sounds["labelled"] & sounds["true"]
    assert sorted(path.suffix for path in (tmp_path / "unlabelled").iterdir()) == [".wav"] * 4
    rows = (tmp_path / "labelled" / "transcripts.csv").read_text("utf-8").splitlines()
    assert [row.split(",")[-3] for row in rows[1:]] == ["train"] * 3 + ["validation"] * 2 + ["test"] * 2


@pytest.mark.slow
def test_aligned_data_has_the_same_clips_with_what_is_spoken(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(aligned_data, "VALIDATION", 2)
    monkeypatch.setattr(aligned_data, "TEST", 2)
    monkeypatch.setattr(sys, "argv", ["", "--to", str(tmp_path), "--clips", "24", "--recordings", "2"])
    aligned_data.main()
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(path.name for path in (tmp_path / "recordings" / "train").iterdir()) == [
        "recording-1.flac", "recording-1.srt", "recording-2.flac", "recording-2.srt"
    ]  # fmt: skip
    rows = (tmp_path / "true" / "transcripts.csv").read_text("utf-8").splitlines()[1:]
    assert len(rows) == len([*(tmp_path / "true").glob("*.wav")]) == counts["clips"] - counts["without_speech"] > 8
    spoken = {one.text for one in TourSource(24, 2, 2).examples(("train",))}
    assert sum(row.split(",", 1)[1].rsplit(",", 3)[0].strip('"') in spoken for row in rows) > len(rows) / 2


def test_more_voices_say_nothing_that_the_tour_trains_on():
    used = {text.normalise(example.text) for example in TourSource().outline() if example.split != "test"}
    sentences = [text.normalise(example.text) for example in recordings.test_examples(40)]
    assert len(sentences) > 160
    assert not used & {*sentences}
    planted = PlantedSource(test=280, test_voices=40).outline()
    assert used & {text.normalise(example.text) for example in planted if example.split == "test"}
