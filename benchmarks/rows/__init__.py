"""The rows of benchmarks/systems.py: for each system, what is trained and what is measured of it."""
