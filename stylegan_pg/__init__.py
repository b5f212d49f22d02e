"""stylegan_pg: from a folder of pictures to an exported high-resolution generator."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazily, so that `import stylegan_pg` and `stylegan-pg --help` do not wait for torch.
    if name == "load_snapshot":
        from stylegan_pg.snapshot import load_snapshot

        return load_snapshot
    raise AttributeError(f"module 'stylegan_pg' has no attribute {name!r}")
