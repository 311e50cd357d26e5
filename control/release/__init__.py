"""Move versions into production and back."""
