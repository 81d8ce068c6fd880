"""What changed between two checkpoints, as a delta."""
