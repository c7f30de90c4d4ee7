"""What is kept of a corpus, and why the rest is not: every clip that is not used has a reason.

    rejection   a reason in one word, and its detail
    quality     what is measured on one clip: speaking rate, level, clipping, silence, signal over noise
    gate        one example to a clip, or its rejection
    leaks       training rows that share a speaker, a sentence or the audio with a held-out row
    selection   what is decided over a whole corpus by its metadata: votes, duplicates, balance; counts per step

The steps run in the order of `selection.ORDER`, each counted before and after. What needs metadata alone runs before
any audio is decoded; what needs one clip's audio runs in the gate; what needs all audio runs over the made cache
(corpus.py). Only training rows are chosen among: validation and test are the measure.
"""
