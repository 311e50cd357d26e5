"""The inference service: admission, batching, routing, replicas and TorchServe's inference API."""
