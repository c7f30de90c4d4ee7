from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from log_recorder import record_log
from toy_whisper import END, FIRST_TIMESTAMP, START, SWEDISH

from pipelines.features.sources.synthetic import espeak
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.whisper import decoding, engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator
from pipelines.whisper.engines import search
from pipelines.whisper.export import onnx_graph
from pipelines.whisper.tokens import Spelling, prompt_ids

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")
ct2 = pytest.mark.skipif(not export.installed(), reason="ctranslate2 is not installed")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Exports of the toy land in a folder of the tests; the real weights stay where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "cache_folder", lambda: folder)
        folder = tmp_path_factory.mktemp("cache")
        yield folder


@pytest.fixture(scope="module")
def ref(toy_model):
    return dataclasses.replace(whisper_model.resolve(str(toy_model)), context="clip")


@pytest.fixture(scope="module")
def windows(toy_cache) -> np.ndarray:
    rows = toy_cache.split("test")
    return Collator(toy_cache)(rows[:6].tolist())["input_features"].numpy()


def opened(ref, engine, **kw):
    return engines.open_engine(ref, "sv", engine, **{"device": "cpu", "max_new_tokens": 16, **kw})


@pytest.fixture(scope="module")
def stock(ref):
    return opened(ref, "transformers")


@pytest.fixture(scope="module")
def exact(ref):
    return opened(ref, "ctranslate2", compute_type="float32")


# ---- the two engines say the same


@ct2
def test_float32_engines_agree_in_words_and_logprobs(stock, exact, windows):
    for a, b in zip(stock.decode(windows), exact.decode(windows), strict=True):
        assert a.text == b.text
        assert a.tokens == b.tokens
        assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
        assert [word for word, _ in a.words] == [word for word, _ in b.words] == a.text.split()
        assert [p for _, p in a.words] == pytest.approx([p for _, p in b.words], abs=2e-2)
    assert len({heard.text for heard in stock.decode(windows)}) > 2


