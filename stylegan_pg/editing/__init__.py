"""What is done with a generator: mixing, interpolations and videos, projection of pictures, directions in w."""
