"""Whether deltas get on with each other: overlap, conflicts of sign and common bases."""
