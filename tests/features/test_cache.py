from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.features import build as features_build
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.build import BuildOptions, build, reusable_caches
from pipelines.features.cache import FeatureCache, StaleCache, is_finished, open_cache
from pipelines.features.clips import Clip, Rejected
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources import Example
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

IDENTITY = {
    "source.kind": "toy",
    "features.dtype": "float32",
    "features.n_mels": 8,
    "library.numpy": "2",
    "format": "x",
}
SPLITS = ("train", "train", "validation", "test")


def examples(n: int = 12) -> list[Example]:
    """Numbers 3 and 7 cannot be used."""
    return [
        Example(str(i), SPLITS[i % 4], f"mening å {i}", b"", f"speaker {i % 3}", {"accent": "skånska"} if i % 2 else {})
        for i in range(n)
    ]


def create_clip(example: Example) -> Clip:
    """Return a clip that depends only on the example's id."""
    if example.id in ("3", "7"):
        raise Rejected("silent", f'nothing to hear, in {example.id},\n"at all"')
    rng = np.random.default_rng(zlib.crc32(example.id.encode()))
    frames = rng.standard_normal((int(rng.integers(2, 40)), 8)).astype(np.float32)
    return Clip(
        example,
        example.text.upper(),
        [1, 2, int(example.id)],
        LogMel(frames, float(frames.max() - 2)),
        len(frames) / 100,
    )


def build_cache(
    folder: Path, create_clip=create_clip, rows=None, identity=IDENTITY, on_clips=lambda n: None, **options
) -> FeatureCache:
    rows = examples() if rows is None else rows
    return build(folder, rows, create_clip, identity, BuildOptions(**{"shard_clips": 4, **options}), on_clips=on_clips)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recording(ids: list[str], stop_at: str | None = None):
    """Return a create_clip that records ids in `ids` and is interrupted at `stop_at`."""

    def record(example: Example) -> Clip:
        if example.id == stop_at:
            raise KeyboardInterrupt
        ids.append(example.id)
        return create_clip(example)

    return record


def test_open_cache_returns_what_build_wrote(tmp_path):
    n_clips = []
    build_cache(tmp_path / "c", on_clips=n_clips.append)
    cache = open_cache(tmp_path / "c", IDENTITY)
    accepted = [e for e in examples() if e.id not in ("3", "7")]
    assert cache.rows["id"].tolist() == [e.id for e in accepted]
    assert n_clips == [4, 4, 4]
    for row, example in enumerate(accepted):
        clip, log_mel = create_clip(example), cache.log_mel(row)
        assert np.array_equal(log_mel.frames, clip.log_mel.frames)
        assert log_mel.pad_value == clip.log_mel.pad_value
        assert cache.labels(row) == clip.labels
        assert cache.rows.loc[row, ["split", "text", "speaker", "frames"]].tolist() == [
            example.split,
            clip.text,
            example.speaker,
            len(clip.log_mel.frames),
        ]
    assert cache.rows["accent"].fillna("").tolist() == [e.meta.get("accent", "") for e in accepted]
    assert cache.counts == {"train": 6, "validation": 3, "test": 1, "rejected": 2}
    assert cache.split("test").tolist() == [cache.rows.index[cache.rows["id"] == "11"][0]]
    assert not len(cache.split("dev"))
    assert (cache.n_mels, cache.identity, cache.padded_bytes) == (8, IDENTITY, 10 * FULL_FRAMES * 8 * 4)


def test_rejected_clips_are_rows_of_the_table(tmp_path):
    rejected = build_cache(tmp_path / "c").rejected
    assert rejected.to_dict("records") == [
        {"id": i, "split": "test", "reason": "silent", "detail": f'nothing to hear, in {i},\n"at all"'}
        for i in ("3", "7")
    ]


def test_formulas_in_rejected_csv_are_text_and_read_back(tmp_path):
    def refuse(example: Example) -> Clip:
        if example.id != "=2":
            return create_clip(example)
        raise Rejected("silent", "@SUM(1)")

    rows = [replace(example, id="=2" if example.id == "2" else example.id) for example in examples()]
    cache = build_cache(tmp_path / "c", refuse, rows)
    row = {"id": "=2", "split": rows[2].split, "reason": "silent", "detail": "@SUM(1)"}
    assert row in cache.rejected.to_dict("records")
    assert "'=2," in cache.rejected_path.read_text("utf-8")


