import hashlib
import math

import numpy as np


# task 1
def n_steps(n_clips, micro_batch, accumulation, epochs):
    return math.ceil(n_clips / (micro_batch * accumulation)) * epochs


# task 2
def token_loss(logits, labels):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    real = labels != -100
    return -log_probabilities[real, labels[real]].mean()


# task 3
def learning_rate(step, peak, warmup, steps):
    return peak * min(step / warmup, (steps - step) / (steps - warmup))


# task 4
def accumulate(gradients, n_tokens):
    return sum(gradient * n for gradient, n in zip(gradients, n_tokens)) / sum(n_tokens)


# task 5
def choose(history):
    best = min(history, key=lambda row: row["validation_wer"])
    before, last = history[-2:]
    overfits = last["loss"] < before["loss"] and last["validation_loss"] > before["validation_loss"]
    return best["step"], overfits


# task 6
def digest(weights):
    result = hashlib.sha256()
    for name in sorted(weights):
        result.update(f"{name} {weights[name].dtype} {weights[name].shape}".encode())
        result.update(weights[name].tobytes())
    return result.hexdigest()


# task 7
needed = {"weights", "momentum", "step", "order", "random_state"}
