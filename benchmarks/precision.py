"""Time a training step in float32 and in bfloat16, in turns in one process, on the CPU.

    python benchmarks/precision.py                        # whisper-tiny, batches of 8 at 2 s and 4 s
    python benchmarks/precision.py --width 768            # the size of whisper-small, with random weights

The last line is a JSON object: by length of the clips, the medians of both in seconds, and of their ratio, with
quartiles. Other work on the machine slows both down, and the ratio less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.infra import environment

TOKENS_PER_S = 5
LAYERS = {384: 4, 512: 6, 768: 12, 1024: 24, 1280: 32}
"""Layers of encoder and decoder by a model's width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--width", type=int, choices=LAYERS, help="random weights of this width instead of a model")
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.0, 4.0], help="lengths of the clips")
    parser.add_argument("--steps", type=int, default=10, help="steps in each precision, after one to warm up")
    options = parser.parse_args()
    environment.share_cores()
    environment.keep_freed_memory()
    model = build(options.width, options.model)
    print(json.dumps({f"{length:g} s": measure(model, options, length) for length in options.seconds}))


def build(width: int | None, name: str) -> Any:
    """Return a model in training mode: of Whisper's shape with random weights, or the one of this name."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from pipelines.training.trainer import use_deterministic_sums
    from pipelines.whisper import model as whisper_model

    use_deterministic_sums()
    if not width:
        return whisper_model.load(whisper_model.resolve(name)).train()
    sizes = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (
        ("layers", LAYERS[width]), ("attention_heads", width // 64), ("ffn_dim", 4 * width)
    )}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(d_model=width, attn_implementation="sdpa", **sizes))
    whisper_model.allow_short_context(model)
    return model.train()


def measure(model: Any, options: argparse.Namespace, length_s: float) -> dict[str, Any]:
    """Return the times of a step with clips of this length, and their ratio."""
    import torch

    frames, vocabulary = 2 * round(50 * length_s), model.config.vocab_size
    features = torch.randn(options.batch, model.config.num_mel_bins, frames)
    labels = torch.randint(0, min(50_000, vocabulary), (options.batch, round(TOKENS_PER_S * length_s) + 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    pairs = [
        [step(model, optimizer, features, labels, bfloat16) for bfloat16 in (False, True)]
        for _ in range(options.steps + 1)
    ][1:]
    ratios = [float32 / bfloat16 for float32, bfloat16 in pairs]
    result = {
        "float32_s": round(statistics.median(pair[0] for pair in pairs), 3),
        "bfloat16_s": round(statistics.median(pair[1] for pair in pairs), 3),
        "ratio": round(statistics.median(ratios), 2),
        "quartiles": [round(value, 2) for value in statistics.quantiles(ratios, n=4, method="inclusive")[::2]],
        "threads": torch.get_num_threads(),
    }
    print(f"{length_s:g} s: {result}", file=sys.stderr, flush=True)
    return result


def step(model: Any, optimizer: Any, features: Any, labels: Any, bfloat16: bool) -> float:
    """Do one optimizer step; return its duration in seconds."""
    import torch

    from pipelines.training.trainer import shift_right, token_mean_loss

    started = time.perf_counter()
    decoder_input_ids = shift_right(labels, model.config.decoder_start_token_id, model.config.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        outputs = model(input_features=features, decoder_input_ids=decoder_input_ids)
    token_mean_loss(outputs, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
