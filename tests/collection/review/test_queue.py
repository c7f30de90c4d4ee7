"""The queue of a review: order, several reviewers, tables, and the estimated share of errors."""

from __future__ import annotations

import csv
import io
import threading

import numpy as np
import pytest

from pipelines.collection.review.queue import MIN_DECISIONS, RANDOM_EVERY, Item, Queue, error_probabilities
from pipelines.features.curation import corrections
from pipelines.infra.errors import LabError


def items(n: int = 30) -> list[Item]:
    return [Item(f"c{i}", f"text {i}", f"heard {i}", float(n - i)) for i in range(n)]


@pytest.fixture
def table(tmp_path):
    return tmp_path / "corrections.csv"


def test_clips_come_in_order_with_a_random_one_in_ten(table):
    queue, seen = Queue(items(60), table, "m"), []
    for _ in range(2 * RANDOM_EVERY):
        seen.append(queue.next("one").id)
        queue.decide(seen[-1], "accept", "", "Åsa")
    assert seen[: RANDOM_EVERY - 1] == [f"c{i}" for i in range(RANDOM_EVERY - 1)]
    assert len(set(seen)) == len(seen) and seen[RANDOM_EVERY - 1] != f"c{RANDOM_EVERY - 1}"


def test_two_reviewers_see_different_clips_and_lose_nothing(table):
    queues = [Queue(items(40), table, "m"), Queue(items(40), table, "m")]  # as of two processes

    def review(queue: Queue, name: str) -> None:
        for _ in range(10):
            queue.decide(queue.next(name).id, "correct", "något annat", name)

    threads = [threading.Thread(target=review, args=(queues[i % 2], f"r{i}")) for i in range(4)]
    assert queues[0].next("a").id != queues[0].next("b").id
    assert queues[0].next("a") == queues[0].next("a")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = corrections.open_log(table).read()
    assert len(rows) == 40 and {row["reviewer"] for row in rows} == {"r0", "r1", "r2", "r3"}


def test_review_resumes_after_a_crash(table):
    queue = Queue(items(5), table, "m")
    queue.decide("c0", "correct", " =Det  rätta ", "x")
    queue.decide("c1", "reject", "ignored", "x")
    with open(table, "ab") as file:
        file.write(b"c2,text 2,acc")  # a write that a crash cut short
    again = Queue(items(5), table, "m")
    assert again.next("one").id == "c2" and again.progress().wrong == 2
    again.decide("c2", "accept", "", "y")
    read = corrections.read(table)
    assert {name: (one.verdict, one.after) for name, one in read.items()} == {
        "c0": ("correct", "=Det rätta"),
        "c1": ("reject", ""),
        "c2": ("accept", ""),
    }
    assert again.next("one").id == "c3"


@pytest.mark.parametrize(
    ("name", "verdict", "after"),
    [("c9", "accept", ""), ("c0", "maybe", ""), ("c0", "correct", " ! "), ("c0", "correct", "a" * 1001)],
)
def test_bad_decision_is_one_line_and_stores_nothing(table, name, verdict, after):
    queue = Queue(items(3), table, "m")
    with pytest.raises(LabError) as caught:
        queue.decide(name, verdict, after, "")
    assert "\n" not in str(caught.value) and not corrections.read(table)


def test_unchanged_correction_is_an_acceptance(table):
    queue = Queue(items(3), table, "m")
    queue.decide("c0", "correct", "text  0", "")
    assert corrections.read(table)["c0"].verdict == "accept"


@pytest.mark.parametrize(
    "content", ["id,text\n1,2\n", "{header}\nc0,text 0,perhaps,,,,,\n", "{header}\nc0,t,correct,,,,,\n"]
)
def test_other_table_is_refused(table, content):
    table.write_text(content.format(header=",".join(corrections.COLUMNS)))
    with pytest.raises(LabError, match="corrections.csv"):
        Queue(items(3), table, "m")


@pytest.mark.parametrize(
    ("delimiter", "encoding", "first", "end"),
    [
        (";", "utf-8-sig", "", "\r\n"),
        (";", "cp1252", "", "\r\n"),
        (",", "cp1252", "", "\r\n"),
        (";", "utf-8", "sep=;\n", "\n"),
        ("\t", "utf-16", "", "\r\n"),
    ],
)
def test_review_goes_on_in_a_table_that_excel_saved(table, delimiter, encoding, first, end):
    names = [*corrections.COLUMNS, "comment"]
    decided = {"c0": ("correct", "så här, ja"), "c1": ("reject", "")}
    rows = [
        [name, f"text {name[1:]}", verdict, after, "Åsa", "t", "m", "h", "obs!"]
        for name, (verdict, after) in decided.items()
    ]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerows([names, *rows])
    edited = (first + out.getvalue()).encode(encoding)
    table.write_bytes(edited)
    assert {name: (one.verdict, one.after) for name, one in corrections.read(table).items()} == decided
    digest = corrections.digest_of(corrections.read(table))
    queue = Queue(items(4), table, "m")
    assert corrections.digest_of(corrections.read(table)) == digest and queue.next("one").id == "c2"
    assert table.with_name("corrections.csv.edited").read_bytes() == edited
    table.write_bytes(edited)  # saved again while the page is open
    queue.decide("c2", "accept", "", "")
    assert corrections.read(table).keys() == {"c0", "c1", "c2"}


def test_row_cut_within_a_letter_is_not_another_encoding(table):
    Queue(items(3), table, "m").decide("c0", "correct", "går", "Åsa")
    with open(table, "ab") as file:
        file.write("c1,text 1,correct,å".encode()[:-1])
    queue = Queue(items(3), table, "m")
    assert queue.next("one").id == "c1" and corrections.read(table)["c0"].after == "går"
    assert not table.with_name("corrections.csv.edited").exists()


def test_decision_about_an_older_transcript_does_not_count(table):
    Queue([Item("c0", "old text", "", 1.0)], table, "m").decide("c0", "reject", "", "")
    assert Queue(items(3), table, "m").next("one").id == "c0"


def test_share_is_estimated_after_some_decisions(table):
    queue = Queue(items(40), table, "m")
    for n in range(40):
        assert (queue.progress().share is None) == (n < MIN_DECISIONS)
        queue.decide(f"c{n}", "reject" if n < 5 else "accept", "", "")
    assert queue.progress().share == 1 and queue.next("one") is None


def test_estimated_share_is_near_the_true_share():
    differences = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores = np.sort(rng.normal(0, 1, 400))[::-1]
        wrong = rng.random(400) < 1 / (1 + np.exp(-2 * (scores - 1)))
        found = wrong[:120].sum()
        expected = error_probabilities(scores[:120], wrong[:120], scores[120:]).sum()
        differences.append(found / (found + expected) - found / wrong.sum())
    assert abs(np.mean(differences)) < 0.06 and np.std(differences) < 0.15


def test_estimate_never_rises_with_a_lower_score():
    found = error_probabilities(np.arange(30.0), np.arange(30) < 10, np.array([0.0, 50.0]))
    assert found[1] >= found[0]
