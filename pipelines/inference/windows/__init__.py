"""Windows of speech: decoded in batches, continued where a text ends too early, joined where speech had to be cut."""
