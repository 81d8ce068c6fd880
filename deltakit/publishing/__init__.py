"""Publishing deltas and models on the Hub: what goes there, its card, and getting it back."""
