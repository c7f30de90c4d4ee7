"""A recipe with a table of corrections: the cache, its digest, leaks and label errors."""

from __future__ import annotations

import pytest

from pipelines.features import pipeline
from pipelines.features.curation import corrections
from pipelines.infra.errors import LabError
from pipelines.recipes import commands

ROW = {"reviewer": "Å", "time": "t", "model": "m", "heard": "h"}


def write(path, rows) -> str:
    log = corrections.open_log(path)
    with log.locked():
        for name, before, verdict, after in rows:
            log.append({"id": name, "before": before, "verdict": verdict, "after": after, **ROW})
    return str(path)


def test_cache_follows_the_table(toy_settings, toy_cache, tmp_path):
    train = toy_cache.rows[toy_cache.rows["split"] == "train"]
    ids, texts = train["id"].tolist(), train["text"].tolist()
    held_out = toy_cache.rows[toy_cache.rows["split"] == "test"].iloc[0]
    table = write(
        tmp_path / "c.csv",
        [
            (ids[0], texts[0], "reject", ""),
            (ids[0], texts[0], "correct", "Det här sägs."),  # the last decision counts
            (ids[1], texts[1], "reject", ""),
            (ids[2], "another text", "reject", ""),  # about an older transcript
            (ids[3], texts[3], "accept", ""),
            (ids[4], texts[4], "correct", held_out["text"]),
            (held_out["id"], held_out["text"], "reject", ""),  # never filtered
            ("gone", "x", "reject", ""),
        ],
    )
    recipe = toy_settings({"curation.corrections": table})
    cache = pipeline.run(recipe, runs=tmp_path)
    assert cache.digest != toy_cache.digest
    texts_now = cache.rows.set_index("id")["text"]
    assert texts_now[ids[0]] == "Det här sägs." and cache.repaired["before"].tolist() == [texts[0]]
    assert {ids[1], ids[4]} == {*toy_cache.rows["id"]} - {*cache.rows["id"]}
    assert set(cache.rejected["reason"]) == {"reviewed"}
    assert texts_now[ids[2]] == texts[2]
    (count,) = [step for step in cache.curation if step["step"] == "reviewed"]
    assert (count["dropped"], count["changed"]) == (2, 1)
    assert "rejected by a person" in (cache.folder / "README.md").read_text("utf-8")
    write(tmp_path / "c.csv", [(ids[0], texts[0], "reject", "")])
    with pytest.raises(LabError, match=r"curation\.corrections"):
        pipeline.open_cache(recipe, cache.uri, runs=tmp_path)


def test_default_is_not_in_the_digest(toy_settings, toy_cache):
    assert "curation.corrections" not in toy_settings().settings()
    recipe = toy_settings({"curation.corrections": "a.csv"})
    assert "curation.corrections=a.csv" in commands.command("features", recipe=recipe)
    assert not any("corrections" in name for name in toy_cache.identity)


def test_reviewers_and_times_do_not_change_the_digest(tmp_path):
    first = write(tmp_path / "a.csv", [("a", "x", "reject", ""), ("b", "y", "accept", "")])
    second = write(tmp_path / "b.csv", [("b", "y", "reject", ""), ("b", "y", "accept", ""), ("a", "x", "reject", "")])
    assert corrections.digest_of(corrections.load(first)) == corrections.digest_of(corrections.load(second))


def test_table_that_changes_during_the_build_is_refused(toy_settings, toy_cache, tmp_path, monkeypatch):
    row = toy_cache.rows[toy_cache.rows["split"] == "train"].iloc[0]
    path, check = tmp_path / "c.csv", pipeline.availability.check_unchanged
    recipe = toy_settings({"curation.corrections": write(path, [(row["id"], row["text"], "accept", "")])})

    def decide_meanwhile(*args):
        write(path, [(row["id"], row["text"], "reject", "")])
        return check(*args)

    monkeypatch.setattr(pipeline.availability, "check_unchanged", decide_meanwhile)
    with pytest.raises(LabError, match="has changed while"):
        pipeline.run(recipe, runs=tmp_path)


def test_missing_table_is_named(toy_settings, tmp_path):
    with pytest.raises(LabError, match="which is no file"):
        pipeline.run(toy_settings({"curation.corrections": str(tmp_path / "none.csv")}), runs=tmp_path)
