"""Many models at once: retrained references."""
