"""The Swedish Whisper lab: three pipelines that fine-tune Whisper, and the tools to compare experiments.

    speech + text -> 01 features -> feature cache -> 02 training -> model -> 03 inference -> transcript
                                                              \\-> 04 experiments: scores, intervals, comparisons

Each pipeline has a folder with a `pipeline.py`: the few functions that its notebook, the commands and the worker call.
Only URIs pass between them. Folders, each of which may import those below it:

    cli           commands: `python -m pipelines ...`, one module for each group
    course        exercises of the notebooks, their checks, and the notebooks in Swedish
    worker        fine-tuning as a service: jobs over HTTP
    experiments   04: evaluation, comparison, leaderboard, series of runs, sweeps, reports
    collection    data from people: recorded sentences, reviewed transcripts
    inference     03: transcriber, app, HTTP API, batch transcription, deployment
    training      02: data, loop, callbacks, checkpoints, model card, distillation
    features      01: sources, curation, log-mel extraction, feature cache
    whisper       the model: loading, log-mel, tokens, batching, decoding, engines, export
    speech        audio files, text normalisation, WER and CER: no model
    recipes       an experiment's settings: TOML files, overrides, digests
    infra         errors, manifests, environment, stores, processes, logging

`inference` imports nothing of `training`. tests/test_structure.py checks these rules. docs/architecture.md follows one
clip, one batch and one upload through the code.
"""

from pipelines.infra import telemetry

telemetry.switch_off()  # before any other import: dependencies read their settings when they are imported
