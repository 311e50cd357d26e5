"""All that knows TorchServe's process and management API."""
