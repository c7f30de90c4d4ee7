"""Why clips were not used: counts by reason with an example, and the limit on clips that cannot be used.

Clips that a filter dropped because the recipe asks for it do not count towards the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.features.curation.selection import CLIP_STEPS, ORDER
from pipelines.features.sources.unlabelled.labels import REASONS as PSEUDO_LABELS
from pipelines.infra.errors import LabError
from pipelines.recipes.data_settings import FeatureSettings

_LIMITS = {"too_short": "min_duration_s", "too_long": "max_duration_s", "silent": "min_peak"}
"""Reason to the setting of `features`; it is a filter that the recipe asks for if the setting is changed."""
_FILTERS = ({*ORDER, *PSEUDO_LABELS} | {reason for reasons in CLIP_STEPS.values() for reason in reasons}) - {*_LIMITS}
_DETAIL_CHARS = 160


@dataclass(frozen=True)
class Rejection:
    """The clips that were rejected for one reason."""

    reason: str
    clips: int
    example: str
    """Id of the first of them."""
    detail: str
    """What was wrong with the first of them."""
    fault: bool
    """The clips cannot be used; False: a filter of the recipe dropped them."""

    def __str__(self) -> str:
        return f"{self.reason} {self.clips:,} ({self.example}: {self.detail})"


class TooManyRejected(LabError):
    """More clips cannot be used than the recipe allows. The cache is finished all the same."""

    def __init__(self, message: str, cache: FeatureCache):
        super().__init__(message)
        self.cache = cache


def summarise(rows: Iterable[Mapping[str, str]], identity: Mapping[str, Any]) -> list[Rejection]:
    """Return one Rejection per reason of the rows of `rejected.csv`, the most frequent first."""
    by_reason: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row)
    rejections = []
    for reason, of_reason in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        first = of_reason[0]
        detail = " ".join(first["detail"].split())
        detail = detail if len(detail) <= _DETAIL_CHARS else f"{detail[: _DETAIL_CHARS - 3]}..."
        rejections.append(Rejection(reason, len(of_reason), first["id"], detail, _is_fault(reason, identity)))
    return rejections


def of(cache: FeatureCache) -> list[Rejection]:
    """Return one Rejection per reason of a cache's rejected clips, the most frequent first."""
    return summarise(cache.rejected.to_dict("records"), cache.identity)


def as_dict(cache: FeatureCache) -> dict[str, Any]:
    """Return the rejections of a cache for JSON."""
    return {"rejected": [asdict(rejection) for rejection in of(cache)], "rejected_csv": str(cache.rejected_path)}


def describe(cache: FeatureCache) -> str:
    """Return lines that say how many clips were not used, why, and where the list is; empty if all were used."""
    rejections = of(cache)
    if not rejections:
        return ""
    n, total = _n_rejected(rejections), _n_rejected(rejections) + len(cache.rows)
    lines = [f"not used: {n:,} of {total:,} clips, listed in {cache.rejected_path}"]
    return "\n".join([*lines, *(f"  {rejection}" for rejection in rejections)])


def check_share(cache: FeatureCache, max_share: float) -> None:
    """Raise TooManyRejected if more than `max_share` of the source's clips cannot be used."""
    rejections = of(cache)
    faults, total = [one for one in rejections if one.fault], _n_rejected(rejections) + len(cache.rows)
    n = _n_rejected(faults)
    if n <= max_share * total:
        return
    raise TooManyRejected(
        f"{n:,} of {total:,} clips cannot be used ({n / total:.0%}, at most {max_share:.0%} are allowed): "
        f"{'; '.join(map(str, faults))}. All are listed in {cache.rejected_path}: repair them, or allow more with "
        f"features.max_rejected_share={math.ceil(100 * n / total) / 100:g}",
        cache,
    )


def _n_rejected(rejections: list[Rejection]) -> int:
    return sum(rejection.clips for rejection in rejections)


def _is_fault(reason: str, identity: Mapping[str, Any]) -> bool:
    if reason in _LIMITS:
        setting = _LIMITS[reason]
        default = FeatureSettings.model_fields[setting].default
        return identity.get(f"features.{setting}", default) == default
    return reason not in _FILTERS
