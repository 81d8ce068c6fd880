"""Training one model in several processes: what they exchange, and how little of it."""
