"""Exact deletion: training in shards and slices, so that data can be taken out without training."""
