"""The operator's side: the `gradserve` command, the agent beside TorchServe, the local stack, releases."""
