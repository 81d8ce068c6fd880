"""Merging into the weight files themselves, with a journal that can take every byte back."""
