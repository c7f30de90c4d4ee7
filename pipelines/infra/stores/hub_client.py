"""The client of the Hugging Face Hub: URIs, authentication, and errors as one line."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.stores import errors as store_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
"""File name of the card of a model or data set."""
_URI = re.compile(r"hub://([\w.-]+)(?:/([\w.-]+)((?:/[\w.-]+)*))?(?:@([\w./-]+))?/?")
_PUBLIC_ENDPOINT = "https://huggingface.co"
_CLIENT_LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx", "httpx2")


def parse_uri(uri: str) -> tuple[str, str, str, str]:
    """Return owner, name, path and revision of a hub:// URI; missing parts are empty."""
    match = _URI.fullmatch(uri)
    if not match or {"..", "."} & {*uri.partition("@")[0].split("/")}:
        raise LabError(f"expected hub://owner/name[/path][@revision], got {uri}")
    return match[1], match[2] or "", (match[3] or "").strip("/"), match[4] or ""


def is_repository_folder(uri: str) -> bool:
    """Return True if `uri` names a folder in a repository: hub://owner/name/path."""
    return uri.startswith("hub://") and bool(parse_uri(uri)[2])


def client() -> HfApi:
    """Return the Hub's client for the current HF_ENDPOINT, with the token of HF_TOKEN or of `hf auth login`."""
    import huggingface_hub

    if environment.hub_endpoint() != _PUBLIC_ENDPOINT:
        # other endpoints have no Xet storage; the client reads the environment variable only when it is imported
        huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    _hide_secrets_in_logs()
    return huggingface_hub.HfApi(endpoint=environment.hub_endpoint(), token=huggingface_hub.get_token() or False)


def read_model_card(uri: str) -> Any:
    """Return the front matter of a model's card (huggingface_hub.ModelCardData); invalid results are left out."""
    owner, name, path, revision = parse_uri(uri)
    with explained_errors(uri), tempfile.TemporaryDirectory() as folder:
        from huggingface_hub import ModelCard

        file = f"{path}/{CARD}" if path else CARD
        card = client().hf_hub_download(f"{owner}/{name}", file, revision=revision or None, local_dir=folder)
        return ModelCard.load(card, ignore_metadata_errors=True).data


@contextlib.contextmanager
def explained_errors(uri: str) -> Iterator[None]:
    """Raise any error of the client as a LabError about `uri`, and hide the client's progress bars."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise missing_package("huggingface_hub", "huggingface_hub>=1.27", "hub:// URIs")
    try:
        with _no_progress_bars():
            yield
    except Exception as error:
        raise store_errors.explain(error, store="the Hub", uri=uri, credential="HF_TOKEN") from None


@functools.cache
def _hide_secrets_in_logs() -> None:
    """Filter the client's log lines: it logs the URLs of retries, and those of uploads are signed."""
    for name in _CLIENT_LOGGERS:
        logging.getLogger(name).addFilter(store_errors.RedactingFilter())


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the client's progress bars: it shows one per file, and a cache has hundreds of files."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
