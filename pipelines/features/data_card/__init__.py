"""Data cards: the README.md of a finished feature cache, in the form of the Hub's data set cards.

card       write the card from the cache's rows, rejections, curation counts and identity
terms      licence, consent and method of each source
markdown   text of others within one line of Markdown
"""
