"""The estimate of memory equals the count of real tensors, and the settings that it names make a recipe fit."""

from __future__ import annotations

import contextlib
import gc
import json

import pytest
from transformers import WhisperConfig

from pipelines.infra.errors import LabError
from pipelines.training.memory import advice, base_config, estimate, report, simulation
from pipelines.training.memory.advice import Device
from pipelines.training.memory.estimate import BatchShape, Workload, changed, count_step
from pipelines.training.memory.simulation import LiveBytes

pytestmark = pytest.mark.usefixtures("one_thread")
WORK = Workload((BatchShape(4, 400, 30),), BatchShape(2, 200, 12), 16)


@pytest.fixture(scope="module")
def config(toy_model):
    """Configuration of the toy, with two layers in each half."""
    return estimate._resized(WhisperConfig.from_pretrained(toy_model), 2, 2)


@pytest.mark.parametrize(
    "kind",
    [
        {"training.optimizer": "sgd", "training.accumulation": 2},
        {"training.checkpoint_activations": True},
        {"model.freeze_encoder": True, "training.optimizer": "adafactor"},
        {"model.adapter": "lora", "model.lora_dropout": 0.1},
        {"training.optimizer": "muon", "model.layer_drop": 0.5, "training.layer_decay": 0.9},
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_tensors_are_counted_like_real_ones(toy_settings, config, monkeypatch, kind, dtype):
    arguments = toy_settings(kind), config, WORK.shapes[0], WORK, dtype, "training.accumulation" in kind
    fake = count_step(*arguments)
    monkeypatch.setattr(simulation, "simulated", contextlib.nullcontext)
    real = count_step(*arguments)
    assert fake == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(3, 2), (4, 5)])
def test_layers_are_extended_exactly(toy_settings, config, layers):
    larger, recipe = estimate._resized(config, *layers), toy_settings({"training.checkpoint_activations": True})
    whole = count_step(recipe, larger, WORK.shapes[0], WORK, "bfloat16", False)
    extended = estimate._counts(recipe, larger, WORK.shapes[0], WORK, "bfloat16", False)
    for part in ("weights", "gradients", "optimizer"):
        assert extended[part] == whole[part]
    for stage in ("training", "validation"):
        peaks = [max(n for name, n in counts.items() if name.startswith(stage)) for counts in (extended, whole)]
        assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"model.adapter": "lora"}, {"training.micro_batch": 2}])
def test_estimate_is_near_the_tensors_of_a_training_run(train_toy, toy_settings, toy_cache, tmp_path, kind):
    kind = {"training.steps": 2, "training.eval_every": 2, "training.batch_size": 24, **kind}
    recipe, live = toy_settings({"evaluation.max_new_tokens": 3, **kind}), LiveBytes()
    work = estimate.workload(recipe, toy_cache)
    needed = estimate.estimate(recipe, base_config.of_recipe(recipe), work, "cpu", "float32")
    gc.collect()
    with simulation.counted(live):
        train_toy(tmp_path / "run", kind)
    assert needed.total - needed.overhead == pytest.approx(live.peaks["model"], rel=0.15)


@pytest.mark.slow
def test_smaller_settings_need_less_memory(toy_settings, config):
    recipe, gpu = toy_settings({"training.batch_size": 8}), Device("a GPU", "cuda", "float16", 1)
    small = changed(recipe, {"model.adapter": "lora"})
    eight_bit = changed(small, {"model.load_in_8bit": True})
    totals = [advice.estimate_for(one, config, WORK, gpu, 4) for one in (recipe, small, eight_bit)]
    assert totals[0].optimizer > totals[1].optimizer
    assert totals[1].weights > totals[2].weights
    averaged = advice.estimate_for(changed(recipe, {"training.ema_decay": 0.9}), config, WORK, gpu, 4)
    assert averaged.average == totals[0].gradients
    of_8_bits = advice.estimate_for(changed(recipe, {"training.optimizer": "adamw8bit"}), config, WORK, gpu, 4)
    assert of_8_bits.optimizer < totals[0].optimizer


@pytest.mark.slow
def test_micro_batch_is_halved_until_it_fits(toy_settings, config):
    recipe, work = toy_settings({"training.batch_size": 8}), Workload((BatchShape(8, 3000, 30),), WORK.validation, 16)
    needs = {clips: advice.estimate_for(recipe, config, work, Device("", "cpu", "float32", 0), clips).total
             for clips in (1, 2, 4, 8)}  # fmt: skip
    for memory, clips in ((needs[8], 8), (needs[8] - 1, 4), (needs[4] - 1, 2), (needs[2] - 1, 1), (0, 1)):
        chosen, needed = advice.best_micro_batch(recipe, config, work, Device("", "cpu", "float32", memory))
        assert (chosen, needed.total) == (clips, needs[clips])


@pytest.mark.parametrize(("size", "n_bytes"), [("16GB", 16e9), ("16", 16e9), (" 15.5 gib", 15.5 * 2**30), ("8g", 8e9)])
def test_sizes_are_read(size, n_bytes):
    assert report.parse_gb(size) == n_bytes


@pytest.mark.parametrize("size", ["", "0", "sixteen", "-16GB", "16TB"])
def test_other_sizes_raise_one_line(size):
    with pytest.raises(LabError, match="takes a size such as 16GB"):
        report.parse_gb(size)


@pytest.mark.slow
def test_report_lists_settings_in_the_order_of_their_cost(toy_settings, toy_cache, tmp_path):
    recipe = toy_settings({"training.batch_size": 8})
    small = report.examine(recipe, cache=toy_cache.uri, gpu_memory="0.1GB")
    assert not small.fits and "none does: take a smaller model.base" in str(small)
    settings = [option.settings for option in small.options]
    assert settings[0] == {"training.micro_batch": 1}
    assert settings[1] == {"training.micro_batch": 1, "training.checkpoint_activations": True}
    assert "--set training.micro_batch=1 --set training.checkpoint_activations=true" in str(small)
    large = report.examine(recipe, runs=tmp_path, gpu_memory="16GB")
    assert large.fits and large.options == () and "no cache yet" in str(large)
    assert json.loads(json.dumps(large.as_dict()))["fits"]


@pytest.mark.slow
def test_automatic_micro_batch_is_part_of_the_report(toy_settings, toy_cache):
    automatic, whole = (
        toy_settings({"training.micro_batch": "auto", "training.batch_size": 8}),
        toy_settings({"training.batch_size": 8}),
    )
    assert report.examine(automatic, cache=toy_cache.uri).micro_batch == 8
    needed = report.examine(whole, cache=toy_cache.uri, gpu_memory="16GB").estimate.total
    small = report.examine(automatic, cache=toy_cache.uri, gpu_memory=f"{(needed - 1) / 1e9:.9f}GB")
    assert small.micro_batch < 8 and small.fits


def test_sizes_of_openai_need_no_files(toy_settings, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    large = base_config.of_recipe(toy_settings({"model.base": "openai/whisper-large-v3", "model.dropout": 0.1}))
    assert (large.d_model, large.decoder_layers, large.num_mel_bins, large.dropout) == (1280, 32, 128, 0.1)
    with pytest.raises(LabError, match="me/whisper-x is not on this machine"):
        base_config.of_uri("me/whisper-x")
