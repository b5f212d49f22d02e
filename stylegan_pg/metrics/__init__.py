"""Metrics of generators. Each family of metrics is one class in one module; registry.METRICS lists the classes."""
