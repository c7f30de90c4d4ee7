"""Names of the base model and the training data of a model, as model cards print them, without local paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.infra.redact import redact_model_name
from pipelines.whisper.model import ModelRef

FILE = "README.md"
"""File name of a model card in the model's folder."""
DATA_SOURCES = {
    "tour": (
        "the lab's tour (synthetic, eSpeak NG)",
        "The sentences are the lab's, the voices synthetic.",
    ),
    "tour-english": (
        "the lab's English tour (synthetic, eSpeak NG)",
        "The sentences are the lab's, the voices synthetic.",
    ),
    "planted": (
        "the lab's tour with planted faults (synthetic, eSpeak NG)",
        "The sentences are the lab's, the voices synthetic.",
    ),
    "common_voice": ("Common Voice", "CC0. Mozilla forbids re-hosting it, and finding out who speaks."),
    "mozilla": ("Common Voice", "CC0. Mozilla forbids re-hosting it, and finding out who speaks."),
    "folder": ("recordings of the trainer's own", "Not published."),
    "aligned": ("long recordings of the trainer's own with texts", "Not published."),
    "unlabelled": ("recordings of the trainer's own without transcripts", "Not published."),
    "parquet": ("a Parquet data set of the trainer's own", "Not published."),
    "feedback": ("corrections by listeners of the lab's app", "Not published."),
}
"""Kind of source to a name of its data and the terms of use of its recordings."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def data_of(source: Mapping[str, Any]) -> dict[str, str]:
    """Return `type` (for programs) and `name` (for readers) of a source's data; `source` is its nested settings."""
    kind = source["kind"]
    if kind == "mix":
        return {"type": kind, "name": "a mix of " + "; ".join(data_of(part)["name"] for part in source["parts"])}
    if kind == "hub":
        return {"type": source["path"], "name": source["path"]}
    return {"type": kind, "name": DATA_SOURCES.get(kind, (kind,))[0]}


def origin_of(facts: Mapping[str, Any]) -> str:
    """Return the weights that a tuned model started from: its base model or, for a fork, the run and step as well.

    `facts` are those of its manifest or lineage; an empty string if they name no base.
    """
    base, fork = facts.get("base") or "", facts.get("fork")
    if not fork:
        return base
    start = f"{fork['run']} step {fork['step']}"
    base = base.removesuffix(f" @ {start}")  # written by older versions in place of the base's revision
    return f"run {start}, tuned from {base}"


def base_of(base: ModelRef) -> str:
    """Return the base model's title without local paths."""
    return replace(base, name=redact_model_name(base.name)).title
