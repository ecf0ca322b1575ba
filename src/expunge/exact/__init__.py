"""Exact deletion: models trained so that what saw a record can be taken out."""
