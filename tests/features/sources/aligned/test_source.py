"""Long recordings aligned with their texts by an engine whose hypotheses are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from pipelines.features.identity import cache_identity
from pipelines.features.sources import NoAudio
from pipelines.features.sources.aligned import adaptation, aligner, hypotheses, matching, source
from pipelines.features.sources.aligned.hypotheses import DecodedWindow
from pipelines.features.sources.aligned.source import AlignedSource
from pipelines.features.sources.aligned.texts import Line
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.pieces import PieceReader
from pipelines.whisper import model as whisper_model
from pipelines.whisper.engines.forced import ForcedLine
from pipelines.whisper.model import ModelRef

SENTENCES = [
    "Sjön är full av näckrosor.",
    "Rasten slutar när klockan ringer.",
    "Refrängen sitter som klister.",
    "Är biblioteket öppet på fredagar?",
    "Kalven diar sin mor i hagen.",
    "Tyvärr är inte restaurangen öppen.",
]
EVERY_S, SPOKEN_S = 3.0, 2.0
PARAPHRASED = 2


class FakeEngine:
    """Writes every sentence of the recording right; `force` finds that the paraphrased one is not said."""

    can_align = True

    def __init__(self):
        self.n_decoded = 0

    def log_mel(self, waveform):
        n = len(waveform.samples)
        return SimpleNamespace(frames=range(n // 160), padded=lambda frames: np.full((1, frames), n, np.float32))

    def decode(self, windows):
        self.n_decoded += len(windows)
        return [SimpleNamespace(text=" ".join(SENTENCES)) for _ in windows]

    def language_probabilities(self, window):
        return {"sv": 1.0}

    def word_starts(self, windows, frames, texts):
        return [
            [
                EVERY_S * i + SPOKEN_S * n / len(one.split())
                for i, one in enumerate(SENTENCES)
                for n in range(len(one.split()))
            ]
            for _ in texts
        ]


def force(engine, log_mel, lines):
    scores = []
    for line in lines:
        n = next((n for n, one in enumerate(SENTENCES) if one == line), PARAPHRASED)
        scores.append(ForcedLine(EVERY_S * n + 0.2, *((-0.5, -1.0) if line in SENTENCES else (-3.0, -20.0))))
    return scores


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(aligner, "folder", lambda: tmp_path / "cache/aligned")
    monkeypatch.setattr(aligner, "open_aligner", lambda ref, language: fake)
    monkeypatch.setattr(whisper_model, "resolve", lambda uri: ModelRef(uri, Path(uri), "folder", "1"))
    monkeypatch.setattr(whisper_model, "identity", lambda ref: {"weights_sha256": ref.name})
    monkeypatch.setattr("pipelines.whisper.engines.forced.force", force)
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    return fake


@pytest.fixture
def folder(tmp_path):
    """One recording of six sentences, with subtitles 2 s late, of which one is a paraphrase."""
    path = tmp_path / "talks"
    path.mkdir()
    sounds = np.random.default_rng(0).uniform(-0.5, 0.5, (len(SENTENCES), int(EVERY_S * 16_000)))
    sounds[:, int(SPOKEN_S * 16_000) :] = 0
    soundfile.write(path / "talk.wav", sounds.ravel(), 16_000)
    cues = []
    for n, text in enumerate(SENTENCES):
        start_s = 2 + EVERY_S * n
        text = "Låten är svår att glömma." if n == PARAPHRASED else text
        cues.append(f"00:00:{start_s:06.3f} --> 00:00:{start_s + SPOKEN_S:06.3f}\n{text}\n")
    (path / "talk.vtt").write_text("WEBVTT\n\n" + "\n".join(cues), "utf-8")
    return path


def test_shifted_subtitles_become_clips_at_pauses(engine, folder):
    examples = list(AlignedSource(str(folder)).examples())
    clips = [one for one in examples if not isinstance(one.audio, NoAudio)]
    rejected = [one.audio.reason for one in examples if isinstance(one.audio, NoAudio)]
    assert [one.text for one in clips] == [text for n, text in enumerate(SENTENCES) if n != PARAPHRASED]
    assert rejected == ["paraphrased"]
    for n, clip in zip((0, 1, 3, 4, 5), clips, strict=True):
        assert abs(clip.excerpt.start_s - EVERY_S * n) <= 0.2
        assert abs(clip.excerpt.end_s - EVERY_S * n - SPOKEN_S) <= 0.2
    assert all(float(clip.meta["score"]) < 0 for clip in clips)


def test_recording_without_any_clip_gives_its_rejections(engine, folder):
    (folder / "talk.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nHej\n", "utf-8")
    examples = list(AlignedSource(str(folder)).examples())
    assert examples and all(one.split == "train" and isinstance(one.audio, NoAudio) for one in examples)


def test_malformed_text_is_said_before_anything_is_decoded(engine, folder):
    (folder / "walk.wav").write_bytes((folder / "talk.wav").read_bytes())
    (folder / "walk.srt").write_text("1\n1 --> 2\nHej\n", "utf-8")
    with pytest.raises(LabError, match=r"walk\.srt:2: a cue's times"):
        list(AlignedSource(str(folder)).examples())
    assert engine.n_decoded == 0


def test_stored_windows_are_not_decoded_again(engine, folder, tmp_path):
    first = list(AlignedSource(str(folder)).examples())
    n_decoded = engine.n_decoded
    for path in (tmp_path / "cache/aligned").glob("*.json"):
        path.unlink()  # as if the run was killed before the passages were written
    (journal,) = (tmp_path / "cache/aligned").glob("*.jsonl")
    rows = journal.read_text("utf-8").splitlines()
    journal.write_text("\n".join(rows[:-1]) + '\n{"end": {"dur', "utf-8")
    again = list(AlignedSource(str(folder)).examples())
    assert n_decoded > 0
    assert engine.n_decoded == n_decoded
    assert [one.id for one in again] == [one.id for one in first]
    assert json.loads(journal.read_text("utf-8").splitlines()[-1])["end"]["duration_s"] == 18.0


@pytest.mark.parametrize(("module", "decodes_again"), [(aligner, False), (hypotheses, True)])
def test_code_version_computes_again_only_what_changes(engine, folder, monkeypatch, module, decodes_again):
    plain = AlignedSource(str(folder))
    assert list(plain.examples())
    identity, n_decoded, judged = plain.identity(), engine.n_decoded, []
    monkeypatch.setattr("pipelines.whisper.engines.forced.force", lambda *args: judged.append(1) or force(*args))
    monkeypatch.setattr(module, "CODE_VERSION", "next")
    changed = AlignedSource(str(folder))
    assert list(changed.examples())
    assert changed.identity() != identity
    assert judged, "the passages are found again"
    assert (engine.n_decoded > n_decoded) == decodes_again


def test_identity_names_audio_text_model_and_settings(engine, folder):
    plain = AlignedSource(str(folder)).identity()
    assert plain == AlignedSource(str(folder)).identity()
    assert AlignedSource(str(folder), aligner="other").identity() != plain
    assert AlignedSource(str(folder), min_logprob=-5.0).identity() != plain
    (folder / "talk.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nHej\n", "utf-8")
    assert AlignedSource(str(folder)).identity() != plain
    assert engine.n_decoded == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "a text of the same name"), (("talk.srt", "talk.sv.vtt"), "must have one text")],
)
def test_folder_without_pairs_is_refused(tmp_path, names, message):
    for name in ("talk.wav", *names):
        (tmp_path / name).write_text("")
    with pytest.raises(LabError, match=message):
        source.find_pairs(tmp_path)


@pytest.mark.parametrize(("shift_s", "drift"), [(2.0, 1.0), (-40.0, 1.01), (0.0, 25 / 24)])
def test_shift_and_drift_of_subtitles_are_fitted(shift_s, drift):
    texts = [f"{a} {b} på {c}" for a in SENTENCES[:5] for b in SENTENCES[:4] for c in ("torget", "landet")]
    lines, windows = [], []
    for n, text in enumerate(texts):
        words, real_s = text.split(), 10.0 * n + 50
        starts_s = [real_s + 0.5 * i for i in range(len(words))]
        windows.append(DecodedWindow(real_s, real_s + 8, [[real_s, real_s + 8]], words, starts_s))
        lines.append(Line(text, (real_s + shift_s) / drift, (real_s + 0.5 * len(words) + shift_s) / drift))
    predicted = matching.predict(lines, windows)
    assert predicted.is_exact.all()
    assert np.abs(predicted.times_s[:, 0] - [window.start_s for window in windows]).max() < 0.7


def test_manuscript_lines_that_are_not_read_have_no_time():
    windows = [
        DecodedWindow(10.0 * n, 10.0 * n + 8, [], text.split(), [10.0 * n + i for i in range(len(text.split()))])
        for n, text in enumerate(SENTENCES)
    ]
    skipped = [Line("Ett helt annat kapitel med ord som ingen har uttalat här.")] * 20
    predicted = matching.predict([*skipped, *(Line(text) for text in SENTENCES)], windows)
    assert not predicted.is_exact.any()
    assert np.isnan(predicted.times_s[0]).all()
    assert np.abs(predicted.times_s[20:, 0] - 10.0 * np.arange(6)).max() < 3


def test_pieces_equal_the_decoded_recording(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 100 * 16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    reader = PieceReader(tmp_path / "a.wav")
    for start_s, end_s in ((1.0, 2.5), (29.0, 31.0), (95.5, 100.0), (2.0, 3.0)):
        expected = samples[int(start_s * 16_000) : int(end_s * 16_000)]
        np.testing.assert_array_equal(reader.read(start_s, end_s), expected)


def test_window_without_alignment_spreads_its_words(tmp_path, folder, engine):
    engine.word_starts = lambda windows, frames, texts: [[] for _ in texts]
    recording = hypotheses.decode(folder / "talk.wav", tmp_path / "a.jsonl", lambda: engine)
    assert len(recording.windows[0].starts_s) == len(recording.windows[0].words)


def test_texts_belong_to_the_recording_of_their_name(tmp_path):
    for name in ("intro.wav", "intro.02.wav", "intro.sv.srt", "intro.02.srt", "intro.draft.txt"):
        (tmp_path / name).write_bytes(b"x")
    pairs = {audio.name: text.name for audio, text in source.find_pairs(tmp_path)}
    assert pairs == {"intro.wav": "intro.sv.srt", "intro.02.wav": "intro.02.srt"}


@pytest.mark.parametrize("link", ["talk.wav", "talk.srt", "more"])
def test_link_out_of_the_folder_is_refused(tmp_path, link):
    outside, folder = tmp_path / "outside", tmp_path / "talks"
    outside.mkdir()
    folder.mkdir()
    for name in ("talk.wav", "talk.srt"):
        (outside / name).write_bytes(b"x")
        if name != link:
            (folder / name).write_bytes(b"x")
    (folder / link).symlink_to(outside / link if link != "more" else outside)
    with pytest.raises(LabError, match="link") as caught:
        source.find_pairs(folder)
    assert link in str(caught.value) and "\n" not in str(caught.value)


def test_link_within_the_folder_is_followed(tmp_path):
    (tmp_path / "talk.wav").write_bytes(b"x")
    (tmp_path / "text.srt").write_bytes(b"x")
    (tmp_path / "talk.srt").symlink_to(tmp_path / "text.srt")
    assert [text.name for _, text in source.find_pairs(tmp_path)] == ["talk.srt"]


@pytest.mark.parametrize(("deviation_s", "is_exact"), [(0.0, True), (1.0, False)])
def test_times_that_vary_are_not_exact(deviation_s, is_exact):
    deviations_s = np.random.default_rng(0).uniform(-deviation_s, deviation_s, 20)
    lines, windows = [], []
    for n, deviation in enumerate(deviations_s.tolist()):
        words, real_s = [f"{word}{'abcdefghijklmnopqrst'[n]}" for word in SENTENCES[n % 5].split()], 10.0 * n + 50
        starts_s = [real_s + 0.5 * i for i in range(len(words))]
        windows.append(DecodedWindow(real_s, real_s + 8, [[real_s, real_s + 8]], words, starts_s))
        lines.append(Line(" ".join(words), real_s + deviation, real_s + 0.5 * len(words) + deviation))
    assert (matching.predict(lines, windows).is_exact == is_exact).all()


def test_untuned_aligner_is_adapted_and_only_judges(engine, folder, tmp_path, monkeypatch):
    adapted, judges = ModelRef("adapted", tmp_path, "folder", "1"), []
    candidates = []

    def adapt(ref, language, passages, steps, folder):
        candidates.extend(passage.text for _, passage in passages)
        return adapted

    def judge(ref, language):
        judges.append(ref.name)
        return engine

    monkeypatch.setattr(adaptation, "adapt", adapt)
    monkeypatch.setattr(aligner, "open_aligner", judge)
    source = AlignedSource(str(folder))
    clips = [one for one in source.examples() if not isinstance(one.audio, NoAudio)]
    assert len(candidates) == len(SENTENCES), "also the lines that the untuned model refuses"
    assert len(clips) == len(SENTENCES) - 1
    n_before = judges.index("adapted")
    assert "adapted" not in judges[:n_before] and {*judges[n_before:]} == {"adapted"}
    assert engine.n_decoded == 1


@pytest.mark.parametrize(
    ("context", "heard", "reason"),
    [("full", ("en", 0.75), "wrong_language"), ("full", ("en", 0.65), "no_match"), ("full", ("sv", 0.9), "no_match"),
     ("clip", ("en", 0.75), "no_match")],
)  # fmt: skip
def test_untuned_aligner_names_foreign_speech(engine, folder, monkeypatch, context, heard, reason):
    ref = ModelRef("model", Path("model"), "folder", "1", context=context)
    monkeypatch.setattr(whisper_model, "resolve", lambda uri: ref)
    n_asked = []

    def language_probabilities(window):
        n_asked.append(window.shape)
        return {"de": 0.1, heard[0]: heard[1]}

    engine.language_probabilities = language_probabilities
    monkeypatch.setattr("pipelines.features.sources.aligned.passages.places.grouped", lambda placed, windows: [])
    for _ in range(2):
        found = {one.audio.reason for one in AlignedSource(str(folder), adapt_steps=0).examples() if one.text in
                 ("no_match", "wrong_language")}  # fmt: skip
        assert found == {reason}
    assert len(n_asked) == (context == "full"), "once, and not for a tuned aligner; the passages are stored"


def test_tuned_aligner_is_not_adapted(engine, folder, monkeypatch):
    tuned = ModelRef("tuned", Path("tuned"), "folder", "1", context="clip")
    monkeypatch.setattr(whisper_model, "resolve", lambda uri: tuned)
    monkeypatch.setattr(adaptation, "adapt", lambda *args: pytest.fail("adapted"))
    source = AlignedSource(str(folder))
    assert list(source.examples())
    assert "adapt_steps" not in source.identity()


def test_identity_names_the_steps_of_adaptation(engine, folder):
    plain, none = AlignedSource(str(folder)).identity(), AlignedSource(str(folder), adapt_steps=0).identity()
    assert plain["adapt_steps"] == "40"
    assert AlignedSource(str(folder), adapt_steps=50).identity() != plain
    assert {"adapt_steps", "code.adaptation"} == plain.keys() - none.keys()


def test_cache_without_adaptation_is_found_whatever_its_steps(toy_settings, toy_model, tmp_path):
    source = {"source.kind": "aligned", "source.path": str(tmp_path)}
    plain, none = toy_settings(source), toy_settings(source | {"source.adapt_steps": 0})
    processor = whisper_model.load_processor(whisper_model.resolve(str(toy_model)), "sv")
    without, adapted = {"kind": "aligned"}, {"kind": "aligned", "adapt_steps": "40"}
    assert cache_identity(none, without, processor) == cache_identity(plain, without, processor)
    assert cache_identity(none, adapted, processor) != cache_identity(plain, adapted, processor)


@pytest.mark.slow
def test_several_processes_find_the_same_passages(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "talks"
    folder.mkdir()
    sentences = list(TourSource().examples(("validation",)))[:8]
    for name, part in (("a", sentences[:4]), ("b", sentences[4:])):
        sounds = [np.concatenate([audio.decode(one.audio).samples, np.zeros(8_000, np.float32)]) for one in part]
        soundfile.write(folder / f"{name}.wav", np.concatenate(sounds), 16_000)
        (folder / f"{name}.txt").write_text("\n".join(one.text for one in part), "utf-8")
    found = []
    for n in (1, 2):
        monkeypatch.setenv("LAB_CACHE", str(tmp_path / f"cache{n}"))
        source = AlignedSource(str(folder), str(tiny_folder), min_logprob=-15.0, processes=n)
        found.append([(one.id, one.text, one.meta, str(vars(one).get("audio"))) for one in source.examples()])
    assert found[0] == found[1]
    assert any(meta for _, _, meta, _ in found[0]), "no clip"
    assert len(list((tmp_path / "cache2/aligned").glob("*.jsonl"))) == 2
