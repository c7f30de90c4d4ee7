"""A page that searches transcripts and plays the recordings from the matching word.

transcripts    read transcripts: verbose JSON with the times of words, srt, vtt
page           write the page from page.html, page.css and page.js; it works offline, from file://
folder         the recordings and transcripts of a folder
"""
