"""Which tensors may be chosen from: their roles in a model, presets and patterns. No torch."""
