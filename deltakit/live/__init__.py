"""Deltas on live models: applied in place, swapped, and taken back bit for bit."""
