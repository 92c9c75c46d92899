"""Files of weights, opened: what a path holds, and its tensors by name."""