@pytest.mark.parametrize(("shard_clips", "shards"), [(1, 12), (5, 3), (6, 2), (100, 1)])
def test_shard_size_does_not_change_rows(tmp_path, shard_clips, shards):
    cache, full = build_cache(tmp_path / "c", shard_clips=shard_clips), build_cache(tmp_path / "whole")
    assert len(list(cache.folder.glob("shard-*.bin"))) == shards
    assert cache.rows.drop(columns=["shard", "offset"]).equals(full.rows.drop(columns=["shard", "offset"]))
    assert all(np.array_equal(cache.log_mel(row).frames, full.log_mel(row).frames) for row in range(10))


def test_interrupted_build_resumes(tmp_path):
    ids, lines = [], record_log()
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", recording(ids, stop_at="9"))
    assert ids == [str(i) for i in range(9)]
    assert not is_finished(tmp_path / "c")
    assert not (tmp_path / "c" / manifest.MANIFEST).exists()
    with pytest.raises(LabError, match=r"unfinished.*again"):
        open_cache(tmp_path / "c")
    ids.clear()
    build_cache(tmp_path / "c", recording(ids))
    assert ids == ["8", "9", "10", "11"]
    assert "2 shard(s)" in lines[0]
    build_cache(tmp_path / "uninterrupted")
    assert contents(tmp_path / "c") == contents(tmp_path / "uninterrupted")


def build_until_number_6(folder: Path) -> None:
    """Wait at number 6, for a process that is to be killed there."""

    def wait(example: Example) -> Clip:
        if example.id == "6":
            (folder.parent / "here").touch()
            time.sleep(60)
        return create_clip(example)

    build_cache(folder, wait)


@pytest.mark.slow
def test_killed_build_resumes(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=build_until_number_6, args=(tmp_path / "c",))
    process.start()
    try:
        while not ((tmp_path / "here").exists() and (tmp_path / "c" / "shard-00000.parquet").exists()):
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(LabError, match="another process is building"):
            build_cache(tmp_path / "c")
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9
    with pytest.raises(LabError, match="unfinished"):
        open_cache(tmp_path / "c")
    ids = []
    build_cache(tmp_path / "c", recording(ids))
    assert ids == [str(i) for i in range(4, 12)]
    build_cache(tmp_path / "uninterrupted")
    assert contents(tmp_path / "c") == contents(tmp_path / "uninterrupted")


def test_concurrent_build_raises(tmp_path):
    def nested(example: Example) -> Clip:
        with pytest.raises(LabError, match="another process is building"):
            build_cache(tmp_path / "c")
        return create_clip(example)

    assert len(build_cache(tmp_path / "c", nested).rows) == 10
    assert len(build_cache(tmp_path / "c").rows) == 10  # and the lock is given back


@pytest.mark.parametrize("part", ["bin", "parquet"])
def test_damaged_shard_is_built_again(tmp_path, part):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", recording([], stop_at="9"))
    path = tmp_path / "c" / f"shard-00001.{part}"
    path.write_bytes(path.read_bytes()[:-1])
    ids = []
    build_cache(tmp_path / "c", recording(ids))
    assert ids == [str(i) for i in range(4, 12)]


def test_shard_of_changed_examples_is_built_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", recording([], stop_at="9"))
    rows = examples()
    rows[5] = Example("5", "train", "en annan mening", b"")
    ids = []
    build_cache(tmp_path / "c", recording(ids), rows)
    assert ids == [str(i) for i in range(4, 12)]


def test_unfinished_build_of_other_identity_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", recording([], stop_at="9"))
    ids = []
    cache = build_cache(tmp_path / "c", recording(ids), rows=examples(3), identity=IDENTITY | {"source.kind": "other"})
    assert ids == ["0", "1", "2"]
    assert len(list(cache.folder.glob("shard-*"))) == 2


def test_leftover_shards_are_removed(tmp_path):
    build_cache(tmp_path / "c", shard_clips=1)
    cache = build_cache(tmp_path / "c", shard_clips=6)
    assert len(list(cache.folder.glob("shard-*"))) == 4
    assert len(cache.rows) == 10


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.parquet", "rejected.csv", "build.json"])
def test_damaged_file_is_named(tmp_path, name):
    folder = build_cache(tmp_path / "c").folder
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(LabError, match=rf"{name} is damaged.*again"):
        open_cache(folder)


