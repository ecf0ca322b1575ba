"""The eight nouns and their contracts. Imports nothing else of expunge."""
