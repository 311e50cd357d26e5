"""The agent: keep one TorchServe at the traffic plan and report its status."""
