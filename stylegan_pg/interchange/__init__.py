"""Checkpoints of other programs, read without executing anything that they contain."""