@ct2
@pytest.mark.parametrize(
    "changes",
    [
        {"timestamps": True},
        {"beam_size": 4},
        {"beam_size": 4, "timestamps": True},
        {"beam_size": 3, "patience": 2.0, "length_penalty": 0.5},
        {"prompt": "Hon bor i Umeå."},
        {"suppress_tokens": tuple(range(0, 1_000, 3))},
        {"task": "translate"},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_same_options_give_same_text_in_every_engine(ref, stock, exact, windows, changes, monkeypatch):
    graphs = opened(ref, "onnx", compute_type="float32")
    options = dataclasses.replace(stock.options, max_new_tokens=10, **changes)
    first, *others = (
        [(h.text, h.tokens, h.end_s) for h in engine.decode(windows, options)] for engine in (stock, exact, graphs)
    )
    assert others[1] == first
    if changes.get("beam_size"):  # CTranslate2 gives up no text of a beam
        monkeypatch.setattr(search, "_MAX_BEHIND", math.inf)
        monkeypatch.setattr(search, "_SAME_TOKENS", 1_000)
        first = [(h.text, h.tokens, h.end_s) for h in stock.decode(windows, options)]
    assert others[0] == first
    plain = stock.decode(windows, dataclasses.replace(stock.options, max_new_tokens=10))
    assert [text for text, _, _ in first] != [h.text for h in plain]


def test_graphs_of_earlier_versions_get_a_window_for_each_text(ref, windows, monkeypatch):
    graphs = opened(ref, "onnx", compute_type="float32")
    options = dataclasses.replace(graphs.options, max_new_tokens=10, beam_size=4)
    expected = [hypothesis.text for hypothesis in graphs.decode(windows, options)]
    counts = []
    monkeypatch.setattr(graphs, "texts_share_windows", False)
    monkeypatch.setattr(type(graphs), "layout", lambda self, owners, n: own_layout(owners, n, counts))
    assert [hypothesis.text for hypothesis in graphs.decode(windows, options)] == expected
    assert max(counts) > len(windows)


def own_layout(owners, n_windows, counts):
    """Return the inputs with which today's graphs compute a window for each text, as those of earlier versions do."""
    counts.append(len(owners))
    assert owners.tolist() == list(range(n_windows))
    return {"window_rows": np.arange(len(owners))[:, None], "slots": np.arange(len(owners))}


def test_hotwords_are_written_more_often(ref, stock, windows):
    """The toy writes at random: a word that is likelier at each step appears."""
    graphs = opened(ref, "onnx", compute_type="float32")
    options = dataclasses.replace(stock.options, beam_size=4, hotwords=("Umeå", "Karin"), max_new_tokens=10)
    assert [h.text for h in stock.decode(windows, options)] == [h.text for h in graphs.decode(windows, options)]
    assert [h.text for h in stock.decode(windows, options)] != [h.text for h in stock.decode(windows)]


@ct2
def test_ctranslate2_refuses_hotwords_in_one_line(exact, windows):
    with pytest.raises(LabError, match="cannot make hotwords more probable: take --engine onnx"):
        exact.decode(windows, dataclasses.replace(exact.options, hotwords=("Umeå",)))


def test_engines_detect_the_same_language(ref, stock, windows):
    graphs = opened(ref, "onnx", compute_type="float32")
    assert {graphs.detect_language(window) for window in windows} == {stock.detect_language(w) for w in windows}
    probabilities = stock.language_probabilities(windows[0])
    assert sum(probabilities.values()) == pytest.approx(1)
    assert max(probabilities, key=probabilities.get) == stock.detect_language(windows[0])


@ct2
def test_ctranslate2_detects_no_language_of_an_unusual_vocabulary(exact, windows):
    with pytest.raises(LabError, match="one of a single language: name it instead of auto"):
        exact.detect_language(windows[0])


@ct2
def test_real_weights_agree_in_float32_and_nearly_in_int8(tiny_folder, toy_cache):
    import ctranslate2

    tiny = whisper_model.resolve(str(tiny_folder))
    features = Collator(toy_cache, full_context=True)(toy_cache.split("test")[:2].tolist())["input_features"]
    stock, exact, quick = (
        opened(tiny, name, compute_type=kind, max_new_tokens=30)
        for name, kind in (("transformers", ""), ("ctranslate2", "float32"), ("ctranslate2", "int8"))
    )
    mine, theirs = stock.decode(features.numpy()), exact.decode(features.numpy())
    assert [heard.text for heard in mine] == [heard.text for heard in theirs]
    assert all(len(heard.words) > 2 for heard in mine)
    assert [heard.logprob for heard in mine] == pytest.approx([heard.logprob for heard in theirs], abs=2e-3)
    with torch.inference_mode():
        wanted = stock.model.model.encoder(features)[0]
    encoded = torch.from_numpy(np.array(quick.model.encode(ctranslate2.StorageView.from_array(features.numpy()), True)))
    assert torch.cosine_similarity(wanted.flatten(), encoded.flatten(), dim=0) > 0.97


@ct2
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_engines_stop_at_max_new_tokens(ref, windows, n):
    counts = {
        name: [h.tokens for h in opened(ref, name, max_new_tokens=n).decode(windows)] for name in engines.ENGINES[1:]
    }
    assert max(counts["transformers"]) == max(counts["ctranslate2"]) == n


@ct2
def test_engines_agree_in_no_speech_probability(stock, exact, windows):
    found = [[hypothesis.no_speech for hypothesis in engine.decode(windows)] for engine in (stock, exact)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert min(found[0]) > 0


def sampled(engine, windows, seed):
    return [h.text for h in engine.decode(windows, dataclasses.replace(engine.options, seed=seed), temperature=1.0)]


@pytest.mark.parametrize("name", ["transformers", pytest.param("ctranslate2", marks=ct2)])
def test_temperature_samples_and_the_seed_repeats(ref, windows, name):
    engine = opened(ref, name)
    cold = [heard.text for heard in engine.decode(windows)]
    warm = sampled(engine, windows, 1)
    assert warm != cold
    assert cold == [heard.text for heard in engine.decode(windows)]
    if name == "transformers":
        assert warm == sampled(engine, windows, 1)
        assert warm != sampled(engine, windows, 2)


def test_samples_follow_the_models_probabilities(stock, windows):
    """At temperature 1 the first token of many draws is spread as the model spreads it."""

    model, processor = stock.model, stock.processor
    one = torch.from_numpy(np.repeat(windows[:1], 400, axis=0))
    scores = []
    decoding.generate(model, one[:1], prompt_ids(processor, "sv"), 1, lambda tokens, s: scores.append(s) or s)
    wanted = torch.softmax(scores[0][0].float(), -1)
    options = dataclasses.replace(stock.options, max_new_tokens=1, seed=3)
    told = stock.decode(one.numpy(), options, temperature=1.0)
    mean, spread = float((wanted * wanted.clamp(min=1e-30).log()).sum()), 0.0
    spread = math.sqrt(float((wanted * (wanted.clamp(min=1e-30).log() - mean) ** 2).sum()) / 400)
    assert np.mean([heard.logprob for heard in told]) == pytest.approx(mean, abs=4 * spread + 1e-3)


def test_words_keep_letters_of_several_tokens(stock):
    tokenizer = stock.processor.tokenizer
    spelling = Spelling(tokenizer.backend_tokenizer)
    text = "Åke äter ö-bär, 1 234 kr – visst? 🙂 naïve"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = spelling.words([START, *ids, END], [-5.0, *[-0.5] * len(ids), -5.0])
    assert [word for word, _ in words] == text.split()
    assert sum(logprob for _, logprob in words) == pytest.approx(-0.5 * len(ids))
    assert spelling.text([START, SWEDISH, *ids, END, FIRST_TIMESTAMP]) == text
    assert spelling.words([], []) == ()
    assert spelling.prompt("sv") == prompt_ids(stock.processor, "sv")


# ---- which engine


def test_language_that_a_model_lacks_fails_before_it_loads(ref, monkeypatch):
    monkeypatch.setattr(engines, "_OPEN", {})
    for engine in engines.ENGINES:
        with pytest.raises(LabError, match=r"has no <\|yue\|>: language 'yue' is not one"):  # that of large-v3
            engines.open_engine(ref, "yue", engine)


def test_unknown_engine_or_compute_type_is_one_line(ref):
    for asked, said in (
        ({"engine": "whisper.cpp"}, "engine must be one of"),
        ({"engine": "transformers", "compute_type": "int8"}, "ctranslate2"),
        ({"engine": "ctranslate2", "compute_type": "int3"}, "compute type must be one of"),
        ({"engine": "ctranslate2", "device": "mps"}, "transformers"),
        ({"engine": "onnx", "compute_type": "float16"}, "int8 or float32, got float16"),
    ):
        with pytest.raises(LabError) as caught:
            opened(ref, **asked)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "seven_bits", "asked", "taken"),
    [
        ({"onnx-int8", "ctranslate2-int8"}, False, "", "onnxruntime cpu int8"),
        ({"onnx-int8", "ctranslate2-int8"}, False, "float32", "ctranslate2 cpu float32"),
        ({"onnx-int8", "ctranslate2-int8"}, True, "", "ctranslate2 cpu int8"),
        ({"ctranslate2-int8"}, False, "", "ctranslate2 cpu int8"),
        (set(), False, "", "transformers cpu float32"),
    ],
)
@ct2
def test_auto_takes_the_fastest_engine_on_a_cpu(ref, monkeypatch, installed, seven_bits, asked, taken):
    real = onnx_graph.needs_seven_bits()
    monkeypatch.setattr(export, "installed", lambda form="ctranslate2-int8": form in installed)
    monkeypatch.setattr(onnx_graph, "needs_seven_bits", lambda: seven_bits)
    if taken.startswith("onnx") and real:
        pytest.skip("this processor has no VNNI")
    assert opened(ref, "auto", compute_type=asked).name.startswith(taken)


@ct2
def test_auto_falls_back_to_the_next_engine(ref, monkeypatch):
    def fails(*told, **more):
        raise LabError("torch 9 does not export this model to ONNX")

    monkeypatch.setattr(onnx_graph, "needs_seven_bits", lambda: False)
    real = export.convert
    monkeypatch.setattr(export, "convert", lambda *told, **more: (fails if "onnx" in told[1] else real)(*told, **more))
    lines = record_log()
    told = {"device": "cpu", "max_new_tokens": 4}
    assert engines.open_engine(ref, "sv", **told).name.startswith("ctranslate2")
    assert lines[0] == "torch 9 does not export this model to ONNX; trying the next engine"
    with pytest.raises(LabError, match="does not export"):
        engines.open_engine(ref, "sv", "onnx", **told)


def test_auto_skips_onnx_for_large_models(ref, monkeypatch):
    monkeypatch.setattr(onnx_graph, "needs_seven_bits", lambda: False)
    assert "onnx" in engines._faster_engines(ref, "cpu", "")
    monkeypatch.setattr(engines, "_MAX_ONNX_WEIGHTS_BYTES", 1000)
    assert "onnx" not in engines._faster_engines(ref, "cpu", "")


def test_onnx_accepts_only_a_cpu(ref, monkeypatch):
    monkeypatch.setattr(engines, "_detect_device", lambda engine: pytest.fail("a device was looked for"))
    assert opened(ref, "onnx", device="").name == "onnxruntime cpu int8"
    with pytest.raises(LabError, match="on a CPU, not on cuda"):
        opened(ref, "onnx", device="cuda")


def test_onnx_uses_the_cores_of_this_process(ref, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: seen.append(a[1].intra_op_num_threads) or real(*a, **k)
    )
    monkeypatch.setattr("pipelines.infra.parallel.process_pool.cores", lambda: 1)
    opened(ref, "onnx", threads=0)
    opened(ref, "onnx", threads=2)
    assert seen == [1, 1, 2, 2]


def test_missing_ctranslate2_names_the_install_command(ref, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(LabError, match=r"pip install 'ctranslate2"):
        opened(ref, "ctranslate2")


# ---- exports


@ct2
def test_export_is_converted_once_and_sealed(ref, own_cache):
    said = record_log()
    first = export.export(ref, "int8")
    again = export.export(ref, "int8")
    assert first == again
    assert len(said) <= 1
    assert manifest.problem(first) is None
    told = manifest.read(first)
    assert told["kind"] == "ctranslate2"
    assert {"model.bin", "config.json", "tokenizer.json", "preprocessor_config.json"} <= told["files"].keys()
    assert not list(first.parent.glob(".export-*"))
    assert export.export(ref, "float32") != first


@ct2
@pytest.mark.parametrize("damage", [lambda content: b"half", lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_damaged_export_is_converted_again(ref, damage):
    folder = export.export(ref, "int8")
    (folder / "model.bin").write_bytes(damage((folder / "model.bin").read_bytes()))
    assert export.export(ref, "int8") == folder
    assert manifest.problem(folder) is None


@ct2
def test_export_to_a_full_disk_is_one_line(ref, tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("write failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(export.__dict__, "_complete_config", full)
    with pytest.raises(LabError, match="the disk is full, so .* is not exported to .*: free some space"):
        export.export(ref, "int8", to=tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


@ct2
def test_export_to_a_folder_overwrites_nothing_else(ref, tmp_path):
    assert export.export(ref, "int8", to=tmp_path / "mine") == tmp_path / "mine"
    assert export.export(ref, "int8", to=tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(LabError, match="empty"):
        export.export(ref, "int8", to=tmp_path / "theirs")
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "mine"


@ct2
def test_unconvertible_model_is_one_line(ref, tmp_path):
    broken = dataclasses.replace(ref, folder=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LabError) as caught:
        export.export(broken, "int8")
    assert "\n" not in str(caught.value)


def _export(folder: str, to: str) -> None:
    export.export(whisper_model.resolve(folder), "int8", to=to)


@pytest.mark.slow
@ct2
def test_concurrent_exports_leave_one_whole_folder(toy_model, tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_export, args=(str(toy_model), str(tmp_path / "one"))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert manifest.problem(tmp_path / "one") is None
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.slow
@ct2
def test_ctranslate2_imports_no_torch(ref, tmp_path, own_cache, encoded, speech):
    """They take a second to import, and 400 MB."""
    export.export(ref, "int8")
    (tmp_path / "clip.wav").write_bytes(encoded(speech(70 * 16_000)))
    code = f"""
import sys
from pipelines.infra import environment
environment.cache_folder = lambda: __import__("pathlib").Path({str(own_cache)!r})
from pipelines.inference.transcriber import Transcriber
from pipelines.whisper import model
ref = model.resolve({str(ref.folder)!r})
heard = Transcriber(ref, engine="ctranslate2", max_new_tokens=4).transcribe({str(tmp_path / "clip.wav")!r})
assert heard.audio_s == 70
print(*sorted({{"torch", "transformers", "pandas", "pyarrow"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


# ---- when words begin


@ct2
@pytest.mark.parametrize("context", ["full", "clip"])
def test_word_starts_match_the_recording(tiny_folder, context):
    """Sentences with pauses between them, on untuned weights, at 30 s and at the length of the recording."""
    real = dataclasses.replace(whisper_model.resolve(str(tiny_folder)), context=context)
    engine = opened(real, "ctranslate2", compute_type="float32")
    said = ["Vi ska åka till Stockholm på måndag.", "Det regnar i dag.", "Hon köper bröd och ost på torget."]
    pause, parts, begins = np.zeros(9_600, np.float32), [], []
    for sentence, voice in zip(said, ("sv+m3", "sv+f4", "sv+m7"), strict=True):
        begins.append(sum(map(len, parts)) / 16_000)
        parts += [audio.decode(espeak.synthesise(sentence, voice, 140, 50)).samples, pause]
    log_mel = engine.log_mel(audio.Waveform(np.concatenate(parts)))
    frames = len(log_mel.frames)
    window = log_mel.padded(3_000 if context == "full" else frames + frames % 2)
    starts, nothing = engine.word_starts(np.stack([window] * 2), [frames] * 2, [" ".join(said), ""])
    firsts = np.cumsum([0, *(len(sentence.split()) for sentence in said[:-1])])
    assert len(starts) == sum(len(sentence.split()) for sentence in said)
    assert starts == sorted(starts)
    assert [starts[first] for first in firsts] == pytest.approx(begins, abs=0.35)
    assert nothing == []


@ct2
def test_transformers_aligns_words_as_ctranslate2_does(tiny_folder):
    real = dataclasses.replace(whisper_model.resolve(str(tiny_folder)), context="clip")
    text = "Vi ska åka till Stockholm på måndag."
    engines_ = opened(real, "transformers"), opened(real, "ctranslate2", compute_type="float32")
    log_mel = engines_[0].log_mel(audio.decode(espeak.synthesise(text, "sv+m3", 140, 50)))
    frames = len(log_mel.frames)
    window = log_mel.padded(frames + frames % 2)[np.newaxis]
    (ours,), (theirs,) = (engine.word_starts(window, [frames], [text]) for engine in engines_)
    assert ours == pytest.approx(theirs, abs=0.05)
    assert len(ours) == len(text.split())


@ct2
def test_missing_alignment_heads_are_removed(ref, exact, windows):
    """Asked for one, CTranslate2 does not raise: it ends the process."""
    config = json.loads((ref.folder / "config.json").read_text("utf-8"))
    heads = json.loads((export.export(ref, "float32") / "config.json").read_text("utf-8"))["alignment_heads"]
    assert all(layer < config["decoder_layers"] and head < config["decoder_attention_heads"] for layer, head in heads)
    (starts,) = exact.word_starts(windows[:1], [windows.shape[-1]], ["hej på dig"])
    assert len(starts) == (3 if heads else 0)