def test_missing_or_truncated_shard_is_named(tmp_path):
    folder = build_cache(tmp_path / "c").folder
    data = (folder / "shard-00002.bin").read_bytes()
    (folder / "shard-00002.bin").write_bytes(data[:-4])
    assert not is_finished(folder)
    with pytest.raises(LabError, match=r"shard-00002.bin has"):
        open_cache(folder)
    (folder / "shard-00002.bin").unlink()
    with pytest.raises(LabError, match=r"shard-00002.bin is missing"):
        open_cache(folder)


def test_absent_cache_raises(tmp_path):
    with pytest.raises(LabError, match="absent"):
        open_cache(tmp_path / "nowhere")


def test_other_artefact_is_not_opened_as_cache(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    manifest.seal(tmp_path, kind="model")
    with pytest.raises(LabError, match="not a feature cache"):
        open_cache(tmp_path)


def test_other_cache_format_is_a_one_line_error(tmp_path):
    folder = build_cache(tmp_path / "c").folder
    (folder / "shard-00001.parquet").rename(folder / "shard-00001.json")
    manifest.seal(folder, **{name: value for name, value in manifest.read(folder).items() if name != "files"})
    with pytest.raises(LabError, match="Another version made it"):
        open_cache(folder)


def test_stale_cache_error_names_the_field(tmp_path):
    folder = build_cache(tmp_path / "c").folder
    with pytest.raises(StaleCache, match=r"source.kind: wanted folder, found toy") as error:
        open_cache(folder, IDENTITY | {"source.kind": "folder", "library.numpy": "3"})
    assert "library.numpy" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(StaleCache, match=r"features.extra: wanted 1, found nothing"):
        open_cache(folder, IDENTITY | {"features.extra": 1})


def test_other_library_version_only_warns(tmp_path):
    lines = record_log()
    cache = open_cache(build_cache(tmp_path / "c").folder, IDENTITY | {"library.numpy": "3"})
    assert len(cache.rows) == 10
    assert len(lines) == 1
    assert "library.numpy: wanted 3, found 2" in lines[0]


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.docx"],
        ["manifest.json", "model.safetensors"],
        ["manifest.json"],
        [".bashrc"],
        [".git/config"],
        ["shard-notes.txt"],
        ["rejected.docx"],
        ["build.json", "thesis.docx"],
        ["data/shard-00000.bin"],
    ],
    ids=" ".join,
)
def test_folder_with_foreign_files_stays_untouched(tmp_path, names):
    for name in names:
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("precious")
    with pytest.raises(LabError, match="not a feature cache"):
        build_cache(tmp_path / "c")
    assert all((tmp_path / "c" / name).read_text() == "precious" for name in names)


def test_partial_files_of_a_killed_build_are_accepted(tmp_path):
    (tmp_path / "c").mkdir()
    for name in (
        ".build.json.partial",
        ".shard-00000.parquet.partial",
        ".shard-00000.bin.123.partial",
        ".manifest.json.partial",
    ):
        (tmp_path / "c" / name).write_text("{")
    assert len(build_cache(tmp_path / "c").rows) == 10
    assert set(contents(tmp_path / "c")) == set(contents(build_cache(tmp_path / "d").folder))


def test_duplicate_ids_raise(tmp_path):
    with pytest.raises(
        LabError, match="two examples have the id '3'"
    ):  # a rejected one counts, and one in another shard
        build_cache(tmp_path / "c", rows=[*examples(), Example("3", "train", "x", b"")])
    assert not is_finished(tmp_path / "c")


def test_no_usable_clip_raises(tmp_path):
    with pytest.raises(LabError, match="all 1 were rejected, the first as silent"):
        build_cache(tmp_path / "c", rows=[examples()[3]])
    with pytest.raises(LabError, match="no example"):
        build_cache(tmp_path / "d", rows=[])
    assert not is_finished(tmp_path / "c")
    assert not is_finished(tmp_path / "d")


def test_shard_without_usable_clips_is_valid(tmp_path):
    cache = build_cache(tmp_path / "c", shard_clips=1)
    assert (cache.folder / "shard-00003.bin").stat().st_size == 0
    assert np.array_equal(cache.log_mel(9).frames, create_clip(examples()[11]).log_mel.frames)


