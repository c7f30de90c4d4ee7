"""The lab's WER and CER as a metric of Hugging Face's evaluate, for use in other projects. Nothing is downloaded.

    from pipelines.experiments.metric import Wer

    Wer().compute(predictions=["hej då"], references=["Hej, du!"])["wer"]   # 0.5

It wraps `scoring.score` in evaluate's interface: `add` and `add_batch` collect batches; `num_process`, `process_id` and
`experiment_id` collect over processes. `evaluate.load` is not needed and does not read this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from pipelines.infra.errors import missing_package
from pipelines.speech import scoring
from pipelines.speech.edits import require_strings
from pipelines.speech.intervals import SPEAKERS

_DESCRIPTION = "Word and character error rate with 95 % intervals by bootstrap over speakers or clips, on jiwer."
_INPUTS = """
`predictions` and `references`: transcripts, one per utterance. An empty reference means that nothing was said: every
word of its prediction is an insertion. At least one reference contains a word.
`compute` also takes `normalised` (True: without case and punctuation; False: as written) and `speakers`, one per
utterance ('' if unknown) in the order in which the utterances were added, those of process 0 first. Without them, or
with one, intervals are over clips (`over_speakers` 0): they say nothing about other speakers.

Returns plain numbers, as a Trainer logs them: `wer, wer_low, wer_high, cer, cer_low, cer_high` as fractions (low to
high is the 95 % interval, NaN if too few to vary), `substitutions, insertions, deletions, words` (of the references),
`utterances`, `speakers` (known ones) as counts, `over_speakers`: 1 if intervals are over speakers, else 0.
"""


def __getattr__(name: str) -> Any:
    """Create `Wer` on first use: evaluate takes seconds to import."""
    if name == "Wer":
        return _wer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _wer() -> type:
    try:
        import datasets
        import evaluate
    except ImportError:
        raise missing_package("evaluate", "evaluate>=0.4.5", "the metric pipelines.experiments.metric.Wer") from None

    class Wer(evaluate.Metric):
        __doc__ = _DESCRIPTION + _INPUTS
        __module__, __qualname__ = __name__, "Wer"

        def _info(self) -> evaluate.MetricInfo:
            texts = {name: datasets.Value("string") for name in ("predictions", "references")}
            features = datasets.Features(texts)
            return evaluate.MetricInfo(_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

        def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> Any:
            """Return the scores of all utterances. Raise LabError for a text that is None."""
            require_strings(references or (), predictions or ())
            return super().compute(predictions=predictions, references=references, **options)

        def add_batch(self, *, predictions: Any = None, references: Any = None, **options: Any) -> None:
            """Collect utterances. Raise LabError for a text that is None."""
            require_strings(references or (), predictions or ())
            super().add_batch(predictions=predictions, references=references, **options)

        def _compute(
            self,
            predictions: Sequence[str],
            references: Sequence[str],
            speakers: Sequence[str] | None = None,
            normalised: bool = True,
        ) -> dict[str, float | int]:
            score = scoring.score(list(references), list(predictions), speakers, normalised=normalised)
            unknown = (math.nan, math.nan)
            (wer_low, wer_high), (cer_low, cer_high) = score.ci95 or unknown, score.cer_ci95 or unknown
            return {
                "wer": score.wer,
                "wer_low": wer_low,
                "wer_high": wer_high,
                "cer": score.cer,
                "cer_low": cer_low,
                "cer_high": cer_high,
                "substitutions": score.substitutions,
                "insertions": score.insertions,
                "deletions": score.deletions,
                "words": score.words,
                "utterances": score.n,
                "speakers": score.speakers,
                "over_speakers": int(score.over == SPEAKERS),
            }

    return Wer
