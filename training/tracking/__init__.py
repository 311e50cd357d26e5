"""MLflow: runs, registry and releases."""
