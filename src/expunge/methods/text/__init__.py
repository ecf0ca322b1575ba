"""Unlearning methods for language models, one file each."""
