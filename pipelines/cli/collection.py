"""Commands that collect speech from people, and check it with them: record and review."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import (
    LOCAL_HOSTS,
    DryRun,
    Host,
    Json,
    Overrides,
    RecipeName,
    Runs,
    load_recipe,
    print_address,
    print_plan,
)
from pipelines.cli.serving import AudioPerMinute, RequestsPerMinute, TrustedProxy
from pipelines.infra.errors import LabError
from pipelines.recipes import commands, languages

if TYPE_CHECKING:
    from pipelines.collection.record.folder import Terms
    from pipelines.inference.transcriber import Transcriber

DEFAULT_LICENCE = "CC0-1.0"
MAX_CONSENT_CHARS = 20_000

Sentences = Annotated[
    str, typer.Option(metavar="FILE|tour", help="Text file with a sentence in each line, or the tour's own sentences.")
]
TermsFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text file with words or phrases to cover first, one in each line."),
]
Count = Annotated[
    int,
    typer.Option(min=0, help="Choose this many sentences that cover terms, letters and consonant clusters; 0: all."),
]
Language = Annotated[
    str,
    typer.Option(
        callback=languages.parse_optional, help="Language of the sentences, such as sv or Swedish; default: sv."
    ),
]
Licence = Annotated[str, typer.Option(help=f"Licence that speakers agree to; default: {DEFAULT_LICENCE}.")]
Consent = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text file with the consent; default: the lab's, see the page.")
]
Model = Annotated[
    str, typer.Option("--model", help="Model that compares takes with their sentences; an empty text: none.")
]

Table = Annotated[Path, typer.Option("--to", metavar="FILE", help="Table of decisions: a new one, or one to continue.")]
ReviewClips = Annotated[int, typer.Option(min=1, help="Clips in the queue, the least believable first.")]


def record(
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the recordings: a new one, or one to continue.")
    ],
    sentences: Sentences = "tour",
    terms: TermsFile = None,
    count: Count = 0,
    language: Language = "",
    licence: Licence = "",
    consent: Consent = None,
    model: Model = "openai/whisper-tiny",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the first free one from 7860.")] = 0,
    trusted_proxy: TrustedProxy = (),
    requests_per_minute: RequestsPerMinute = None,
    audio_s_per_minute: AudioPerMinute = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Serve a page on which people read sentences aloud; the folder is then a data set.

    Example: python -m pipelines record --sentences list.txt --to my_recordings
    """
    from pipelines.collection.record import folder as take_folder
    from pipelines.inference.http import rate_limits

    listed, given = _sentences(sentences, terms, count), {"language": language, "licence": licence, "consent": consent}
    agreed = _terms(language or "sv", licence or DEFAULT_LICENCE, consent)
    default = rate_limits.default_limits(is_open=host not in LOCAL_HOSTS)
    limiter = rate_limits.RateLimiter(
        default[0] if requests_per_minute is None else requests_per_minute,
        default[1] if audio_s_per_minute is None else audio_s_per_minute,
    )
    proxies = tuple(rate_limits.parse_proxies(list(trusted_proxy)))
    to = to.expanduser()
    take_folder.read_terms(to)
    if dry_run:
        return print_plan(as_json, f"offer {len(listed)} sentences on {host}", to)
    opened, lock = take_folder.open_folder(to, agreed, [name for name, value in given.items() if value])
    from pipelines.collection.record import handlers, page
    from pipelines.collection.record.recorder import Recorder
    from pipelines.inference.app import launch

    def announce(url: str) -> None:
        following = commands.command("features", "--set", "source.kind=folder", "--set", f"source.path={to}")
        lines = f"{len(listed)} sentences for {to}\npage: {url}\nNext: {following}; Ctrl-C stops the page"
        print_address(as_json, {"url": url, "sentences": len(listed), "folder": str(to)}, lines)

    with lock:
        recorder = Recorder(listed, opened, _load_model(model, opened.terms.language))
        page_handlers = handlers.Handlers(recorder, limiter)
        launch.serve(lambda: page.build(page_handlers), announce, host=host, port=port or None, trusted_proxies=proxies)


def review(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    to: Table = Path("corrections.csv"),
    model: Annotated[str, typer.Option("--model", help="Model that judges transcripts; default: the base model.")] = "",
    clips: ReviewClips = 300,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the first free one from 7860.")] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Serve a page that plays the training clips whose transcripts are most likely wrong.

    Example: python -m pipelines review --recipe tour --to corrections.csv
    """
    from pipelines.features.curation import corrections
    from pipelines.recipes import commands

    settings = load_recipe(recipe, [*set_, "curation.corrections="])
    to = to.expanduser()
    corrections.read(to)
    if dry_run:
        return print_plan(as_json, f"play {clips} clips on {host}", to, settings)
    from pipelines.collection.review import clips as review_clips
    from pipelines.collection.review import page, queue
    from pipelines.inference.app import launch

    loaded = review_clips.load(settings, runs, model, clips)
    handlers = page.Handlers(queue.Queue(loaded.items, to, loaded.model), loaded.examples)

    def announce(url: str) -> None:
        use = commands.command("features", "--set", f"curation.corrections={to}", recipe=settings, runs=runs)
        lines = f"{len(loaded.items)} clips, decisions in {to}\npage: {url}\nNext: {use}; Ctrl-C stops the page"
        print_address(as_json, {"url": url, "clips": len(loaded.items), "table": str(to)}, lines)

    launch.serve(lambda: page.build(handlers, settings.language), announce, host=host, port=port or None)


def _sentences(name: str, terms: Path | None, count: int) -> list[str]:
    from pipelines.collection.record import sentences

    listed, words = sentences.read_sentences(name), sentences.read_terms(terms) if terms else []
    ordered = sentences.order_by_coverage(listed, words, count) if words or count else listed
    return ordered[: count or None]


def _load_model(name: str, language: str) -> Transcriber | None:
    """Return the model that compares takes with their sentences; None, with a note, if there is none."""
    from pipelines.collection.record import recorder

    def load() -> Transcriber:
        from pipelines.inference.transcriber import Transcriber
        from pipelines.whisper import model as whisper_model

        return Transcriber(whisper_model.resolve(name), language)

    return recorder.load_model(load, lambda line: print(f"note: {line}", file=sys.stderr)) if name else None


def _terms(language: str, licence: str, consent: Path | None) -> Terms:
    """Return what speakers agree to. Raises LabError for an empty licence or a consent that cannot be read."""
    from pipelines.collection.record import i18n
    from pipelines.collection.record.folder import Terms
    from pipelines.infra.tables import read_text

    licence = " ".join(licence.split())
    if not licence or len(licence) > 100:
        raise LabError(f"--licence must be a name such as CC0-1.0 or CC-BY-4.0, got {licence[:40]!r}")
    if consent is None:
        return Terms(language, licence, i18n.default_consent(licence))
    if not consent.expanduser().is_file():
        raise LabError(f"--consent must name a text file, got {str(consent)!r}, which is none")
    content = read_text(consent.expanduser()).strip()
    if not content or len(content) > MAX_CONSENT_CHARS:
        raise LabError(f"--consent must have 1 to {MAX_CONSENT_CHARS:,} characters, got {len(content):,}")
    return Terms(language, licence, dict.fromkeys(i18n.TEXTS, content))
