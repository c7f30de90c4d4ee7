"""The lab's score as a metric of Hugging Face's evaluate, for other people's code. Nothing is downloaded.

    from pipelines.experiments.metric import Wer

    Wer().compute(predictions=["hej då"], references=["Hej, du!"])["wer"]   # 0.5

It is `scoring.score` behind evaluate's interface: `add` and `add_batch` gather over batches, `num_process`,
`process_id` and `experiment_id` over processes. `evaluate.load` is not needed, nor does it read this file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pipelines.infra.errors import missing_package
from pipelines.speech import scoring

_DESCRIPTION = "Word and character error rate with 95 % intervals by bootstrap over speakers, on jiwer."
_INPUTS = """
`predictions` and `references`: transcripts, one for each utterance; every reference holds a word.
`compute` also takes `normalised` (True: case and punctuation set aside; False: as written) and `speakers`, one for
each utterance ('' where unknown) in the order in which they were added, those of process 0 first. Without them each
utterance counts as another speaker's, and the intervals are too narrow wherever that is not so.

Returns plain numbers, as a Trainer logs them: `wer, wer_low, wer_high, cer, cer_low, cer_high` as fractions (low to
high is the 95 % interval), `substitutions, insertions, deletions, words` (of the references), `utterances` as counts.
"""


def __getattr__(name: str) -> Any:
    """`Wer`, made when it is first asked for: evaluate takes seconds to import."""
    if name == "Wer":
        return _wer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _wer() -> type:
    try:
        import datasets
        import evaluate
    except ImportError:
        raise missing_package("evaluate", "evaluate>=0.4.5", "the metric for other people's code") from None

    class Wer(evaluate.Metric):
        __doc__ = _DESCRIPTION + _INPUTS
        __module__, __qualname__ = __name__, "Wer"

        def _info(self) -> evaluate.MetricInfo:
            texts = {name: datasets.Value("string") for name in ("predictions", "references")}
            features = datasets.Features(texts)
            return evaluate.MetricInfo(_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

        def _compute(
            self,
            predictions: Sequence[str],
            references: Sequence[str],
            speakers: Sequence[str] | None = None,
            normalised: bool = True,
        ) -> dict[str, float | int]:
            found = scoring.score(list(references), list(predictions), speakers, normalised=normalised)
            return {
                "wer": found.wer,
                "wer_low": found.ci95[0],
                "wer_high": found.ci95[1],
                "cer": found.cer,
                "cer_low": found.cer_ci95[0],
                "cer_high": found.cer_ci95[1],
                "substitutions": found.substitutions,
                "insertions": found.insertions,
                "deletions": found.deletions,
                "words": found.words,
                "utterances": found.n,
            }

    return Wer
