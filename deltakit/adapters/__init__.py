"""Adapters: modules beside a base's own, rebuilt from a seed and trained sparsely."""
