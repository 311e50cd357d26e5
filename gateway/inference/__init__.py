"""Answer images: admission, batching, routing, replicas and TorchServe's inference API."""
