"""Record sentences: `python -m pipelines record` serves a page on which people read a list of sentences aloud.

sentences   the list: the tour's, a text file, or sentences chosen for their letters, clusters and terms
checks      what is measured of a take, and the limits
folder      the folder of takes: consent, licence, audio, table, splits
recorder    sessions of speakers: which sentence is next, check and store a take; without Gradio
handlers    handlers of the page's events
page        components and events; i18n: the texts in two languages; static/: script and style
launch      serve the page
"""
