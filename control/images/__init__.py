"""Image files classified and explained from the terminal: by a gateway, or by an archive in this process."""
