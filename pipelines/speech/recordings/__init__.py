"""Tables of recordings: the names of their columns, and rows that are a part of a recording."""
