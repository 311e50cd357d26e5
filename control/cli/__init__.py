"""The `gradserve` command."""
