"""Recordings without transcripts: a model writes pseudo-labels, and those that it is sure of become training clips.

labeller.py   decode windows with a model: the text, the probability of each word, or the language
labels.py     accept a pseudo-label, or reject it with a reason
source.py     the source
"""
