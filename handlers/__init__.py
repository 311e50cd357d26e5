"""Code that travels inside the archive: training imports it, and the TorchServe worker runs it."""
