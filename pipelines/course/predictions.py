"""Checks of the notebooks' cells "predict, try, check": a prediction beside the measured value.

    PREDICTION = None                             # or a number
    predictions.check_padding(cache, PREDICTION)

Without a prediction a check only prints what was measured, so the notebooks also run in batch.
"""

from __future__ import annotations

import math
import numbers
import timeit
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.course import faulty_corpus
from pipelines.experiments import figures as score_figures
from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.compare import Comparison
from pipelines.experiments.evaluation import EvalReport
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import Example
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.infra.plots import html_table
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio, audio_cells, audio_uri, scoring
from pipelines.speech.alignment import marked
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.training import figures as training_figures
from pipelines.training.validation import token_losses
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure

_MAX_BYTES_ON_CPU = 1_000_000_000
"""Largest weights that a check loads without a GPU: those of whisper-small."""
_BAR = 40
"""Characters of the longest bar."""
_SAME = 5e-4
"""Word error rates that differ by less are equal."""


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


def print_bars(values: Mapping[str, float], form: str, unit: str = "") -> None:
    """Print one bar per value, 0 or more, the longest for the largest; `form` and `unit` are those of the numbers."""
    width, largest = max(map(len, values)), max(*values.values(), 1e-9)
    for name, value in values.items():
        print(f"{name:<{width}}  {'█' * max(1, round(_BAR * value / largest))} {value:{form}}{unit}")


def _number(prediction: Any, name: str = "PREDICTION") -> float:
    """Return a prediction as a finite number; a text such as `0,93` or `93 %` counts as one."""
    text = prediction.strip().replace(",", ".") if isinstance(prediction, str) else ""
    try:
        if isinstance(prediction, bool) or not isinstance(prediction, str | numbers.Real):
            raise TypeError
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1) if text else float(prediction)
        if math.isfinite(number):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    shown = " ".join(repr(prediction).split())[:40]
    none = ", or None for no prediction" if name == "PREDICTION" else ""
    raise LabError(f"{name} must be a number, such as 0.5{none}, got {shown}")


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


def check_curation(recipe: Recipe, prediction: Any) -> HTML | None:
    """Check how many clips with known faults curation finds; return the clips and the steps as two tables.

    Prints why, and returns None, if eSpeak NG cannot speak the clips on this machine.
    """
    try:
        steps, clips = faulty_corpus.curate(recipe)
    except LabError as error:
        print(f"This part is left out: {error}")
        return None
    n = sum(bool(clip["found by"]) for clip in clips)
    why = "A wrong transcript that is as long as the right one can only be found by listening, or by a model."
    compare(prediction, n, within=1.0, unit=f" of {len(clips)} faulty clips", why=why)
    return html_table(clips, as_html=["sound"], note=f"<p>The steps:</p>{html_table(steps).data}")


def check_padding_time(recipe: Recipe, cache: FeatureCache, prediction: Any) -> None:
    """Check how many times as long the encoder takes for a clip padded to 30 s as for the same clip as it is."""
    import torch

    base, device = whisper_model.resolve(recipe.model.base), environment.detect().device
    if not _is_affordable(base):
        return
    model = whisper_model.load(base, device=device).eval()
    rows = cache.split("train")[:1].tolist()

    def shortest_s(full_context: bool, tries: int) -> float:
        features = Collator(cache, full_context=full_context)(rows)["input_features"].to(device)
        with torch.inference_mode():
            # reading a number waits for the GPU
            return min(timeit.repeat(lambda: float(model.model.encoder(features)[0].sum()), number=1, repeat=tries))

    short_s, long_s = shortest_s(False, 5), shortest_s(True, 1 if device == "cpu" else 3)  # first calls are slow
    print_bars({"one clip at its length": short_s, "the same clip, padded to 30 s": long_s}, ".3f", " s")
    why = "Attention grows with the square of the length; what does not grow at all is the overhead of each call."
    compare(prediction, long_s / short_s, within=1.7, unit=" times", why=why)


def check_wer(my_wer: float, report: EvalReport) -> None:
    """Check a student's word error rate of a report's transcripts, without case and punctuation."""
    number, expected = _number(my_wer, "my_wer"), report.score.wer
    if abs(number - expected) < _SAME:
        print(f"Right: the lab has {expected:.3f}, too.")
        return
    table, score = report.predictions, report.score
    n_written = score.words + score.insertions - score.deletions
    mistakes = (
        (report.raw.wer, "This is the WER as written. Remove case and punctuation first, on both sides."),
        (table["wer"].mean(), "This is the mean of the clips' rates. Divide all errors by all words."),
        (
            expected * score.words / max(1, n_written),
            "You divided by the words of the transcripts. Divide by those of the references.",
        ),
    )
    hints = [hint for wrong, hint in mistakes if abs(number - wrong) < _SAME]
    print(f"Not yet: you have {number:.3f}, the lab has {expected:.3f}. {' '.join(hints[:1])}".rstrip())


