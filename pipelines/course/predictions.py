"""Checks of the notebooks' cells "predict, try, check": a prediction beside the measured value.

    PREDICTION = None                             # or a number
    predictions.check_padding(cache, PREDICTION)

Without a prediction a check only prints what was measured, so the notebooks also run in batch.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from pipelines.course import faulty_corpus
from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError
from pipelines.infra.plots import html_table
from pipelines.recipes.settings import Recipe
from pipelines.whisper.log_mel import FULL_FRAMES

if TYPE_CHECKING:
    from IPython.display import HTML


def compare(prediction: Any, measured: float, *, within: float, unit: str = "", why: str = "") -> None:
    """Print a measured value, and whether the prediction is near it.

    `within`: the greatest factor between the two, such as 1.5, if above 1; else the greatest difference. `why` is one
    sentence that explains the value; it is printed with a prediction only. Raises LabError for a prediction that is no
    number.
    """
    value = f"{measured:.3g}{unit}"
    if prediction is None or prediction is ...:
        print(f"Measured: {value}. To compare, set PREDICTION to a number and run this cell again.")
        return
    number = _number(prediction)
    low, high = (measured / within, measured * within) if within > 1 else (measured - within, measured + within)
    near = f"right within {'a factor of ' if within > 1 else ''}{within:g}"
    verdict = near if low <= number <= high else "too low" if number < low else "too high"
    print(f"You predicted {number:.3g}{unit}, measured: {value}. That is {verdict}.")
    if why:
        print(why)


def _number(prediction: Any) -> float:
    """Return a prediction as a finite number; a text such as `0,93` or `93 %` counts as one."""
    text = prediction.strip().replace(",", ".") if isinstance(prediction, str) else ""
    try:
        if isinstance(prediction, bool) or not isinstance(prediction, str | numbers.Real):
            raise TypeError
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1) if text else float(prediction)
        if math.isfinite(number):
            return number
    except (TypeError, ValueError):
        pass
    shown = " ".join(repr(prediction).split())[:40]
    raise LabError(f"PREDICTION must be a number, such as 0.5, or None for no prediction, got {shown}")


def check_padding(cache: FeatureCache, prediction: Any) -> None:
    """Check the share of padding, 0 to 1, if each clip of the cache is padded to 30 s."""
    share = 1 - cache.rows["frames"].mean() / FULL_FRAMES
    compare(prediction, share, within=0.05, why="The encoder takes as long for silence as for speech.")


def check_tokens(cache: FeatureCache, row: int, prediction: Any) -> None:
    """Check the number of tokens of a clip's transcript, without the control tokens and the end."""
    n = sum(token < cache.labels(row)[-1] for token in cache.labels(row))
    words = len(cache.rows["text"].iloc[row].split())
    why = f"The sentence has {words} words. Swedish words are rare in the vocabulary, so they need several tokens each."
    compare(prediction, n, within=1.0, unit=" tokens", why=why)


def check_curation(recipe: Recipe, prediction: Any) -> HTML:
    """Check how many clips with known faults curation finds; return the steps and the clips as two tables."""
    steps, clips = faulty_corpus.curate(recipe)
    n = sum(bool(clip["found by"]) for clip in clips)
    why = "A wrong transcript that is as long as the right one can only be found by listening, or by a model."
    compare(prediction, n, within=1.0, unit=f" of {len(clips)} faulty clips", why=why)
    return html_table(clips, as_html=["sound"], note=f"<p>The steps:</p>{html_table(steps).data}")
