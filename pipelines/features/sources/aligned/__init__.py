"""Long recordings with a text beside each: the model finds which passage of the text is spoken where.

texts.py        read .srt, .vtt, .txt, TextGrid, .eaf and Audacity labels as lines with or without times
hypotheses.py   decode a recording window by window; every window is stored when it is decoded
matching.py     predict the time of each line from what its characters and the hypotheses have in common
breaks.py       divide subtitles where their shift changes
places.py       place the lines in the speech, and group those that no pause divides
passages.py     score each group in its sound, reject the rest with a reason
aligner.py      all of this for one recording, stored in the cache folder
adaptation.py   tune an untuned aligner on the passages that it is sure of
progress.py     show how far recordings are aligned
source.py       the source
"""
