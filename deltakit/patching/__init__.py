"""Weight patches of a model in training, in a chain that can be checked and followed."""
