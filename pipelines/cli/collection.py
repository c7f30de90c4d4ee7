"""Commands that collect speech from people."""