def test_float16_halves_the_frames(tmp_path):
    full, half = (
        build_cache(tmp_path / "c"),
        build_cache(tmp_path / "d", identity=IDENTITY | {"features.dtype": "float16"}),
    )
    assert half.log_mel(0).frames.dtype == np.float16
    assert half.log_mel(0).padded().dtype == np.float32
    assert np.abs(half.log_mel(5).frames - full.log_mel(5).frames).max() < 2e-3
    sizes = [sum(path.stat().st_size for path in cache.folder.glob("*.bin")) for cache in (full, half)]
    assert sizes[0] == 2 * sizes[1]
    assert full.bytes - half.bytes > 0


def test_frames_are_read_only_views_of_the_file(tmp_path):
    frames = build_cache(tmp_path / "c").log_mel(4).frames
    base = frames
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not frames.flags.writeable
    with pytest.raises(ValueError):
        frames[0, 0] = 1


def test_pickled_cache_contains_no_frames(tmp_path):
    cache = build_cache(tmp_path / "c")
    expected = cache.log_mel(6).frames.copy()
    sent = pickle.dumps(cache)
    assert b"memmap" not in sent
    assert np.array_equal(pickle.loads(sent).log_mel(6).frames, expected)


def test_meta_cannot_replace_a_column(tmp_path):
    cache = build_cache(tmp_path / "c", rows=[Example("0", "train", "x", b"", meta={"offset": "99", "accent": "a"})])
    assert cache.rows.loc[0, ["offset", "accent"]].tolist() == [0, "a"]


def test_finished_cache_is_not_built_again(tmp_path):
    build_cache(tmp_path / "c")
    before, ids = contents(tmp_path / "c"), []
    build_cache(tmp_path / "c", recording(ids))
    assert ids == []
    assert contents(tmp_path / "c") == before


# --- several processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DyingOnce:
    """A create_clip that kills the first process that reaches number 6."""

    mark: Path

    def __call__(self, example: Example) -> Clip:
        if example.id == "6" and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), 9)
        return create_clip(example)


@pytest.mark.slow
def test_workers_write_same_bytes_despite_a_killed_process(tmp_path):
    lines, n_clips = record_log(), []
    build_cache(tmp_path / "c", DyingOnce(tmp_path / "died"), workers=2, on_clips=n_clips.append)
    build_cache(tmp_path / "one")
    assert contents(tmp_path / "c") == contents(tmp_path / "one")
    assert lines == ["a worker process died (SIGKILL) over shard 1: another repeats the task"]
    assert n_clips == [4, 4, 4]


