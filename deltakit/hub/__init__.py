"""Deltas and bases on the Hugging Face Hub: `hf://` locations, resolved to files of the cache."""
