"""Recordings: speech that is detected in them, windows, rows of tables that are a part of one, names of columns."""
