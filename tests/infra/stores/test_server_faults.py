"""Stores on a server: failed, slow and corrupted requests, and no secret in any output."""

from __future__ import annotations

import logging
import re

import pytest
from log_recorder import record_log
from servers.stores import contents
from store_artefacts import FILES, create_artefact, error_line, finished_folders

from pipelines.infra.errors import LabError

UPLOADS = {
    "hub": "PUT /lfs/|POST .*/commit/",
    "hopsworks": "POST .*/dataset/upload/",
}

DOWNLOADS = {"hub": "GET .*/resolve/.*shard-00001.bin", "hopsworks": "GET .*/with_auth/.*shard-00001.bin"}

MESSAGES = {
    "401": "does not accept the token",
    "403": "does not allow this token",
    "409": "at the same time .409.",
    "429": "slow down .429..*Wait",
    "500": "failed .500.",
    "cut upload": "broke off",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_failed_upload_is_completed_by_a_second_try(served, artefact, kind):
    first = "PUT /lfs/" if served.name == "hub" else UPLOADS["hopsworks"]
    served.server.fault(first, "slow", times=2)  # two files pass
    served.server.fault(UPLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    error_line(caught, MESSAGES[kind])
    assert not served.exists("tour")
    assert "manifest.json" not in served.files("tour")
    passed = served.uploads()
    assert passed == 2
    served.server.faults.clear()
    served.publish(artefact, "tour")
    assert contents(served.fetch("tour")) == contents(artefact)
    # an empty file is never sent apart from its commit, everything else once
    assert served.uploads() == len(FILES) + 1


@pytest.mark.parametrize("kind", ["401", "403", "429", "500"])
@pytest.mark.parametrize("doing", ["fetch", "exists", "publish", "list"])
def test_refused_requests_are_a_one_line_error(served, artefact, kind, doing):
    served.publish(artefact, "tour")
    served.server.fault(r".", kind, times=None)
    acts = {
        "fetch": lambda: served.fetch("tour"),
        "exists": lambda: served.exists("tour"),
        "publish": lambda: served.publish(artefact, "tour"),
        "list": lambda: served.store.list(served.parent),
    }
    with pytest.raises(LabError) as caught:
        acts[doing]()
    error_line(caught, MESSAGES[kind])


@pytest.mark.parametrize("kind", ["truncate", "500", "403"])
def test_failed_download_is_resumed(served, artefact, kind):
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.fetch("tour")
    error_line(caught, MESSAGES.get(kind, "broke off|damaged"))
    assert finished_folders(served) == []
    served.server.faults.clear()
    told = record_log()
    assert contents(served.fetch("tour")) == contents(artefact)
    assert not re.search("fetching 6 of 6", told[0])


def test_corrupted_download_is_an_error(served, artefact):
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], "corrupt")
    with pytest.raises(LabError) as caught:
        served.fetch("tour")
    error_line(caught, "shard-00001.bin of .* arrived damaged", "Run this again")
    assert finished_folders(served) == []
    assert contents(served.fetch("tour")) == contents(artefact)


def test_corrupted_upload_is_an_error(served, artefact):
    flag = "corrupt_commits" if served.name == "hub" else "corrupt_uploads"
    setattr(served.server, flag, True)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    error_line(caught, "does not read back")
    assert not served.exists("tour")
    setattr(served.server, flag, False)
    if served.name == "hub":
        served.server.objects.clear()
    served.publish(artefact, "tour")
    assert contents(served.fetch("tour")) == contents(artefact)


def test_interrupted_update_leaves_no_mixture(served, artefact, tmp_path):
    served.publish(artefact, "tour")
    same_sizes = {name: content[::-1] for name, content in FILES.items()}
    other = create_artefact(tmp_path / "other", same_sizes, digest="d2")
    served.server.fault("DELETE|POST .*/commit/", "slow")  # the old manifest goes
    served.server.fault("POST .*/commit/|upload/.*", "slow")  # a file, or all of them
    served.server.fault(UPLOADS[served.name], "500", times=None)
    with pytest.raises(LabError, match="failed .500."):
        served.publish(other, "tour")
    assert not served.exists("tour")
    served.server.faults.clear()
    served.publish(other, "tour")
    assert contents(served.fetch("tour")) == contents(other)


def test_corrupted_manifest_is_an_error(served, artefact):
    served.server.fault("GET .*/(resolve|with_auth)/.*manifest.json", "corrupt")
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    error_line(caught, "does not read back", "manifest.json differs")
    served.publish(artefact, "tour")


def test_slow_server_is_waited_for(served, artefact):
    served.server.fault(UPLOADS[served.name], "slow", times=3)
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], "slow")
    assert contents(served.fetch("tour")) == contents(artefact)


def test_unreachable_server_is_a_one_line_error(served, artefact):
    served.server.close()
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    error_line(caught, "broke off|did not answer")


@pytest.mark.parametrize("kind", ["401", "500", "429", "cut upload"])
def test_tokens_appear_in_no_log_message_or_file(served, artefact, kind, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "hopsworks_common", "hsml", "urllib3"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = True
    told = record_log()
    served.server.fault(UPLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    served.server.faults.clear()
    served.publish(artefact, "tour")
    fetched = served.fetch("tour")
    shown = capfd.readouterr()
    everything = [str(caught.value), caplog.text, shown.out, shown.err, *told]
    assert not [text for text in everything if served.secret in text or "Signature=5" in text]
    assert served.server.requests
    on_disk = [path for path in tmp_path.rglob("*") if path.is_file()] + [
        path for path in fetched.rglob("*") if path.is_file()
    ]
    assert not [path for path in on_disk if served.secret.encode() in path.read_bytes()]
    assert not [name for name, content in served.files("tour").items() if served.secret.encode() in content]
