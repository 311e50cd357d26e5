"""The Open Inference Protocol V2: its routes, and the conversion of its tensors."""
