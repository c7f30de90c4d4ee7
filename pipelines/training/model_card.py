"""Write the model card of a finished model: its README.md, which the Hub shows and leaderboards read.

The card is built from files in the model's folder (recipe.json, training.json, the facts of the manifest), so it can be
written again when a test score is added. It contains no local path. The YAML of its front matter is written by
huggingface_hub, and text of a recipe cannot break out of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.features.data_card.card import pseudo_labels
from pipelines.features.data_card.markdown import inline
from pipelines.infra import environment, manifest
from pipelines.infra.redact import redact_settings
from pipelines.recipes import languages
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.settings import Recipe
from pipelines.speech.intervals import CLIPS, SPEAKERS, Units
from pipelines.whisper.bases import generation
from pipelines.whisper.lineage import DATA_SOURCES, FILE, HUB_ID, data_of, origin_of
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

STOCK_DECODER = "transformers pipeline"
"""Value of `decoder` in the results of transformers' pipeline; the lab's own results have no such field."""
_LICENCES = {"openai/whisper-": "apache-2.0", "KBLab/kb-whisper-": "apache-2.0"}
"""Licences of base models on the Hub, by the prefix of their names; others are not guessed."""


def facts_of(recipe: Recipe, cache: FeatureCache, base: ModelRef) -> dict[str, Any]:
    """Return the facts of a training run for the model's manifest and card."""
    hours = cache.rows.groupby("split")["duration_s"].sum() / 3600
    speakers = cache.rows[cache.rows["speaker"] != ""].groupby("split")["speaker"].nunique()
    return {
        "base_model": _hub_id(base) or (base.facts.get("base_model") if recipe.distillation.teacher else None),
        "data": {
            split: {
                "clips": int(cache.counts.get(split, 0)),
                "hours": round(float(hours.get(split, 0.0)), 2),
                "speakers": int(speakers.get(split, 0)),
            }
            for split in ("train", "validation", "test")
        },
        **({"pseudo_labels": labelled} if (labelled := pseudo_labels(cache.rows)) else {}),
        "machine": environment.detect().device_name,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of a model that is not sealed yet; `facts` are those of its manifest."""
    (folder / FILE).write_text(_card(folder, facts), encoding="utf-8")


def refresh(folder: Path, **facts: Any) -> None:
    """Add facts to a sealed model's manifest and card; the same facts again change nothing.

    A card that a person has edited stays as it is.
    """
    sealed, added = manifest.read(folder), json.loads(json.dumps(facts))
    card, listed = folder / FILE, sealed["files"].get(FILE)
    edited = card.exists() and listed is not None and manifest.sha256(card) != listed["sha256"]
    if not card.exists() or edited:  # models of early versions have no card
        if edited and not added.items() <= sealed.items():
            logger.info(f"note: {card} was edited: the new scores are in {manifest.MANIFEST} only")
        manifest.amend(folder, **added)
    elif not (FILE in sealed["files"] and added.items() <= sealed.items()):
        manifest.replace(folder, FILE, _card(folder, {**sealed, **added}).encode(), **added)


def _card(folder: Path, facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCard

    settings, training = (json.loads((folder / name).read_text("utf-8")) for name in ("recipe.json", "training.json"))
    recipe = Recipe.model_validate(settings).model_dump(mode="json")  # adds the defaults of newer settings
    front_matter = _metadata(recipe, training, facts)
    facts = {**facts, "english_only": generation.is_english_only_folder(folder)}
    return str(ModelCard(f"---\n{front_matter}\n---\n\n{_body(recipe, training, facts)}"))


def _metadata(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = facts.get("base_model")
    datasets = [part["path"] for part in _sources(recipe) if part["kind"] == "hub" and HUB_ID.fullmatch(part["path"])]
    return ModelCardData(
        language=recipe["language"],
        license=next((name for prefix, name in _LICENCES.items() if (base or "").startswith(prefix)), None),
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "swedish-whisper-lab", *(["synthetic-speech"] if _synthetic(recipe) else [])],
        base_model=base,
        datasets=datasets or None,
        metrics=["wer", "cer"],
        model_name=facts["name"],
        eval_results=_results(recipe, training, facts),
    ).to_yaml()


def _results(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> list[Any]:
    """Return one result per metric and split, as fractions (0.25, not 25 %)."""
    from huggingface_hub import EvalResult

    def entry(split: str, data: Mapping[str, str], metric: str, name: str, value: float, **args: Any) -> EvalResult:
        return EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Speech recognition",
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_config=recipe["language"],
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args=args or None,
        )

    data, best = data_of(recipe["source"]), training["validation"]
    interval = {"ci95": [best["eval_wer_low"], best["eval_wer_high"]]} if "eval_wer_low" in best else {}
    known = ((facts.get("data") or {}).get("validation") or {}).get("speakers", 2)
    interval |= {"over": CLIPS} if interval and known < 2 else {}
    results = [entry("validation", data, "wer", "WER, normalised", best["eval_wer"], **interval)]
    test, raw, test_data = facts.get("test"), facts.get("test_raw"), facts.get("test_data") or data
    scored = facts.get("test_scored") or {}  # test_set and normaliser, for leaderboards
    if test:
        results.append(entry("test", test_data, "wer", "WER, normalised", test["wer"], **_interval(test), **scored))
        results.append(entry("test", test_data, "cer", "CER, normalised", test["cer"]))
    if test and raw:
        plain = {**scored, "normaliser": "none"} if scored else {}
        results.append(entry("test", test_data, "wer", "WER, as written", raw["wer"], **_interval(raw), **plain))
    if stock := facts.get("test_stock"):  # on a sample of the clips, which has a separate digest
        score, names = stock["score"], {name: stock[name] for name in ("test_set", "normaliser")}
        args = {**_interval(score), **names, "n": score["n"], "decoder": STOCK_DECODER}
        results.append(entry("test", test_data, "wer", "WER, normalised, in the stock pipeline", score["wer"], **args))
    return results


def _interval(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the interval of a stored score, and what it resamples if that is not speakers."""
    over = {"over": CLIPS} if Units.of(score).over == CLIPS else {}
    return {"ci95": list(score["ci95"]), **over} if score["ci95"] else {}


def _body(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    language = languages.NAMES[recipe["language"]].title()
    base = f"`{facts['base_model']}`" if facts.get("base_model") else "A private base model"
    quantised = f" ({facts['quantisation']})" if facts.get("quantisation") else ""
    code = "" if facts["english_only"] else f'"language": "{recipe["language"]}", "task": "transcribe"'
    return f"""# {facts["name"]}

{base}{quantised}, tuned to transcribe {language} in the Swedish Whisper lab.

## Scores

| split | data | metric | value | 95 % interval |
|---|---|---|---|---|
{_score_lines(recipe, training, facts)}

Normalised: without case and punctuation. The checkpoint was selected on validation, so that score is optimistic.
Intervals are bootstrapped over speakers unless noted.{_decoded(facts)}{_guards(facts)}

## How to use it

```python
from transformers import pipeline

transcribe = pipeline("automatic-speech-recognition", model="path or name of this model")
print(transcribe("speech.wav", return_timestamps=True, generate_kwargs={{{code}}})["text"])
```

## Data

{_data_lines(recipe, facts)}

The speech itself is not part of this repository.

## Training

{_training_line(recipe, training, facts)}{_merge(facts)}

<details>
<summary>The whole recipe</summary>

```toml
{_recipe_lines(recipe)}
```

</details>

## Limits

{_limits(recipe, facts)}
"""


def _decoded(facts: Mapping[str, Any]) -> str:
    """Return how the test clips were decoded; empty for models that were scored by older versions."""
    decoding = facts.get("test_decoding")
    lab = f" Test clips were decoded by {inline(decoding)}." if decoding else ""
    return lab + _in_stock_pipeline(facts)


def _in_stock_pipeline(facts: Mapping[str, Any]) -> str:
    """Return what the score in transformers' pipeline means; empty if it was not scored."""
    stock = facts.get("test_stock")
    if not stock:
        return ""
    return (
        f"\n\nThe stock pipeline is transformers' `pipeline` as below, without timestamps. On {stock['score']['n']} "
        f"test clips it makes {stock['score']['wer']:.3f} errors per word, this lab {stock['lab']['wer']:.3f}: "
        f"{inline(stock['verdict'])}."
    )


def _guards(facts: Mapping[str, Any]) -> str:
    """Return the table of guard sets, for a model that was scored on some."""
    if not (guards := facts.get("guards")):
        return ""
    rows = []
    for guard in guards:
        low_high = Units(guard["over"], guard["n"], guard["speakers"]).interval(guard["ci95"], "{:+.3f}")
        broken = guard["delta"] > guard["max_increase"]
        verdict = f"{'**violated**' if broken else 'kept'}: at most {guard['max_increase']:+.3f}"
        wers = f"{guard['before']:.3f} | {guard['after']:.3f} | {guard['delta']:+.3f} ({low_high})"
        rows.append(f"| {inline(guard['name'])} ({guard['language']}) | {wers} | {verdict} |")
    table = "\n".join(["| guard set | base model | this model | increase (95 %) | |", "|---|---|---|---|---|", *rows])
    return f"\n\nWhat tuning should not forget:\n\n{table}"


def _score_lines(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    lines = []
    for result in _results(recipe, training, facts):
        low_high = (result.metric_args or {}).get("ci95")
        units = Units((result.metric_args or {}).get("over", SPEAKERS), 0, 0)
        interval = units.interval(low_high) if low_high else ""
        split, data = result.dataset_split, inline(result.dataset_name)
        lines.append(f"| {split} | {data} | {result.metric_name} | {result.metric_value:.3f} | {interval} |")
    if not facts.get("test"):
        lines.append("| test | | | not scored yet | |")
    return "\n".join(lines)


def _data_lines(recipe: dict[str, Any], facts: Mapping[str, Any]) -> str:
    counts = facts.get("data") or {}
    lines = [
        f"- {split}: {size['clips']} clips, {size['hours']:.2f} hours"
        + (f", {Units(SPEAKERS, 0, size['speakers']).who}" if "speakers" in size else "")
        for split, size in counts.items()
    ]
    for one in facts.get("pseudo_labels") or ():
        size = f"{one['clips']} clips, {one['hours']:.2f} hours"
        lines.append(
            f"- of the training clips, {size} have pseudo-labels: {inline(one['model'])} wrote their transcripts"
        )
    for source in _sources(recipe):
        name = data_of(source)["name"]
        terms = DATA_SOURCES.get(source["kind"], ("", "For its terms see its own card on the Hub."))[1]
        lines.append(f"- from {inline(name)}. {terms}")
    return "\n".join(lines)


def _merge(facts: Mapping[str, Any]) -> str:
    """Return what a mixture of models was made of; empty for a trained model."""
    if not (merge := facts.get("merge")):
        return ""
    parents = ", ".join(inline(parent["name"]) for parent in merge["parents"])
    return (
        f"\n\nThe weights are a mixture, selected on validation clips: {merge['alpha']:g} times the mean of {parents}, "
        f"and {1 - merge['alpha']:g} times the base model. The line above describes the first of them."
    )


_DECAY = {"linear": "linear decay to 0", "cosine": "cosine decay to 0", "constant": "constant"}


def _training_line(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    settings, tuned = recipe["training"], recipe["model"]
    weights = {"": "all weights", "lora": "LoRA, merged into the weights"}[tuned["adapter"]]
    frozen = ", the encoder frozen" if tuned["freeze_encoder"] else ""
    start = f", by the teacher {inline(facts['base'])}, from whose layers it started" if facts.get("teacher") else ""
    start += f", from {inline(origin_of(facts))}" if facts.get("fork") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    machine = inline(facts.get("machine") or "an unnamed machine")
    decay = _DECAY[settings.get("scheduler", "linear")]
    steps = max((row["step"] for row in training["history"]), default=training["best_step"])
    return (
        f"{steps} steps of {settings['batch_size'] * settings['accumulation']} clips, {weights}{frozen}{start}; "
        f"learning rate {settings['learning_rate']:g} after {settings['warmup_steps']} warm-up steps, {decay}; "
        f"seed {settings['seed']}; best checkpoint on validation: step {training['best_step']}. "
        f"{training['seconds'] / 60:.1f} minutes on {machine}; {versions}." + _derived(facts)
    )


def _derived(facts: Mapping[str, Any]) -> str:
    values = ", ".join(f"`{name}` {value}" for name, value in (facts.get("derived") or {}).items())
    return f" Derived from the number and length of the clips: {values}." if values else ""


def _recipe_lines(recipe: dict[str, Any]) -> str:
    """Return all settings, one line each, without local paths."""
    public = flatten(redact_settings(recipe))
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in public.items())


def _limits(recipe: dict[str, Any], facts: Mapping[str, Any]) -> str:
    lines = ["- It may write fluent but wrong sentences for unclear speech, and words that were not spoken."]
    lines += [f"- Of the test scores: {inline(caveat)}." for caveat in facts.get("test_caveats") or ()]
    if _synthetic(recipe):
        lines.append("- Its speech was synthetic: the scores do not apply to human speech.")
    else:
        lines.append("- For voices, accents, rooms and subjects that are not in its data it is worse than the scores.")
    if facts.get("context") == "clip":
        lines.append(
            "- It was tuned and scored at the length of its clips, not at Whisper's 30 s. Tools that pad every clip to "
            f"30 s, as the pipeline above does, give other scores{': see above' if facts.get('test_stock') else ''}."
        )
        if not recipe["training"]["window_share"]:
            lines.append(
                "- It was trained on single clips. Without timestamps (`return_timestamps=False` in the pipeline, "
                "`without_timestamps=True` in faster-whisper) it often ends after the first sentence of a recording."
            )
    if facts.get("quantisation"):
        lines.append("- It was tuned from quantised weights of the base model.")
    return "\n".join(lines)


def _sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    source = recipe["source"]
    return source["parts"] if source["kind"] == "mix" else [source]


def _synthetic(recipe: dict[str, Any]) -> bool:
    return all(source["kind"] in ("tour", "tour-english", "planted") for source in _sources(recipe))


def _hub_id(base: ModelRef) -> str | None:
    """Return the base model's id on the Hub, None if it is in a folder or has no such id."""
    name = base.name.removeprefix("hub://").partition("@")[0]
    return name if base.origin != "folder" and HUB_ID.fullmatch(name) else None
