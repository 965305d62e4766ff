"""Formats in which an encoder leaves us, each in a file, and what goes with them: card, averaging, hub."""
