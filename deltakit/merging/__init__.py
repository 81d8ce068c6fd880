"""Merging deltas into checkpoints: planned from the headers, written in one pass over the files."""
