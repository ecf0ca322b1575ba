"""Small real problems with their recipes."""
