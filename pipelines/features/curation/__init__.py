"""Curation: which clips of a corpus are used, and the reason for every clip that is not.

    clip_filter    one example to a clip, or its rejection
    quality        measurements on one clip: speaking rate, level, clipping, silence, signal-to-noise ratio
    leaks          training rows that share a speaker, a sentence or the audio with a held-out row
    selection      steps over the metadata of a whole corpus: votes, duplicates, balance; counts per step
    label_errors   training rows whose transcript differs from what a model recognises
    corpus         all of these over a corpus, before, during and after the extraction of features

The steps run in the order of `selection.ORDER`, each counted before and after. Steps that need only metadata run before
any audio is decoded, checks of one clip run in the clip filter, and steps that need all audio run over the finished
shards. Only training rows are selected from: validation and test stay as they are.
"""
