"""Decode audio files: which bytes of a file hold sound, and the two decoders.

waveform.py     the types: Waveform, AudioError, Gap; checks of samples; channels to mono
content.py      the bytes of a file, and pieces of them that are decoded as files of their own
containers.py   examine a file: its kind, its pieces, what its sizes claim and what is there
pcm.py          wav, aiff, au, caf: sizes of their chunks
mpeg.py         mp3 and AAC: a walk along their frames; mpeg_frames.py reads their headers
ogg.py, flac.py the same for their pages and frames
libsndfile.py   decode a piece with libsndfile
ffmpeg.py       decode a file with ffmpeg, if that is installed
"""
