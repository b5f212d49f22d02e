"""Foreign tars of palettes, 1 bit, grey with alpha, 16 bits and CMYK: `data info` counts them, and training decodes
them as packing does."""

import io
import tarfile
from pathlib import Path

import harness
import numpy as np
import pytest
from packing import encoded, noise, packed
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.verify import info

SMOOTH = noise(3, 4).resize((32, 32), Image.Resampling.BICUBIC)
WIDE = np.asarray(SMOOTH.convert("L")).astype(np.uint16) * 257
ALPHA = SMOOTH.convert("LA")
ALPHA.putalpha(Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))))
KINDS = {
    "palette": encoded(SMOOTH.quantize(16)),
    "clear": encoded(SMOOTH.quantize(16), transparency=3),
    "bits": encoded(SMOOTH.convert("1")),
    "grey": encoded(SMOOTH.convert("L")),
    "wide": encoded(Image.fromarray(WIDE)),
    "alpha": encoded(ALPHA),
    "inks": encoded(SMOOTH.convert("CMYK"), "JPEG", quality=95),
    "greyjpeg": encoded(SMOOTH.convert("L"), "JPEG", quality=95),
    "gif": encoded(SMOOTH, "GIF"),
    "rgba": encoded(SMOOTH.convert("RGBA")),
}
SUFFIXES = {"inks": "jpg", "greyjpeg": "jpg"}


def tar_of(path: Path, pictures: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mixed(path: Path) -> Path:
    """Write a tar with one picture of each kind among plain RGB pictures."""
    plain = {f"plain{i}.png": encoded(noise(i, 32)) for i in range(12)}
    return tar_of(path, plain | {f"x-{kind}.{SUFFIXES.get(kind, 'png')}": data for kind, data in KINDS.items()})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_training_decodes_as_packing_does(tmp_path, channels):
    """The resolution is that of the pictures, so neither resamples, for any number of channels."""
    first = {1: SMOOTH.convert("L"), 3: SMOOTH, 4: SMOOTH.convert("RGBA")}[channels]
    pictures = {"0.png": encoded(first)} | {f"x-{kind}.png": data for kind, data in sorted(KINDS.items())}
    tar = tar_of(tmp_path / "a.tar", pictures)
    index = load_index(str(tar))
    assert index.channels == channels
    report = packed(tar, tmp_path / "out", 32, channels=channels, format="png", crop="none")
    assert report.count == len(pictures)
    ours, theirs = load_index(str(tmp_path / "out")).table(32), index.table(32)
    for i in range(len(pictures)):
        difference = np.abs(ours.image(i).astype(int) - theirs.image(i))
        assert difference.max() <= 1, index.source_of(i)  # a decoder's luma differs from Pillow's by one


@pytest.mark.parametrize(
    ("kinds", "channels"), [(["palette"], 3), (["bits"], 1), (["wide"], 1), (["alpha"], 4), (["inks"], 3), (["gif"], 3)]
)
def test_whole_tars_of_a_kind(tmp_path, kinds, channels):
    tar = tar_of(tmp_path / "a.tar", {f"{i}-{kind}.png": KINDS[kind] for i in range(3) for kind in kinds})
    index = load_index(str(tar))
    assert (index.channels, index.resolutions[-1]) == (channels, 32)
    assert [index.table(16).image(i).shape for i in range(3)] == [(channels, 16, 16)] * 3


def test_info_continues_if_a_server_changes_its_answer(tmp_path, monkeypatch):
    index = load_index(str(tar_of(tmp_path / "a.tar", {"a.png": KINDS["grey"], "b.png": KINDS["grey"]})))
    real, reads = SampleTable.read, []

    def read(table, i):
        reads.append(i)
        return b"nothing" if reads == [0, 0] else real(table, i)

    monkeypatch.setattr(SampleTable, "read", read)
    said = list(info(index))
    assert "of 2 pictures examined: 1 grey PNG" in said
    assert any("1 of them cannot be read, for example a: is not a picture" in line for line in said)


@pytest.mark.slow
def test_info_counts_kinds_and_training_reads_them(tmp_path):
    tar = mixed(tmp_path / "a.tar")
    with tarfile.open(tar, "a") as more:
        info = tarfile.TarInfo("z-\x1b[2Jdrawing.png")
        info.size = 5
        more.addfile(info, io.BytesIO(b"%!PS\n"))
    said = harness.command("data", "info", tar, expected=0).stdout
    assert "of 23 pictures examined: 12 RGB PNG, " in said
    for kind in ("2 palette PNG", "1 1-bit PNG", "1 grey and alpha PNG", "1 16-bit grey PNG", "1 CMYK JPEG"):
        assert kind in said
    assert "10 of them are converted to RGB each time they are read" in said
    assert "1 of them cannot be read, for example z-\\x1b[2Jdrawing: is a PostScript drawing" in said
    run = tmp_path / "run"
    changes = {"growth__stable_kimg": 0.032, "growth__fade_kimg": 0.016, "data__max_bad_share": 0.5}
    output = harness.finish(harness.start(harness.arguments(run, tar, **changes)))
    assert "repair the data" not in output
    faults = (run / "data-faults.jsonl").read_text() if (run / "data-faults.jsonl").exists() else ""
    assert "x-" not in faults