def check_token_losses(recipe: Recipe, cache: FeatureCache, model_uri: str, prediction: Any) -> Figure | None:
    """Check the mean loss per token of one validation clip after training; return the losses of its tokens as a plot.

    The clip is the one with the most tokens per word, whose words are the rarest.
    """
    rows = cache.split("validation")
    row = int(max(rows, key=lambda row: len(cache.labels(row)) / len(cache.rows["text"].iloc[row].split())))
    models = [whisper_model.resolve(uri) for uri in (recipe.model.base, model_uri)]
    if not all(map(_is_affordable, models)):
        return None
    before, after = (token_losses(model, cache, row, environment.detect().device) for model in models)
    print(f"“{cache.rows['text'].iloc[row]}”: {before.mean():.2f} per token before training.")
    why = "Language, task and end are easy. What is left is in the pieces of rare words."
    compare(prediction, float(after.mean()), within=2.0, unit=" per token", why=why)
    tokenizer = whisper_model.processor(recipe).tokenizer
    pieces = [tokenizer.decode([token]).replace(" ", "␣") for token in cache.labels(row)]
    return training_figures.token_losses(pieces, before, after)


def _is_affordable(ref: ModelRef) -> bool:
    """Return whether a model is small enough to be loaded for a check here; print a sentence if it is not."""
    size = sum(path.stat().st_size for path in ref.folder.glob("*.safetensors"))
    if environment.detect().device == "cpu" and size > _MAX_BYTES_ON_CPU:
        print(f"This part is left out: {ref.title} is too large for it without a GPU.")
        return False
    return True


def check_wait(base: Transcriber, tuned: Transcriber, example: Example, prediction: Any) -> None:
    """Check how many times as long the base model takes to transcribe an example as the tuned model."""

    def shortest_s(transcriber: Transcriber, tries: int) -> float:
        return min(timeit.repeat(lambda: transcriber.transcribe(example.audio), number=1, repeat=tries))

    base_s, tuned_s = shortest_s(base, 1), shortest_s(tuned, 3)  # both have transcribed clips above
    print(f"{audio.decode(example.audio).duration_s:.1f} s of speech take:")
    print_bars({"base": base_s, "tuned": tuned_s}, ".2f", " s")
    why = "The base model needs all 30 s of input; the tuned one computes only the clip."
    compare(prediction, base_s / tuned_s, within=1.5, unit=" times", why=why)


def check_noise(
    transcriber: Transcriber, examples: Sequence[Example], prediction: Any, snr_db: float = 10.0
) -> HTML | None:
    """Check the WER of examples with white noise at `snr_db` decibels; return clean and noisy ones as a table.

    Prints which examples are left out because they cannot be decoded or scored; returns None if no one is left.
    """
    random, rows, texts, said = np.random.default_rng(0), [], [], []
    for example in examples:
        try:
            clean = audio.decode(example.audio).samples
            scoring.count_edits([example.text], [""])
        except LabError as error:
            print(f"{example.id} is left out: {error}")
            continue
        power = float(np.mean(clean**2)) / 10 ** (snr_db / 10)
        noisy = (clean + np.sqrt(power) * random.standard_normal(len(clean))).astype(np.float32)
        texts.append([transcriber.transcribe(Waveform(samples)).text for samples in (clean, noisy)])
        said.append(example.text)
        sound = audio_uri.player(audio_cells.encode(noisy, SAMPLE_RATE_HZ))
        clean_text, noisy_text = (marked(example.text, text) for text in texts[-1])
        rows.append({"with noise": sound, "said": example.text, "clean": clean_text, "noisy": noisy_text})
    if not said:
        return print("There is no clip that can be scored.")
    edits = [scoring.count_edits(said, list(column)) for column in zip(*texts, strict=True)]
    clean_wer, wer = (float(one.word_edits.sum() / one.words.sum()) for one in edits)
    print(f"WER of these {len(said)} clips:")
    print_bars({"without noise": clean_wer, "with noise": wer}, ".2f")
    why = "A model learns to ignore noise from training clips with noise; those of the tour have almost none."
    compare(prediction, wer, within=0.15, why=why)
    return html_table(rows, as_html=["with noise", "clean", "noisy"])


def check_speakers(comparison: Comparison, prediction: Any) -> None:
    """Check for how many speakers the second experiment has a lower WER than the baseline, over all seeds."""
    speakers = lookup.utterances([finding.experiment for finding in comparison.findings])["speaker"]
    if speakers.eq("").all():
        return print("The speakers of this test set are unknown.")
    baseline, other = (
        pd.Series(np.mean([edits.word_edits for edits in finding.experiment.edits], axis=0))
        .groupby(speakers[speakers != ""])
        .sum()
        .round(6)  # a mean over seeds is not exact
        for finding in comparison.findings[:2]
    )
    better, equal = int((other < baseline).sum()), int((other == baseline).sum())
    print(f"{len(other)} speakers: {better} better, {equal} equal, {len(other) - better - equal} worse.")
    why = "If the change did nothing, about half of the speakers would gain, as with coins."
    compare(prediction, better, within=1.0, unit=" speakers", why=why)


def check_detectable(comparison: Comparison, prediction: Any) -> Figure | None:
    """Check how large a true difference must be for this test set to show it in four of five experiments.

    Return the share of experiments that show a difference, over its size, as a plot.
    """
    could_show = comparison.findings[1].could_show
    if could_show is None:
        return print("There are too few speakers in this test set to show any difference.")
    if could_show == 0:
        return print("Both models make the same number of errors for every speaker: no size can be computed from that.")
    why = "A smaller effect needs more speakers: four times as many for half the difference."
    compare(prediction, could_show, within=1.5, why=why)
    return score_figures.power_curve(could_show, comparison.findings[1].difference.delta)
