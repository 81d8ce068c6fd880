"""Training and using deltas on bases whose linear layers bitsandbytes holds quantised."""
