"""Data from people: recorded sentences, and transcripts that people check."""
