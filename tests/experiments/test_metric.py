from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.infra.errors import LabError
from pipelines.speech import scoring

REFERENCES = ["Hej, på dig!", "en båt", "ja", "vi ses", "å nej"]
PREDICTIONS = ["hej på", "en båt till", "ja", "vi ser", ""]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def metric(tmp_path):
    """Return `metric(**options)`, which creates the metric with its files in a temporary folder."""
    from pipelines.experiments.metric import Wer

    return lambda **told: Wer(cache_dir=str(tmp_path), **told)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("speakers", [None, ["a", "a", "b", "b", "c"]])
def test_metric_equals_scoring_score(metric, normalised, speakers):
    told = metric().compute(predictions=PREDICTIONS, references=REFERENCES, speakers=speakers, normalised=normalised)
    score = scoring.score(REFERENCES, PREDICTIONS, speakers, normalised=normalised)
    assert (told["wer"], told["wer_low"], told["wer_high"]) == (score.wer, *score.ci95)
    assert (told["cer"], told["cer_low"], told["cer_high"]) == (score.cer, *score.cer_ci95)
    assert (told["substitutions"], told["insertions"]) == (score.substitutions, score.insertions)
    assert (told["deletions"], told["words"], told["utterances"]) == (score.deletions, score.words, 5)
    assert all(type(value) in (int, float) for value in told.values()), "a Trainer logs nothing else"


def test_metric_accumulates_batches_and_single_rows(metric):
    whole, parts = metric().compute(predictions=PREDICTIONS, references=REFERENCES), metric()
    parts.add_batch(predictions=PREDICTIONS[:3], references=REFERENCES[:3])
    parts.add(prediction=PREDICTIONS[3], reference=REFERENCES[3])
    parts.add_batch(predictions=PREDICTIONS[4:], references=REFERENCES[4:])
    assert parts.compute() == whole
    assert parts.compute(predictions=["ja"], references=["ja"])["wer"] == 0, "what was computed is forgotten"


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([None, "ja"], ["ja", "ja"], "the transcript None at position 0: write an empty string"),
        (["ja", None], ["ja", "ja"], "the transcript None at position 1"),
        (["ja"], [None], "the reference None at position 0: remove that row"),
    ],
)
def test_missing_text_raises_one_line_error(metric, batch, predictions, references, message):
    made = metric()
    with pytest.raises(LabError, match=message):
        (made.add_batch if batch else made.compute)(predictions=predictions, references=references)


def test_one_speaker_is_told_from_several(metric):
    told = metric().compute(predictions=PREDICTIONS, references=REFERENCES, speakers=["me", None, "me", "me", "me"])
    assert (told["speakers"], told["over_speakers"]) == (0, 0)
    told = metric().compute(predictions=["ja"], references=["ja"])
    assert told["wer"] == 0 and told["wer_low"] != told["wer_low"], "one utterance has no interval"


def test_unscorable_input_raises_one_line_error(metric):
    with pytest.raises(LabError, match="without a word"):
        metric().compute(predictions=["ja"], references=["?!"])
    with pytest.raises(LabError, match="1 speakers"):
        metric().compute(predictions=PREDICTIONS, references=REFERENCES, speakers=["a"])


OFFLINE = """
import socket, sys

def refuse(*args):
    raise SystemExit(f"asked the network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def started(code: str, tmp_path: Path, *arguments: str) -> subprocess.Popen:
    """Start an interpreter without network and with an empty home directory that runs `code`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE + code, *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> str:
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems[-2_000:]
    return out.strip()


RANK = """
from pipelines.experiments.metric import Wer
rank = int(sys.argv[1])
heard = {0: ["hej på", "en båt till"], 1: ["ja", "vi ser", ""]}
said = {0: ["Hej, på dig!", "en båt"], 1: ["ja", "vi ses", "å nej"]}
metric = Wer(num_process=2, process_id=rank, experiment_id="two", cache_dir="shared")
metric.add_batch(predictions=heard[rank], references=said[rank])
found = metric.compute(speakers=["a", "a", "b", "b", "c"])
print("none" if found is None else repr((found["wer"], found["wer_low"], found["utterances"])))
"""


@pytest.mark.slow
def test_metric_combines_processes_offline(tmp_path):
    processes = [started(RANK, tmp_path, rank) for rank in "01"]
    score = scoring.score(REFERENCES, PREDICTIONS, ["a", "a", "b", "b", "c"])
    assert [ended(process) for process in processes] == [repr((score.wer, score.ci95[0], 5)), "none"]


TRAINER = """
import numpy as np, torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperConfig, WhisperForConditionalGeneration
from pipelines.experiments.metric import Wer

VOCABULARY = ["", "hej", "på", "dig", "du"]
metric = Wer()

def written(rows):
    return [" ".join(VOCABULARY[i] for i in row if 0 < i < 5) for row in rows]

def compute_metrics(prediction):
    return metric.compute(predictions=written(prediction.predictions), references=written(prediction.label_ids))

small = {f"{half}_{what}": 1 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
model = WhisperForConditionalGeneration(WhisperConfig(
    vocab_size=8, d_model=8, num_mel_bins=4, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=10,
    max_target_positions=8, pad_token_id=0, bos_token_id=5, eos_token_id=6, decoder_start_token_id=5,
    suppress_tokens=None, begin_suppress_tokens=None, **small))
silence = np.zeros((4, 20), np.float32)
rows = [{"input_features": silence, "labels": labels} for labels in ([1, 2, 3], [1, 4, 6], [1, 2, 3])]
arguments = Seq2SeqTrainingArguments(
    "out", per_device_eval_batch_size=2, predict_with_generate=False, use_cpu=True, report_to="none")

class Heard(Seq2SeqTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        heard = inputs["labels"].clone()
        heard[:, 1] = 2
        return torch.tensor(0.5), heard, inputs["labels"]

found = Heard(model, arguments, eval_dataset=rows, compute_metrics=compute_metrics).evaluate()
print(found["eval_wer"], found["eval_substitutions"], found["eval_words"], found["eval_wer_low"] < found["eval_wer"])
"""


@pytest.mark.slow
def test_metric_works_in_trainer_offline(tmp_path):
    """Three utterances of three, two and three words; in the second `du` is recognised as `på`."""
    assert ended(started(TRAINER, tmp_path)) == "0.125 1 8 True"


def test_unknown_module_attribute_is_an_error():
    from pipelines.experiments import metric as experiments_metric

    with pytest.raises(AttributeError, match="no attribute 'Cer'"):
        experiments_metric.Cer  # noqa: B018
