"""Loopback servers that the real clients speak to, with faults to order."""
