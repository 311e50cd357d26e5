"""What travels inside the archive: shared by training, which imports it, and the TorchServe worker that serves it."""
