"""Several sources as one: drawn rows, their order, and held-out rows of the named parts only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from log_recorder import record_log

from pipelines import recipes
from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.mix import MixSource, Part
from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError


@dataclass(frozen=True)
class Toy:
    """`sizes` rows of each split, all by the speaker `speaker`."""

    train: int = 0
    validation: int = 0
    test: int = 0
    speaker: str = "anna"
    stray: int = 0

    def identity(self) -> dict[str, str]:
        return {"kind": "toy", "size": str(self.train)}

    def examples(self, splits=SPLITS):
        for split in (*SPLITS, *(["stray"] if {*SPLITS} <= {*splits} else [])):
            if split in splits or split == "stray":
                for number in range(getattr(self, split)):
                    yield Example(f"{split}/{number}", split, f"text {number}", b"", self.speaker, {"gender": "x"})


@pytest.fixture
def lines() -> list[str]:
    return record_log()


@pytest.fixture
def rows(lines):
    """`rows(part, ..., seed=7, splits=SPLITS)` returns the examples of a mix."""
    return lambda *parts, seed=7, splits=SPLITS: list(MixSource(parts, seed).examples(splits))


ALL = ("train", "validation", "test")


def test_every_row_appears_once_with_its_origin(rows):
    examples = rows(Part("a", Toy(30, 5, 4), ALL), Part("b", Toy(50, 7, 9)))
    assert Counter((e.meta["origin"], e.split) for e in examples) == {
        ("a", "train"): 30,
        ("b", "train"): 50,
        ("a", "validation"): 5,
        ("a", "test"): 4,
    }
    assert len({e.id for e in examples}) == len(examples)
    assert (examples[-1].id, examples[-1].meta) == ("a/test/3", {"gender": "x", "origin": "a"})
    assert [e.split for e in examples] == sorted((e.split for e in examples), key=SPLITS.index)


def test_rows_are_interleaved_in_source_order(rows):
    examples = rows(Part("a", Toy(200)), Part("b", Toy(200)))
    head = Counter(e.meta["origin"] for e in examples[:100])
    assert min(head["a"], head["b"]) > 30
    for name in "ab":
        assert [e.text for e in examples if e.meta["origin"] == name] == [f"text {n}" for n in range(200)]


def test_order_depends_on_the_seed_only(rows):
    parts = (Part("a", Toy(40, 3), ALL), Part("b", Toy(40)))
    ids = [e.id for e in rows(*parts)]
    assert ids == [e.id for e in rows(*parts)]
    assert ids != [e.id for e in rows(*parts, seed=8)]
    assert sorted(ids) == sorted(e.id for e in rows(*parts, seed=8))
    assert [e.id for e in rows(*parts, splits=("train",))] == ids[:80]


def test_weighted_mix_ends_with_first_part_and_logs_it(rows, lines):
    examples = rows(Part("a", Toy(1000), weight=0.75), Part("b", Toy(5000), weight=0.25))
    counts = Counter(e.meta["origin"] for e in examples)
    assert counts["a"] == 1000
    assert 250 < counts["b"] < 420
    assert f"a has no more training rows, so the mix ends with a 1,000, b {counts['b']}" in lines[0]
    assert "left out" in lines[0]


def test_count_takes_the_head_and_raises_for_too_few(rows, lines):
    examples = rows(Part("a", Toy(30), count=10), Part("b", Toy(5)))
    assert Counter(e.meta["origin"] for e in examples) == {"a": 10, "b": 5}
    assert {e.text for e in examples if e.meta["origin"] == "a"} == {f"text {n}" for n in range(10)}
    assert lines == []
    with pytest.raises(LabError, match=r"a must give 31 training rows, has 30"):
        rows(Part("a", Toy(30), count=31), Part("b", Toy(5)))


def test_count_ends_a_weighted_mix(rows):
    examples = rows(Part("a", Toy(5000), weight=1, count=100), Part("b", Toy(5000), weight=1))
    counts = Counter(e.meta["origin"] for e in examples)
    assert counts["a"] == 100 and 60 < counts["b"] < 150


def test_held_out_rows_come_from_named_parts_only(rows):
    parts = (Part("a", Toy(3, 2, 2), ("train", "validation")), Part("b", Toy(3, 2, 2), ("test",)))
    assert Counter((e.meta["origin"], e.split) for e in rows(*parts)) == {
        ("a", "train"): 3,
        ("a", "validation"): 2,
        ("b", "test"): 2,
    }
    assert [e.id for e in rows(*parts, splits=("test",))] == ["b/test/0", "b/test/1"]


def test_part_with_all_splits_includes_unknown_splits(rows):
    assert [e.split for e in rows(Part("a", Toy(1, 1, 1, stray=2), ALL))] == [*ALL, "stray", "stray"]
    assert [e.split for e in rows(Part("a", Toy(1, 1, 1, stray=2), ALL), splits=("test",))] == ["test"]


def test_speakers_get_part_prefix_unless_hashes(rows):
    person = "0123456789abcdef" * 8
    examples = rows(
        Part("a", Toy(1)), Part("b", Toy(1)), Part("c", Toy(1, speaker=person)), Part("d", Toy(1, speaker=""))
    )
    assert {e.meta["origin"]: e.speaker for e in examples} == {"a": "a/anna", "b": "b/anna", "c": person, "d": ""}


def test_part_with_own_names_equals_its_source(rows):
    examples = rows(Part("a", Toy(2, 1, 2), ALL, own_names=True), Part("b", Toy(2)))
    held_out = [(e.id, e.text, e.speaker) for e in examples if e.split != "train"]
    assert held_out == [(e.id, e.text, e.speaker) for e in Toy(2, 1, 2).examples(("validation", "test"))]
    assert {e.speaker for e in examples if e.split == "train"} == {"anna", "b/anna"}
    assert len({e.id for e in examples}) == len(examples)


def test_audio_read_on_demand_stays_unread(rows):
    class Late(Example):
        def __init__(self):
            self.__dict__.update(id="1", split="train", text="hej", speaker="", meta={})

        @property
        def audio(self) -> bytes:
            raise AssertionError("audio was read")

    class Source:
        def examples(self, splits):
            yield Late()

    assert rows(Part("a", Source()))[0].id == "a/1"


def test_outline_has_the_same_rows_without_audio(tmp_path):
    @dataclass(frozen=True)
    class Outlined(Toy):
        def examples(self, splits=SPLITS):
            raise AssertionError("audio was read")

        def outline(self):
            return Toy.examples(self)

    def mix(kind, last):
        return MixSource((Part("a", kind(30, 5, 4, stray=1), ALL), Part("b", kind(50, 7, 9)), Part("c", last)))

    outlined = mix(Outlined, Outlined(3))
    assert list(outlined.outline()) == list(mix(Toy, Toy(3)).examples())
    assert mix(Outlined, Toy(3)).outline is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((Part("a", Toy(1)), Part("a", Toy(1))), "'a' twice"),
        ((Part("a", Toy(1), weight=1), Part("b", Toy(1))), "none for b"),
        ((Part("a", Toy(1), own_names=True), Part("b", Toy(1), own_names=True)), "got a, b"),
    ],
)
def test_conflicting_parts_raise_at_once(parts, message):
    for use in (MixSource(parts).identity, MixSource(parts).examples):
        with pytest.raises(LabError, match=message):
            use()


def test_part_without_train_needs_no_weight(rows):
    assert len(rows(Part("a", Toy(1), weight=1), Part("b", Toy(0, 1, 1), ("test",)))) == 2


def test_identity_changes_with_settings_and_parts():
    def identity(a: Part, seed: int = 7, *more: Part):
        return MixSource((a, Part("b", Toy(3)), *more), seed).identity()

    base = identity(Part("a", Toy(2)))
    assert base == identity(Part("a", Toy(2))) and all(isinstance(value, str) for value in base.values())
    others = [
        identity(Part("a", Toy(2)), 8),
        identity(Part("a", Toy(4))),
        identity(Part("c", Toy(2))),
        identity(Part("a", Toy(2), ("train", "test"))),
        identity(Part("a", Toy(2), count=1)),
        identity(Part("a", Toy(2)), 7, Part("d", Toy(1))),
        MixSource((Part("b", Toy(3)), Part("a", Toy(2)))).identity(),
        identity(Part("a", Toy(2), own_names=True)),
    ]
    assert len({str(sorted(other.items())) for other in [base, *others]}) == 9
    weighted = MixSource((Part("a", Toy(2), weight=0.5), Part("b", Toy(3), weight=0.5))).identity()
    assert (weighted["a.weight"], weighted["a.size"], weighted["kind"]) == ("0.5", "2", "mix")
    assert identity(Part("a", Toy(2), ("test", "train"))) == identity(Part("a", Toy(2), ("train", "test")))


def test_recipe_opens_a_mix_of_kinds(tmp_path, lines):
    (tmp_path / "1.wav").write_bytes(b"not decoded here")
    (tmp_path / "1.txt").write_text("hej", "utf-8")
    parts = [
        {"name": "own", "kind": "folder", "path": str(tmp_path), "gives": ["train", "validation", "test"]},
        {"name": "tour", "kind": "tour", "train": 4, "validation": 2, "test": 2, "gives": ["train"], "count": 3},
    ]
    source = open_source(recipes.load("tour", {"source.kind": "mix", "source.parts": parts}).source)
    assert [part.name for part in source.parts] == ["own", "tour"]
    assert (source.parts[1].count, source.parts[1].gives, source.seed) == (3, ("train",), 7)
    assert source.identity()["own.kind"] == "folder"
