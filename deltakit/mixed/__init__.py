"""Mixed batches: one forward pass in which every row has the delta of its own task."""
