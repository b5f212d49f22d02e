"""Metrics: features -> statistics -> a number."""
