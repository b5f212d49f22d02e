"""A page in the browser on which a generator and a run are explored."""
