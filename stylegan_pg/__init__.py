"""stylegan_pg: from a folder of pictures to an exported high-resolution generator."""

from stylegan_pg.version import __version__ as __version__


def __getattr__(name: str):
    # Lazily, so that `import stylegan_pg` and `stylegan-pg --help` do not wait for torch.
    if name == "load_snapshot":
        from stylegan_pg.checkpoint.snapshot import load_snapshot

        return load_snapshot
    raise AttributeError(f"module 'stylegan_pg' has no attribute {name!r}")
