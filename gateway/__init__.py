"""The data plane's public face: HTTP in, TorchServe behind, no torch and no labels of its own."""
