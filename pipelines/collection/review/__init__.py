"""Review: play the training clips whose transcripts are most likely wrong, and write a table of corrections.

scores     how little a model believes each transcript
queue      the order of the clips, decisions of several reviewers, and the share of errors found
page       the page
texts      the page's texts
"""
