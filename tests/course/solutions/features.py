import numpy as np

from pipelines.course.exercises import listening


# task 1
def n_frames(duration_s):
    return int(duration_s * 16_000) // 160


# task 2
def hz_to_mel(hz):
    return 3 * hz / 200 if hz < 1_000 else 15 + 27 * np.log(hz / 1_000) / np.log(6.4)


# task 3
def triangle(low_hz, centre_hz, high_hz, bins_hz):
    rising = (bins_hz - low_hz) / (centre_hz - low_hz)
    falling = (high_hz - bins_hz) / (high_hz - centre_hz)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high_hz - low_hz)


# task 4
def mel_to_hz(mel):
    return 200 * mel / 3 if mel < 15 else 1_000 * np.exp(np.log(6.4) / 27 * (mel - 15))


def filter_of(index):
    edges_hz = [mel_to_hz(mel) for mel in np.linspace(0, hz_to_mel(8_000), 82)]
    return triangle(*edges_hz[index : index + 3], np.linspace(0, 8_000, 201))


# task 5
def log_mel(power):
    logarithm = np.log10(np.maximum(power, 1e-10))
    return (np.maximum(logarithm, logarithm.max() - 8) + 4) / 4


# task 6
def padding_share(durations_s, batch_size):
    batches = [durations_s[n : n + batch_size] for n in range(0, len(durations_s), batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(durations_s) / padded


# task 7
def pad_labels(clips):
    longest = max(len(clip) for clip in clips)
    return np.array([clip + [-100] * (longest - len(clip)) for clip in clips])


# task 8
def hidden_copy(sentence):
    return sentence.upper().replace("?", "!")


# task 9

faults = listening.faults()
