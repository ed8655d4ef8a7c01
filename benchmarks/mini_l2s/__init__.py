"""The mini long-to-short pair: how it is trained, and every method on it."""
