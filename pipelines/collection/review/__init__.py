"""Review: play the training clips whose transcripts are most likely wrong, and write a table of corrections.

scores     how little a model believes each transcript
queue      the order of the clips, decisions of several reviewers, and the share of errors found
sessions   which clip each open page shows, and whether a decision is about that clip
handlers   handlers of the page's events
page       components and events; texts: the texts in two languages; static/: script and style
"""
