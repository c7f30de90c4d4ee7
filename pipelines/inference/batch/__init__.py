"""Transcribe audio files, folders, or the rows of a table; an interrupted table is continued.

    talks.csv                       the input
    talks.transcribed.csv.partial   journal: one line of JSON per finished row; the first names table, model, settings
    talks.transcribed.csv           the output, written when all rows are finished: complete or absent
    talks.transcribed.csv.json      the journal's first line, the summary, and the sha256 of the output
    talks.transcribed.csv.earlier   journal of the previous call, if some rows have errors: a retry keeps the others

A recording that cannot be used is a row with an error. A reference column adds WER, by row and in total.
"""
