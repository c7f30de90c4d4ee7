"""Loopback servers for the real clients, with faults on request."""
