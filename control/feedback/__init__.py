"""The operator's side of feedback: export it, and learn from it."""
