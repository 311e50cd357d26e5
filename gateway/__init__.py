"""The HTTP gateway in front of TorchServe. It imports no torch, and gets class names from the model's contract."""
