"""The card of a finished model: its README.md, which the Hub shows and leaderboards read.

It is made of what the model's folder holds (recipe.json, training.json, the manifest's facts), so it can be written
anew when a test score is added. It names no folder of this machine, nor does what is published beside it; nothing in a
recipe can break out of its YAML.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest
from pipelines.infra.redact import redact_settings
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.settings import Recipe
from pipelines.whisper.lineage import _DATA, _HUB_ID, FILE, data_of
from pipelines.whisper.model import ModelRef

_LICENCES = {"openai/whisper-": "apache-2.0", "KBLab/kb-whisper-": "apache-2.0"}
"""First letters of base models on the Hub, and their licence there; others are not guessed."""


def facts_of(recipe: Recipe, cache: FeatureCache, base: ModelRef) -> dict[str, Any]:
    """What the card tells that only the training run knows: kept in the model's manifest."""
    hours = cache.rows.groupby("split")["duration_s"].sum() / 3600
    return {
        "base_model": _hub_id(base) or (base.facts.get("base_model") if recipe.distillation.teacher else None),
        "data": {
            split: {"clips": int(cache.counts.get(split, 0)), "hours": round(float(hours.get(split, 0.0)), 2)}
            for split in ("train", "validation", "test")
        },
        "machine": environment.detect().device_name,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put the card into the folder of a model that is not sealed yet; `facts` is what its manifest will hold."""
    (folder / FILE).write_text(_card(folder, facts), encoding="utf-8")


def refresh(folder: Path, **facts: Any) -> None:
    """Add facts to a sealed model's manifest and write its card anew, where it has one; told again, nothing changes."""
    sealed, told = manifest.read(folder), json.loads(json.dumps(facts))
    if not (folder / FILE).exists():  # a model from before there were cards
        manifest.amend(folder, **told)
    elif not (FILE in sealed["files"] and told.items() <= sealed.items()):
        manifest.replace(folder, FILE, _card(folder, {**sealed, **told}).encode(), **told)


def _card(folder: Path, facts: Mapping[str, Any]) -> str:
    told, training = (json.loads((folder / name).read_text("utf-8")) for name in ("recipe.json", "training.json"))
    recipe = Recipe.model_validate(told).model_dump(mode="json")  # settings that came later are at their defaults
    return f"---\n{_metadata(recipe, training, facts)}\n---\n\n{_body(recipe, training, facts)}"


# ---- the front matter


def _metadata(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = facts.get("base_model")
    datasets = [part["path"] for part in _sources(recipe) if part["kind"] == "hub" and _HUB_ID.fullmatch(part["path"])]
    return ModelCardData(
        language=recipe["language"],
        license=next((told for begins, told in _LICENCES.items() if (base or "").startswith(begins)), None),
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
    """One entry per metric and split, in shares (0.25, not 25 %), as the lab's reports have them."""
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

    own, best = data_of(recipe["source"]), training["validation"]
    interval = {"ci95": [best["eval_wer_low"], best["eval_wer_high"]]} if "eval_wer_low" in best else {}
    results = [entry("validation", own, "wer", "WER, normalised", best["eval_wer"], **interval)]
    test, raw, of = facts.get("test"), facts.get("test_raw"), facts.get("test_data") or own
    scored = facts.get("test_scored") or {}  # test_set, normaliser: what a leaderboard compares by
    if test:
        results.append(entry("test", of, "wer", "WER, normalised", test["wer"], ci95=list(test["ci95"]), **scored))
        results.append(entry("test", of, "cer", "CER, normalised", test["cer"]))
    if test and raw:
        plain = {**scored, "normaliser": "none"} if scored else {}
        results.append(entry("test", of, "wer", "WER, as written", raw["wer"], ci95=list(raw["ci95"]), **plain))
    return results


# ---- the text


def _body(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    language = "Swedish" if recipe["language"] == "sv" else f"`{recipe['language']}`"
    base = f"`{facts['base_model']}`" if facts.get("base_model") else "A model of the trainer's own"
    quantised = f" ({facts['quantisation']})" if facts.get("quantisation") else ""
    code = f'"language": "{recipe["language"]}", "task": "transcribe"'
    return f"""# {facts["name"]}

{base}{quantised}, tuned to transcribe {language} in the Swedish Whisper lab.

## Scores

| split | data | metric | value | 95 % interval |
|---|---|---|---|---|
{_score_lines(recipe, training, facts)}

Normalised: case and punctuation set aside. The validation split chose the checkpoint, so its figure is flattered.
Intervals are bootstrapped over speakers.

## How to use it

```python
from transformers import pipeline

transcribe = pipeline("automatic-speech-recognition", model="path or name of this model")
print(transcribe("speech.wav", generate_kwargs={{{code}}})["text"])
```

## Data

{_data_lines(recipe, facts)}

The speech itself is not part of this repository.

## Training

{_training_line(recipe, training, facts)}

<details>
<summary>The whole recipe</summary>

```toml
{_recipe_lines(recipe)}
```

</details>

## Limits

{_limits(recipe, facts)}
"""


def _score_lines(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    lines = []
    for result in _results(recipe, training, facts):
        low_high = (result.metric_args or {}).get("ci95")
        told = "{:.3f} to {:.3f}".format(*low_high) if low_high else ""
        split, data = result.dataset_split, _inline(result.dataset_name)
        lines.append(f"| {split} | {data} | {result.metric_name} | {result.metric_value:.3f} | {told} |")
    if not facts.get("test"):
        lines.append("| test | | | not scored yet | |")
    return "\n".join(lines)


def _data_lines(recipe: dict[str, Any], facts: Mapping[str, Any]) -> str:
    counts = facts.get("data") or {}
    lines = [f"- {split}: {told['clips']} clips, {told['hours']:.2f} hours" for split, told in counts.items()]
    for source in _sources(recipe):
        name = data_of(source)["name"]
        terms = _DATA.get(source["kind"], ("", "For its terms see its own card on the Hub."))[1]
        lines.append(f"- from {_inline(name)}. {terms}")
    return "\n".join(lines)


_FALLS = {"linear": "falling in a line to 0", "cosine": "falling in a half cosine to 0", "constant": "constant"}


def _training_line(recipe: dict[str, Any], training: dict[str, Any], facts: Mapping[str, Any]) -> str:
    settings, tuned = recipe["training"], recipe["model"]
    what = {"": "all weights", "lora": "LoRA, merged into the weights"}[tuned["adapter"]]
    frozen = ", the encoder frozen" if tuned["freeze_encoder"] else ""
    taught = f", by the teacher {_inline(facts['base'])}, whose layers it began with" if facts.get("teacher") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    machine = _inline(facts.get("machine") or "an unnamed machine")
    falls = _FALLS[settings.get("scheduler", "linear")]
    steps = max((row["step"] for row in training["history"]), default=training["best_step"])
    return (
        f"{steps} steps of {settings['batch_size'] * settings['accumulation']} clips, {what}{frozen}{taught}; learning "
        f"rate {settings['learning_rate']:g} after {settings['warmup_steps']} warm-up steps, {falls}; "
        f"seed {settings['seed']}; the best checkpoint on validation is that of step {training['best_step']}. "
        f"{training['seconds'] / 60:.1f} minutes on {machine}; {versions}."
    )


def _recipe_lines(recipe: dict[str, Any]) -> str:
    """Every setting, as `python -m pipelines recipe` prints it, without the places on the trainer's machine."""
    public = flatten(redact_settings(recipe))
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in public.items())


def _limits(recipe: dict[str, Any], facts: Mapping[str, Any]) -> str:
    lines = ["- It writes fluent sentences where it hears badly, and sometimes words that nobody said."]
    if _synthetic(recipe):
        lines.append("- Its speech was synthetic: the scores say nothing about how well it understands people.")
    else:
        lines.append(
            "- It understands voices, accents, rooms and subjects that its data lacks worse than the scores say."
        )
    if facts.get("context") == "clip":
        lines.append(
            "- It was tuned at the length of its clips, not at Whisper's 30 s. The scores are made so; tools that pad "
            "every clip to 30 s, as the pipeline above does, may find others."
        )
        if not recipe["training"]["window_share"]:
            lines.append("- No recording longer than a clip was trained on: cut long ones into sentences first.")
    if facts.get("quantisation"):
        lines.append("- It was tuned from weights that had been quantised: not the base model's own.")
    return "\n".join(lines)


# ---- what may be told


def _sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    source = recipe["source"]
    return source["parts"] if source["kind"] == "mix" else [source]


def _synthetic(recipe: dict[str, Any]) -> bool:
    return all(source["kind"] in ("tour", "planted") for source in _sources(recipe))


def _hub_id(base: ModelRef) -> str | None:
    """The base model's id on the Hub; None for one that lies in a folder or has no such id."""
    name = base.name.removeprefix("hub://").partition("@")[0]
    return name if base.origin != "folder" and _HUB_ID.fullmatch(name) else None


def _inline(told: str) -> str:
    """Text that stays within its line and its cell, whatever it holds."""
    plain = html.escape(" ".join(told.split()), quote=False)
    return re.sub(r"[|`\[\]*_<>]", lambda sign: f"&#{ord(sign[0])};", plain)
