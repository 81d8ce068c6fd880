"""Training: live models, the engine that trains entries, and the tasks around it."""
