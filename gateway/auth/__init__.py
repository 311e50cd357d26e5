"""API keys, scopes and quotas."""
