"""The Swedish Whisper lab: three pipelines that fine-tune Whisper and put the result in front of people.

Data flows down this list, and imports point up it, never back (tests/test_structure.py reads this very list):

    errors        the one exception for what a user can cause or mend
    recipe        an experiment as frozen settings: TOML, overrides, digest
    manifest      finished folders: whole or absent
    environment   which machine, which device, does the Hub answer
    stores        where finished artefacts are kept: a folder, a drive, the Hub, Hopsworks
    workers       processes that do one task after another, and may die
    ranks         processes that train one model together
    audio         bytes or path to Waveform: 16 kHz mono
    text          transcripts: clean for training, normalise for scoring
    verdicts      the rows of a feedback log
    sources       where Examples come from: tour, planted, folder, common_voice, mozilla, hub, parquet, feedback, mix
    mirror        real weights from the package registry, where the Hub cannot be reached
    models        find, load and run Whisper at the length of a clip
    labels        transcripts to the token ids that the decoder is to produce
    features      Waveform to log-mel, trimmed without loss
    curation      what is kept of a corpus, and why the rest is not
    shards        some hundred clips, made in one piece by any process
    cluster       shards made by the machines of a Ray cluster
    cache         FeatureCache: shards, manifest
    batches       cache rows to batches: length buckets, padding
    augmentation  training clips varied anew in every epoch
    repetition    transcripts that go round in circles
    decoding      batched generation at clip length
    confidence    the probability that a word is right, calibrated on the validation split
    export        the same weights for CTranslate2, ONNX Runtime, or in half precision
    engines       log-mel frames to text: transformers on any device, CTranslate2, ONNX Runtime
    scoring       WER and CER with intervals
    metric        the same as a metric of evaluate, for other people's code
    relabel       label errors: what a model hears beside what the transcript says
    corpus        curation over a whole corpus, before the audio and after it
    distillation  a smaller student: some layers of a tuned teacher, taught to answer as it does
    checkpoints   complete-or-absent checkpoints
    training      recipe and cache to tuned weights
    report        what a report tells: slices, confusions, calibration; and its page
    evaluation    EvalReport: scores and predictions of a model on a split
    ledger        every scoring of a test split, counted
    history       experiments.csv: what was ever scored
    experiments   reports by the names that people give, gathered over seeds
    comparison    experiments to one table: by how much, how sure, on whom, at what cost
    leaderboard   models ranked on one test set; what was trained on it is struck
    segmentation  where a recording is spoken, and the windows that are cut from it
    transcriber   model to Transcript, for a sentence or a whole hour
    streaming     text while somebody is still speaking
    subtitles     a Transcript as txt, srt, vtt, json
    tables        tables of recordings in, the same rows with further columns out
    transcripts   many recordings to text: row after row, and where it is cut off it goes on
    feedback      what listeners say of a transcript
    served        which model the app serves
    page          the app's words in two languages, its looks, and an open microphone
    space         the app as a Space of the Hub, with the modules that it needs
    serving       an HTTP API in the shape that OpenAI's clients expect
    figures       tables, pictures, live curves
    lab           the stages as notebooks and commands call them
    finetuning    fine-tuning as a service: one job at a time over HTTP
    delivery      exports held against the model they were made of; the folder that a deployment needs
    detection     how many of the planted faults curation finds, and how many else
    sweeps        many trials of one recipe: what its search space holds, early stopping, the best recipe
    series        recipes with several seeds, one after another, and what came of them as tables
    batch         the three notebooks in order, by papermill
    doctor        is this machine ready?

Importing the package runs nothing.
"""
