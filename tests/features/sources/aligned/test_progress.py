"""The lines that show how far recordings are aligned."""

import time

from pipelines.features.sources.aligned import progress
from pipelines.infra import progress_file


def test_lines_name_finished_recordings_and_decoded_time(tmp_path, monkeypatch):
    monkeypatch.setenv(progress_file.VARIABLE, str(tmp_path / "lines"))
    monkeypatch.setattr(progress_file, "INTERVAL_S", 0.01)
    recordings = [tmp_path / "a.wav", tmp_path / "b.wav"]
    with progress.show("aligning", recordings, lambda path: path.with_suffix(".jsonl")) as advance:
        wait_for(tmp_path / "lines", "aligning: 0/2 recordings\n")
        (tmp_path / "b.jsonl").write_text('{"start_s": 70.0, "end_s": 83.0}\n', "utf-8")
        wait_for(tmp_path / "lines", "aligning: 0/2 recordings, b.wav decoded to 1:23\n")
        advance()
        wait_for(tmp_path / "lines", "aligning: 1/2 recordings, b.wav decoded to 1:23\n")
    assert (tmp_path / "lines").read_text("utf-8").count("\n") == 3


def wait_for(path, line):
    """Wait until a file ends with a line."""
    for _ in range(1_000):
        if path.is_file() and path.read_text("utf-8").endswith(line):
            return
        time.sleep(0.01)
    raise AssertionError(f"no line {line!r}")