@pytest.mark.slow
def test_interrupted_build_with_workers_resumes(tmp_path):
    def cut_off():
        yield from examples()[:8]
        while len(list((tmp_path / "c").glob("shard-*.parquet"))) < 2:
            time.sleep(0.01)
        yield from examples()[8:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", rows=cut_off(), workers=2)
    assert not is_finished(tmp_path / "c")
    ids = []
    build_cache(tmp_path / "c", recording(ids))
    assert ids == ["8", "9", "10", "11"]
    build_cache(tmp_path / "one")
    assert contents(tmp_path / "c") == contents(tmp_path / "one")


def test_small_corpus_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(process_pool, "cores", lambda: 8)
    monkeypatch.setattr(process_pool.Pool, "run", lambda *_: pytest.fail("was asked"))
    assert len(build_cache(tmp_path / "c", workers=0).rows) == 10


def test_large_corpus_starts_workers_late(tmp_path, monkeypatch):
    monkeypatch.setattr(process_pool, "cores", lambda: 2)
    monkeypatch.setattr(features_build, "LARGE_CLIPS", 8)
    numbers = []

    def run(pool, task, name):
        numbers.append(task.number)
        return pickle.loads(pool._work)(task)

    monkeypatch.setattr(process_pool.Pool, "run", run)
    build_cache(tmp_path / "c", workers=0)
    assert numbers == [2]


def test_unpicklable_work_is_a_one_line_error(tmp_path):
    with pytest.raises(LabError, match="pickled"):
        build_cache(tmp_path / "c", recording([]), workers=2)


def test_large_audio_ends_shard_early(tmp_path, monkeypatch):
    monkeypatch.setattr(features_build, "_BLOCK_BYTES", 1_000)
    loud = [replace(example, audio=bytes(600)) for example in examples()]
    assert len(list(build_cache(tmp_path / "c", rows=loud).folder.glob("*.bin"))) == 6


# --- reuse of earlier caches ------------------------------------------------------------------------------------------


def reusing(ids: list[str]):
    """Return a create_clip that reuses features and records in `ids` the clips that it had to decode."""

    def reuse_or_create(example: Example, find_features=None) -> Clip:
        key, clip = hashlib.sha256(example.id.encode()).digest()[:16], create_clip(example)
        features = find_features(key) if find_features else None
        if features is None:
            ids.append(example.id)
            return replace(clip, fingerprint=key)
        return replace(clip, log_mel=features[0], duration_s=features[1], fingerprint=key, reused=True)

    return reuse_or_create


NEW = Example("99", "test", "ny mening", b"", "speaker 9")


@pytest.mark.parametrize(
    ("rows", "decoded"),
    [
        ([*examples(), NEW], ["99"]),
        ([NEW, *examples()], ["99"]),
        ([*examples()[:5], NEW, *examples()[5:]], ["99"]),
        (examples()[1:], []),
        ([replace(example, text="rättad", split="train") for example in examples()], []),
    ],
    ids=["appended", "in front", "inserted", "removed", "corrected"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reuse_decodes_new_clips_only_with_same_bytes(tmp_path, rows, decoded, dtype):
    identity, ids, lines = IDENTITY | {"features.dtype": dtype}, [], record_log()
    build_cache(tmp_path / "old", reusing([]), identity=identity)
    changed = identity | {"source.kind": "one more"}
    build_cache(tmp_path / "new", reusing(ids), rows, changed, reuse=[tmp_path / "old"])
    assert ids == decoded
    n_reused = len(rows) - len(decoded) - 2
    assert lines == [f"{n_reused} of {len(rows)} clips were taken from an earlier cache, the others were decoded"]
    build_cache(tmp_path / "fresh", reusing([]), rows, changed)
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("part", ["bin", "parquet"])
def test_damaged_shard_is_not_reused(tmp_path, part):
    build_cache(tmp_path / "old", reusing([]))
    path = tmp_path / "old" / f"shard-00001.{part}"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    ids = []
    build_cache(tmp_path / "new", reusing(ids), reuse=[tmp_path / "old"])
    assert ids == ["4", "5", "6"]
    build_cache(tmp_path / "fresh", reusing([]))
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


def test_reusable_caches_are_finished_with_same_settings(tmp_path):
    old = build_cache(tmp_path / "old").folder
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "cut", recording([], stop_at="9"))

    def reusable(**changes):
        others = [old, tmp_path / "cut", tmp_path / "nowhere"]
        return reusable_caches(others, {**IDENTITY, **changes}, tmp_path / "new")

    assert reusable() == reusable(**{"source.kind": "x", "language": "da", "features.vocabulary": "y"}) == [old]
    assert reusable(**{"settings.source.pool": "validated"}) == [old]  # chooses clips, and changes none
    for name in ("features.dtype", "features.min_peak", "library.numpy", "code.cache", "curation.snr"):
        assert reusable(**{name: "other"}) == []
    assert reusable_caches([old], IDENTITY, old) == []
    (old / "shard-00000.bin").unlink()
    assert reusable() == []


def test_added_recording_is_the_only_one_decoded(tmp_path, toy_settings, encoded, speech, monkeypatch):
    def add(name: str, seed: int) -> None:
        (tmp_path / "mine" / f"{name}.wav").write_bytes(encoded(speech(16_000, seed)))
        (tmp_path / "mine" / f"{name}.txt").write_text(f"Mening {name}.")

    (tmp_path / "mine").mkdir()
    settings = toy_settings({"source.kind": "folder", "source.path": str(tmp_path / "mine")})
    for seed, name in enumerate("abc"):
        add(name, seed)
    feature_pipeline.run(settings, runs=tmp_path / "runs")
    add("b2", 7)
    lines, decoded, extract = record_log(), [], ClipFilter._extract
    monkeypatch.setattr(ClipFilter, "_extract", lambda *arguments: decoded.append(1) or extract(*arguments))
    cache = feature_pipeline.run(settings, runs=tmp_path / "runs")
    assert cache.rows["id"].tolist() == ["a", "b", "b2", "c"]
    assert len(decoded) == 1
    assert any(line.startswith("3 of 4 clips were taken") for line in lines)
