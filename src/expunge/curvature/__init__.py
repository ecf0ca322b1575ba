"""Gradient statistics and their dense oracle."""
