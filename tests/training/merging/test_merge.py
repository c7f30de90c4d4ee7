from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.experiments import pipeline as experiments
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.training import pipeline as training
from pipelines.training.merging import ingredients, merge
from pipelines.training.merging.selection import Limits, best
from pipelines.whisper.model import ModelRef

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"training.steps": 2, "training.eval_every": 1, "training.warmup_steps": 0, "evaluation.max_new_tokens": 3}
KEPT = {"training.remove_checkpoints": False, "training.keep_checkpoints": 2}
GUARD = {"guards.long": {"join_s": 6, "max_increase": 0.5, "source": {"train": 48, "validation": 8, "test": 12}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tune(toy_settings, toy_cache, runs):
    """`tune(overrides)`: the folder of a model that was trained for two steps."""
    return lambda overrides=None: training.run(toy_settings({**STEPS, **(overrides or {})}), toy_cache, runs=runs).uri


@pytest.fixture(scope="module")
def tuned(tune) -> str:
    return tune(KEPT)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


# ---- arithmetic and selection


def test_mixture_is_used_at_the_shortest_length_it_was_trained_at():
    windows, other = {"share": 0.5, "fill": "random"}, {"share": 0.2, "fill": "full"}
    long, short = {"context_s": 30.0, "windows": windows, "language": "sv"}, {"context_s": 6.5, "language": "sv"}

    def inherited(*facts):
        return merge.inherited([ModelRef("m", Path(), "folder", "", facts=one) for one in facts])

    assert inherited(long, {**long, "windows": other}) == long
    assert inherited(long, short) == short == inherited(short, long) == inherited(short)
    assert inherited({"language": "sv"}) == {"language": "sv"}


def test_mean_of_equal_weights_is_exact():
    values = {"x": torch.rand(100)}
    assert torch.equal(ingredients.average([values] * 3)["x"], values["x"])


def test_interpolation_ends_are_exact():
    base, tuned = {"x": torch.rand(9)}, {"x": torch.rand(9)}
    assert torch.equal(ingredients.interpolate(base, tuned, 0.0)["x"], base["x"])
    assert torch.equal(ingredients.interpolate(base, tuned, 1.0)["x"], tuned["x"])
    assert torch.allclose(ingredients.interpolate(base, tuned, 0.25)["x"], 0.75 * base["x"] + 0.25 * tuned["x"])


@pytest.mark.parametrize(
    ("allowed", "selected"), [(1.0, "tuned"), (0.1, "mixed"), (0.01, "base")], ids=["loose", "fair", "strict"]
)
def test_best_mixture_keeps_the_guards(allowed, selected):
    rows = {
        "tuned": {"validation": 0.2, "english": 0.9},
        "mixed": {"validation": 0.3, "english": 0.35},
        "base": {"validation": 0.8, "english": 0.3},
    }
    assert best(rows.items(), Limits(rows["base"], {"english": allowed})) == selected


def test_least_violation_is_selected_if_all_violate():
    rows = {"a": {"validation": 0.2, "english": 0.9}, "b": {"validation": 0.3, "english": 0.5}}
    limits = Limits({"english": 0.1}, {"english": 0.0})
    assert best(rows.items(), limits) == "b"
    assert limits.broken(rows["b"]) == ["english"]


# ---- whole merges


def test_mixture_with_the_base_is_a_sealed_model(toy_settings, toy_cache, toy_model, tuned, runs, monkeypatch):
    recipe = toy_settings({**STEPS, **KEPT, **GUARD})
    wers = {0.0: (0.9, 0.2), 0.5: (0.5, 0.4), 1.0: (0.3, 0.9)}
    monkeypatch.setattr(merge, "_measure", fake_measure(wers, toy_model, tuned))
    merged = merge.run(merge.plan(recipe, toy_cache, [tuned], runs=runs, alphas=(0, 0.5, 1)), runs)
    assert (merged.facts["alpha"], merged.facts["violated"]) == (0.5, [])
    base, ours = weights(toy_model), weights(tuned)
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.allclose(weights(merged.uri)[name], (base[name] + ours[name]) / 2, atol=1e-6)
    sealed = manifest.require_complete(Path(merged.uri), "model", "")
    assert (
        sealed["merge"]["parents"][0]["weights_sha256"]
        == manifest.read(Path(tuned))["files"]["model.safetensors"]["sha256"]
    )
    assert "selected on validation clips: 0.5 times the mean of" in (Path(merged.uri) / "README.md").read_text()
    monkeypatch.setattr(merge, "_measure", None)
    again = merge.run(merge.plan(recipe, toy_cache, [tuned], runs=runs, alphas=(0, 0.5, 1)), runs)
    assert again.facts == json.loads(json.dumps(merged.facts)), "a finished mixture is not scored again"


def fake_measure(wers: dict[float, tuple[float, float]], base: Path, tuned: str):
    """Return `_measure` with these WERs of target and guard, by the share of the tuned weights in the model."""
    name = "model.decoder.layers.0.fc1.weight"
    start, end = (weights(folder)[name] for folder in (base, tuned))

    def measure(job, model, *, is_base):
        share = float((model.state_dict()[name] - start).norm() / (end - start).norm())
        return dict(zip(("validation", "long"), wers[round(share, 3)], strict=True))

    return measure


@pytest.mark.slow
def test_soup_of_seeds_and_evaluation_of_it(toy_settings, toy_cache, tune, tuned, runs):
    recipe = toy_settings({**STEPS, **KEPT, **GUARD})
    other = tune({"training.seed": 43})
    merged = merge.run(merge.plan(recipe, toy_cache, [tuned, other], runs=runs), runs)
    assert set(merged.facts["scores"]) >= {"base model", "models 1", "models 2"}
    assert all(set(wers) == {"validation", "long"} for wers in merged.facts["scores"].values())
    report = experiments.evaluate(recipe, toy_cache, merged.uri, runs=runs)
    assert report.lineage["merge"]["parents"]
    assert [guard.name for guard in report.guards] == ["long"]
    assert "guard set" in (Path(merged.uri) / "README.md").read_text()
    assert "Guard sets" in report.page.read_text()


@pytest.mark.parametrize("adapter", [{}, {"model.adapter": "lora", "name": "low-rank"}], ids=["all", "lora"])
def test_last_checkpoints_are_averaged(toy_settings, toy_cache, tune, runs, adapter):
    model = tune({**KEPT, **adapter})
    recipe = toy_settings({**STEPS, **KEPT, **adapter})
    job = merge.plan(recipe, toy_cache, [str(Path(model).parent)], runs=runs, last=2)
    assert [one.name for one in job.ingredients] == ["checkpoint-2", "checkpoint-1"]
    mean = merge._Mixer(job).build(job.ingredients).state_dict()
    both = [one.weights(job.base) for one in job.ingredients]
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(mean[name], (both[0][name] + both[1][name]) / 2, atol=1e-6)
    assert not torch.equal(both[0][name], both[1][name])


# ---- refusals


@pytest.mark.parametrize(
    ("models", "options", "error"),
    [
        (["{base}"], {}, "models that the lab tuned"),
        (["{tuned}", "{tuned}"], {}, "different weights"),
        (["{tuned}", "{lora}"], {}, "same trained weights, got all weights .* LoRA matrices"),
        (["{tuned}"], {"last": 5}, "needs 5 checkpoints, .* has 2: train again"),
        (["{tuned}", "{lora}"], {"last": 2}, "takes the folder of one run, got 2"),
    ],
)
def test_models_that_do_not_mix_are_refused(
    toy_settings, toy_cache, toy_model, tune, tuned, runs, models, options, error
):
    lora = tune({"model.adapter": "lora", "name": "low-rank", **KEPT}) if "{lora}" in models else ""
    uris = [uri.format(base=toy_model, tuned=tuned, lora=lora) for uri in models]
    with pytest.raises(LabError, match=error) as caught:
        merge.plan(toy_settings(STEPS), toy_cache, uris, runs=runs, **options)
    assert "\n" not in str(caught.value)


def test_model_of_another_base_is_refused(toy_settings, toy_cache, toy_of_width, tuned, runs):
    recipe = toy_settings({**STEPS, "model.base": str(toy_of_width(64))})
    with pytest.raises(LabError, match="was tuned from .* set model.base"):
        merge.plan(recipe, toy_cache, [tuned], runs=runs)


@pytest.mark.parametrize("alphas", ["2", "a", "0.5,-1", "nan"])
def test_wrong_alphas_are_one_line(alphas):
    result = CliRunner().invoke(app, ["merge", "x", "--alphas", alphas, "--dry-run"])
    assert str(result.exception).startswith("--alphas takes numbers from 0 to 1")
