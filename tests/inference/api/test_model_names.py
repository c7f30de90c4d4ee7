"""Names of models, and the prefix of a proxy."""

from __future__ import annotations

import httpx
import pytest

from pipelines.cli import serving
from pipelines.inference.api.middleware import Access
from pipelines.inference.api.model_names import ALIASES, parse_aliases
from pipelines.infra.errors import LabError
from tests.inference.api.running_server import refusal, running

PATH = "/v1/audio/transcriptions"


def test_names_that_clients_send_and_the_operators_are_accepted(toy, wav):
    with running(toy, aliases=["min/modell"]) as url, httpx.Client(base_url=url) as client:
        for name in (*ALIASES, "min/modell", "toy-whisper"):
            assert client.get(f"/v1/models/{name}").json()["id"] == "toy-whisper", name
        answer = httpx.post(url + PATH, files={"file": wav}, data={"model": "min/modell"})
        assert answer.status_code == 200


def test_unknown_name_gets_the_list_of_accepted_ones(toy, wav):
    with running(toy, aliases=["min-modell"]) as url:
        for answer in (
            httpx.post(url + PATH, files={"file": wav}, data={"model": "gpt-4o-transcribe-diarize"}),
            httpx.get(f"{url}/v1/models/gpt-4o"),
        ):
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            message = answer.json()["error"]["message"]
            assert "accepts toy-whisper, min-modell, whisper-1, " in message and "\n" not in message


@pytest.mark.parametrize("name", ["", "två ord", "a\nb", "x" * 101, "å"])
def test_alias_that_is_no_name_is_refused(name):
    with pytest.raises(LabError, match="--alias takes a model name"):
        parse_aliases([name])


def test_prefix_of_a_proxy_may_be_there_or_not(toy, wav):
    with running(toy, access=Access(token="k", root_path="/tal/api")) as url:
        key = {"Authorization": "Bearer k"}
        for prefix in ("", "/tal/api"):
            assert httpx.get(f"{url}{prefix}/health").status_code == 200
            assert httpx.post(url + prefix + PATH, files={"file": wav}, headers=key).json()["text"]
            refusal(httpx.post(url + prefix + PATH, files={"file": wav}), 401)
            assert 'href="openapi.json"' in httpx.get(f"{url}{prefix}/docs").text
        assert httpx.get(f"{url}/tal/apihealth", headers=key).status_code == 404
        assert httpx.get(f"{url}/tal/api/openapi.json").json()["servers"] == [{"url": "/tal/api"}]


@pytest.mark.parametrize(("given", "prefix"), [("", ""), ("/", ""), ("tal", "/tal"), ("/a/b-c/", "/a/b-c")])
def test_prefix_has_a_slash_at_its_start_only(given, prefix):
    assert serving._parse_root_path(given) == prefix


@pytest.mark.parametrize("given", ["/v1", "/health/", "/a b", "https://my.page/x", "/../x?", "/docs/a", "//"[:1] + "å"])
def test_prefix_that_cannot_be_is_refused(given):
    with pytest.raises(LabError, match="--root-path takes a prefix"):
        serving._parse_root_path(given)
