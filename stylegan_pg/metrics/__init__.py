"""Metrics of generators: each family is one class in one module, and registry.METRICS lists them."""
