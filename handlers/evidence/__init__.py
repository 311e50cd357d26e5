"""Evidence for an answer, from the outputs of the forward pass that gave it: NumPy alone."""
