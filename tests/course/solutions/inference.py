import zlib

import numpy as np


# task 1
def real_time_factor(audio_s, elapsed_s):
    return elapsed_s / audio_s


# task 2
def greedy(step, limit):
    tokens = [0]
    while len(tokens) <= limit:
        token = int(np.argmax(step(tokens)))
        if token == 1:
            break
        tokens.append(token)
    return tokens[1:]


# task 3
def beam_search(step, width, limit):
    beams, complete = [(0.0, [0])], []
    for _ in range(limit + 1):
        longer = []
        for score, tokens in beams:
            for token, log_probability in enumerate(step(tokens)):
                longer.append((score + log_probability, [*tokens, token]))
        longer.sort(key=lambda beam: -beam[0])
        complete += [beam for beam in longer[: 2 * width] if beam[1][-1] == 1]
        beams = [beam for beam in longer if beam[1][-1] != 1][:width]
    best = max(complete or beams, key=lambda beam: beam[0])[1]
    return [token for token in best if token > 1][:limit]


# task 4
def is_loop(text):
    data = text.encode()
    return len(data) / len(zlib.compress(data)) > 2.4


# task 5
def srt_time(seconds):
    total_s, ms = divmod(round(seconds * 1_000), 1_000)
    return f"{total_s // 3_600:02}:{total_s // 60 % 60:02}:{total_s % 60:02},{ms:03}"


# task 6
def join(first, second, overlap_start_s, overlap_end_s):
    cut_s = (overlap_start_s + overlap_end_s) / 2
    before = [word for word in first if (word[1] + word[2]) / 2 < cut_s]
    return before + [word for word in second if (word[1] + word[2]) / 2 >= cut_s]


# task 7
def calibration_error(confidences, correct):
    bins = np.minimum((confidences * 5).astype(int), 4)
    error = 0.0
    for n in np.unique(bins):
        inside = bins == n
        error += inside.mean() * abs(confidences[inside].mean() - correct[inside].mean())
    return error
