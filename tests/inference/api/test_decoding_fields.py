"""Fields that change how a recording is decoded: honoured or refused, never ignored."""

from __future__ import annotations

import copy
import dataclasses
import math

import httpx
import pytest

from pipelines.infra.errors import LabError
from pipelines.whisper.decoding_options import DecodingOptions
from tests.inference.api.running_server import Held, refusal, running

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("one_thread")

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


class Recorder(Held):
    """A transcriber that records its options and transcribes at once."""

    def __init__(self, like, error: Exception | None = None):
        super().__init__(like)
        self.options, self.seen, self.error = DecodingOptions(language="sv", beam_size=3), [], error
        self.let_go.set()

    def with_options(self, **changes):
        other = copy.copy(self)
        other.options = self.options.changed(**changes)
        other.language = other.options.language
        return other

    def transcribe(self, *args, **others):
        self.seen.append(self.options)
        if self.error:
            raise self.error
        return super().transcribe(*args, **others)


@pytest.fixture(scope="module")
def tuned(toy):
    """The same model as one that was tuned for Swedish."""
    tuned = copy.copy(toy)
    tuned.ref = dataclasses.replace(toy.ref, facts={**toy.ref.facts, "language": "sv"})
    return tuned


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"temperature": "0", "prompt": " ", "hotwords": "", "language": ""}, {}),
        ({"language": "auto"}, {"language": "auto"}),
        ({"prompt": " Hej på "}, {"prompt": "Hej på"}),
        ({"temperature": "0.4"}, {"temperatures": (0.4,)}),
        ({"hotwords": "Båten, New York\nÅsa,"}, {"hotwords": ("Båten", "New York", "Åsa")}),
        ({"beam_size": "5", "patience": "2", "length_penalty": "0.5"},
         {"beam_size": 5, "patience": 2.0, "length_penalty": 0.5}),
        ({"max_new_tokens": "9", "seed": "7"}, {"max_new_tokens": 9, "seed": 7}),
        ({"language": "English"}, {"language": "en"}),
        ({"task": "translate"}, {"task": "translate"}),
    ],
)  # fmt: skip
def test_fields_reach_the_decoder(toy, wav, fields, changes):
    recorder = Recorder(toy)
    with running(recorder) as url:
        answer = httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav})
        assert answer.status_code == 200, answer.text
        verbose_fields = {**fields, "response_format": "verbose_json"}
        verbose = httpx.post(url + TRANSCRIPTIONS, data=verbose_fields, files={"file": wav}).json()
    assert recorder.seen == [recorder.options.changed(**changes)] * 2
    language = {"en": "english", "auto": "auto"}.get(changes.get("language"), "swedish")
    assert verbose["task"] == changes.get("task", "transcribe")
    assert verbose["language"] == ("english" if verbose["task"] == "translate" else language)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "1.1"},
        {"temperature": "nan"},
        {"beam_size": "0"},
        {"beam_size": "33"},
        {"patience": "0"},
        {"length_penalty": "9"},
        {"max_new_tokens": "0"},
        {"seed": "-1"},
        {"prompt": "x" * 10_001},
        {"hotwords": "x" * 10_001},
        {"language": "Svedish"},
        {"task": "summarise"},
        {"include[]": "words"},
        {"best_of": "5"},
        {"vad_filter": "true"},
    ],
)
def test_value_out_of_range_names_its_field(toy, wav, fields):
    with running(Recorder(toy)) as url:
        answer = httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav})
    refusal(answer, 400, param=next(iter(fields)))


@pytest.mark.parametrize(("fields", "param"), [({"language": "en"}, "language"), ({"task": "translate"}, "task")])
def test_tuned_model_refuses_another_language_and_task(tuned, wav, fields, param):
    with running(tuned) as url:
        assert "sv" in refusal(httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav}), 400, param=param)
        assert "does not translate" in refusal(httpx.post(url + TRANSLATIONS, files={"file": wav}), 400, param="task")


def test_option_that_the_engine_lacks_is_one_line(toy, wav):
    with running(Recorder(toy, LabError("this engine has no hotwords"))) as url:
        answer = httpx.post(url + TRANSCRIPTIONS, data={"hotwords": "Åsa"}, files={"file": wav})
        assert refusal(answer, 400, code="unsupported_value") == "this engine has no hotwords"


def test_openai_client_translates(toy, wav):
    recorder = Recorder(toy)
    with running(recorder) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = {"file": ("a.wav", wav), "model": "whisper-1", "prompt": "Boats"}
        assert client.audio.translations.create(**asked).text == "hej"
        verbose = client.audio.translations.create(**asked, response_format="verbose_json")
        assert (verbose.language, verbose.task) == ("english", "translate")
        refusal(httpx.post(url + TRANSLATIONS, files={"file": wav}, data={"stream": "true"}), 400, param="stream")
    assert {(options.task, options.prompt) for options in recorder.seen} == {("translate", "Boats")}


def test_openai_client_gets_the_log_probabilities_of_words(toy, wav):
    with running(toy) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = {"file": ("a.wav", wav), "model": "whisper-1", "include": ["logprobs"]}
        transcript = client.audio.transcriptions.create(**asked)
        *deltas, done = client.audio.transcriptions.create(**asked, stream=True)
        plain = client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1")
        with pytest.raises(openai.BadRequestError, match="in json only"):
            client.audio.transcriptions.create(**asked, response_format="verbose_json")
    assert plain.logprobs is None
    assert "".join(entry.token for entry in transcript.logprobs).strip() == transcript.text != ""
    assert all(math.isfinite(entry.logprob) and entry.logprob <= 0 for entry in transcript.logprobs)
    assert all(bytes(map(int, entry.bytes)).decode() == entry.token for entry in transcript.logprobs)
    assert [entry.logprob for delta in deltas for entry in delta.logprobs] == [
        entry.logprob for entry in done.logprobs
    ] == [entry.logprob for entry in transcript.logprobs]  # fmt: skip
