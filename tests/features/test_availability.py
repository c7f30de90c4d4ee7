"""Files that are away for a moment: nothing is sealed under a digest that it does not have."""

from __future__ import annotations

import builtins
import errno
import shutil

import pytest

from pipelines.features import availability
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import is_finished
from pipelines.features.curation import corpus
from pipelines.infra import files
from pipelines.infra.errors import LabError, Unfinished
from pipelines.speech import audio


@pytest.fixture
def recordings(tmp_path, encoded, speech):
    """A folder of six recordings by six speakers."""
    folder = tmp_path / "recordings"
    (folder / "clips").mkdir(parents=True)
    lines = ["path,text,speaker,split"]
    for n, split in enumerate(("train", "train", "train", "train", "validation", "test")):
        (folder / "clips" / f"{n}.wav").write_bytes(encoded(speech(4_000, seed=n)))
        lines.append(f"clips/{n}.wav,mening nummer {n},speaker {n},{split}")
    (folder / "transcripts.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(recordings, toy_settings, tmp_path):
    """`run()` builds the cache; `run("other")` in another folder of artefacts."""
    source = {"source.kind": "folder", "source.path": str(recordings), "features.shard_clips": 2}

    def build(name: str = "runs", **overrides):
        return feature_pipeline.run(toy_settings({**source, **overrides}), runs=tmp_path / name)

    return build


@pytest.fixture
def after_outline(monkeypatch):
    """`after_outline(action)`: call it once between the source's identity and the first decoded clip."""

    def install(action) -> None:
        selected = corpus.selected

        def once(*args):
            monkeypatch.setattr(corpus, "selected", selected)
            action()
            return selected(*args)

        monkeypatch.setattr(corpus, "selected", once)

    return install


def unfinished(tmp_path) -> bool:
    """Return True if there is a cache and none is sealed."""
    folders = [*(tmp_path / "runs" / "features").iterdir()]
    return bool(folders) and not any(map(is_finished, folders))


@pytest.mark.parametrize("returns", ["after the stage", "during the stage"])
def test_clip_that_is_away_for_a_moment_is_not_sealed(run, recordings, after_outline, tmp_path, monkeypatch, returns):
    whole, clip, away = run("whole"), recordings / "clips" / "0.wav", recordings / "away"
    shutil.rmtree(tmp_path / "whole")
    after_outline(lambda: clip.rename(away))
    if returns == "during the stage":
        check = availability.check_unchanged
        back = iter([lambda: away.rename(clip)])
        monkeypatch.setattr(
            availability, "check_unchanged", lambda *args: (next(back, lambda: None)(), check(*args))[1]
        )
    with pytest.raises(Unfinished, match="away for a moment" if returns == "during the stage" else "changed"):
        run()
    assert unfinished(tmp_path)
    if away.exists():
        away.rename(clip)
    again = run()
    assert (again.digest, again.counts, again.counts["rejected"]) == (whole.digest, whole.counts, 0)


def test_clip_that_changes_during_the_stage_is_not_sealed(run, recordings, after_outline, tmp_path, encoded, speech):
    after_outline(lambda: (recordings / "clips" / "0.wav").write_bytes(encoded(speech(4_000, seed=9))))
    with pytest.raises(Unfinished, match="source changed while its features were extracted .files_sha256"):
        run()
    assert unfinished(tmp_path)
    assert run().counts["rejected"] == 0


@pytest.fixture
def fail_to_open(monkeypatch):
    """`fail_to_open(name, error, times)`: opening an audio file of that name raises the error, so many times."""

    def install(name: str, error: OSError, times: int) -> None:
        remaining = [error] * times

        def open_or_fail(path, *args):
            if str(path).endswith(name) and remaining:
                raise remaining.pop()
            return builtins.open(path, *args)

        for module in (audio, files):
            monkeypatch.setattr(module, "open", open_or_fail, raising=False)

    monkeypatch.setattr(files, "WAITS_S", (0.0, 0.0))
    return install


ERRORS = [OSError(errno.EIO, "I/O"), OSError(errno.ESTALE, "Stale"), TimeoutError(errno.ETIMEDOUT, "Timed out")]


@pytest.mark.parametrize("error", [*ERRORS, PermissionError(errno.EACCES, "Denied")], ids=lambda error: error.strerror)
def test_file_that_cannot_be_read_leaves_the_cache_unsealed(run, tmp_path, fail_to_open, error):
    fail_to_open("clips/2.wav", error, times=3)
    with pytest.raises(
        Unfinished, match=rf"clips/2.wav cannot be read at the moment \({error.strerror}\).*same command"
    ):
        run()
    assert unfinished(tmp_path)
    assert run().counts["rejected"] == 0


def test_file_that_can_be_read_again_at_once_is_used(run, fail_to_open):
    fail_to_open("clips/2.wav", ERRORS[0], times=2)
    assert run().counts["rejected"] == 0


def test_identity_tells_absent_files_from_unreadable_ones(recordings, run, monkeypatch):
    monkeypatch.setattr(files, "WAITS_S", ())
    monkeypatch.setattr(
        "pipelines.features.sources.stamps.sha256", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O"))
    )
    with pytest.raises(Unfinished, match="cannot be read at the moment"):
        run()


def test_row_of_an_absent_file_is_rejected_as_missing(run, recordings):
    (recordings / "clips" / "0.wav").unlink()
    cache = run()
    assert list(cache.rejected["reason"]) == ["missing"]


def test_many_absent_files_are_refused_before_the_extraction(run, recordings, tmp_path):
    for n in (0, 1):
        (recordings / "clips" / f"{n}.wav").unlink()
    with pytest.raises(LabError, match="2 of 6 recordings are missing, the first is .*0.wav: see that their disk"):
        run()
    assert not (tmp_path / "runs" / "features").exists()
    assert run(**{"features.max_rejected_share": 0.5}).counts["rejected"] == 2


def test_empty_folder_of_recordings_may_be_unmounted(run, recordings):
    shutil.rmtree(recordings / "clips")
    (recordings / "clips").mkdir()
    with pytest.raises(Unfinished, match="clips is empty, and 6 recordings should be in it"):
        run(**{"features.max_rejected_share": 1.0})


def test_lfs_pointers_name_their_command(run, recordings):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 40224\n"
    (recordings / "clips" / "0.wav").write_text(pointer)
    [row] = run().rejected.to_dict("records")
    assert row["reason"] == "lfs_pointer" and "git lfs pull" in row["detail"]
