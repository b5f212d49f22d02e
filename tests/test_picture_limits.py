"""Small files that are expensive to decode: headers are checked before decoding. Files that are too large, that are not
pictures, or that crash the decoding process are named once."""

import os
import re
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from packing import encoded, noise, only_image, packed, zip_of
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.images.decode import decode_to_fit
from stylegan_pg.data.images.headers import BadPicture


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"", colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def zeros(count: int) -> bytes:
    """Return this many zero bytes, compressed."""
    packer, piece = zlib.compressobj(9), bytes(1 << 20)
    return (
        b"".join(packer.compress(piece) for _ in range(count >> 20))
        + packer.compress(bytes(count % (1 << 20)))
        + packer.flush()
    )


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(count: int) -> bytes:
    data = encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2][:20] * count + data[-2:]


def jpeg_with_exif() -> bytes:
    """Return a JPEG whose EXIF directory refers to the same bytes many times."""
    entries = b"".join(struct.pack(">HHII", 0x9000 + i, 7, 60_000, 8) for i in range(4000))
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 4000) + entries
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def tiff(body: bytes, **tags: int) -> bytes:
    basic = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1} | {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(basic.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(basic)) + entries + bytes(4)


def tiff_directory() -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 1, 1 << 16, 8) for tag in range(400, 4400))
    return b"II*\0" + struct.pack("<I", 1 << 16) + bytes((1 << 16) - 8) + struct.pack("<H", 4000) + entries + bytes(4)


def codestream_that_says(size: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51")
    data[at + 8 : at + 16] = data[at + 24 : at + 32] = struct.pack(">II", size, size)
    return bytes(data)


RUNS = struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54 + 1024, 40, 9000, 9000, 1, 8, 1, 0, 0, 0, 256, 0)


def progressive_inks() -> bytes:
    """Return a progressive CMYK JPEG whose header says 12,000 x 12,000."""
    data = bytearray(encoded(Image.new("CMYK", (64, 64)), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", 12_000, 12_000)
    return bytes(data)


HEAVY = {
    "huge.jpg": (lambda: jpeg_that_says(65_500, 65_500), "is 65500x65500 .* more than 178956970 pixels .*max-pixels"),
    "claims.jpg": (lambda: jpeg_that_says(13_000, 13_000), "premature end"),
    "huge.png": (lambda: png(20_000, 20_000), "more than 89478485 pixels.*max-pixels"),
    "huge.gif": (lambda: b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(20), "GIF|pixels"),
    "huge.ppm": (lambda: b"P6 60000 60000 255\n", "is 60000x60000"),
    "plain.ppm": (lambda: b"P3 5000 5000 255\n1 1 1", "more than 5592405 pixels"),
    "comments.pgm": (lambda: b"P2 8 8 255\n" + b"#\n" * 500_000 + b"1 " * 64, "does not contain 64 samples"),
    "short.pgm": (lambda: b"P2 8 8 255\n1 2 3", "does not contain 64 samples"),
    "none.pgm": (lambda: b"P2 1 1 255\n \n", "does not contain 1 samples"),
    "huge.jp2": (lambda: codestream_that_says(60_000), "is 60000x60000"),
    "inks.jpg": (progressive_inks, "more than 89478485 pixels"),
    "scans.jpg": (lambda: jpeg_of_scans(3000), r"in 30\d\d scans, more than"),
    "exif.jpg": (jpeg_with_exif, "directory that refers to"),
    "directory.tif": (tiff_directory, "directory that refers to"),
    "tile.tif": (lambda: tiff(zeros(1 << 26), t322=1 << 15, t323=1 << 15, t324=8, t325=9999), "tiles of 32768x32768"),
    "profile.png": (lambda: png(8, 8, (b"iCCP", b"x\0\0" + zeros(1 << 28)), pixels=zeros(200)), "too large"),
    "texts.png": (lambda: png(8, 8, *[(b"zTXt", b"x\0\0" + zeros(1 << 20))] * 100, pixels=zeros(200)), "text"),
    "chunks.png": (lambda: png(8, 8, *[(b"teST", b"")] * 300_000, pixels=zeros(200)), "chunks"),
    "runs.bmp": (lambda: b"BM" + RUNS + bytes(1024) + b"\1\1" * 5_000_000, "is run-length encoded"),
    "strip.png": (lambda: encoded(Image.new("RGB", (30_000, 8))), ""),
}


@pytest.mark.parametrize("name", HEAVY)
def test_small_files_that_are_expensive_to_decode_are_named_quickly(tmp_path, name):
    make, message = HEAVY[name]
    data = make()
    source = zip_of(tmp_path / "a.zip", {name: data, "b.png": encoded(noise(0))})
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = packed(source, tmp_path / "out", crop="pad")
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kilobytes
    if message:
        assert [path for path, _ in report.unreadable] == [name]
        assert re.search(message, report.unreadable[0][1]), report.unreadable
    else:
        assert report.count == 2


def test_the_message_names_the_option_of_the_limit(tmp_path):
    pictures = {
        "large.png": encoded(noise(0, 64)),
        "small.png": encoded(noise(1, 16)),
        "large.jpg": encoded(noise(2, 64), "JPEG"),
    }
    source = zip_of(tmp_path / "a.zip", pictures)
    report = packed(source, tmp_path / "out", max_pixels=64 * 64 // 2)
    reason = "is 64x64 (rows x columns) and has more than 2048 pixels (see --max-pixels)"
    assert (report.count, report.unreadable) == (2, (("large.png", reason),))
    assert packed(source, tmp_path / "more", max_pixels=64 * 64).count == 3


def test_large_jpegs_are_decoded_at_a_reduced_size(tmp_path):
    """In both shapes, above the limit from which this is done. The result is close to the whole picture, scaled
    down."""
    small = noise(0, 6).resize((1000, 940), Image.Resampling.BICUBIC)
    large = small.resize((10_000, 9_400), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(large, "JPEG", exif=exif, quality=80)
    for crop in ("center", "pad"):
        images = []
        for name, picture in (("large.jpg", data), ("small.jpg", encoded(small, "JPEG", exif=exif, quality=95))):
            source = zip_of(tmp_path / f"{crop}{name}.zip", {name: picture})
            images.append(only_image(source, tmp_path / f"{crop}{name}", 64, crop=crop, format="png"))
        assert np.abs(images[0].astype(int) - images[1]).mean() < 2


def test_pictures_that_padding_would_make_huge_are_resized_first(tmp_path):
    wide = Image.new("RGB", (12_000, 1200), (10, 200, 30))
    image = only_image(
        zip_of(tmp_path / "a.zip", {"a.png": encoded(wide)}), tmp_path / "out", 64, crop="pad", format="png"
    )
    green = (image == np.reshape((10, 200, 30), (3, 1, 1))).all(0)
    white = (image == 255).all(0)
    assert green[29:35].all()
    assert white[:28].all()
    assert white[36:].all()
    assert green.sum() + white.sum() == 64 * 64


# ------------------------------------------------------------------------------------------- what is no picture


DRAWING = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
OTHERS = {
    "drawing.png": (DRAWING, "PostScript drawing"),
    "drawing.tga": (DRAWING, ""),
    "page.jpg": (b"  <!DOCTYPE html><html>404</html>", "web page"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing"),
    "paper.png": (b"%PDF-1.7", "PDF document"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "new.jpg": (b"\xff\x0a" + bytes(20), "JPEG XL"),
    "layers.png": (b"8BPS\0\1" + bytes(60), "Photoshop"),
    "holes.png": (bytes(5000), "begins with zero bytes only"),
    "empty.png": (b"", "is empty"),
    "icon.png": (b"\0\0\1\0\1\0", "an icon"),
}


def test_only_raster_formats_are_opened_and_others_are_named(tmp_path, monkeypatch):
    """Formats are determined by content and not by name. A Ghostscript in the path would leave a mark."""
    mark = tmp_path / "mark"
    for name in ("gs", "gswin32c"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    files = {name: data for name, (data, _) in OTHERS.items()} | {
        "good.jpg": encoded(noise(0)),
        "named.tif": encoded(noise(1), "BMP"),
    }
    report = packed(zip_of(tmp_path / "a.zip", files), tmp_path / "out")
    assert report.count == 2  # one of them is the BMP
    found = dict(report.unreadable)
    assert found.keys() == OTHERS.keys()
    for name, (data, message) in OTHERS.items():
        assert message in found[name], (name, found[name])
        with pytest.raises(BadPicture):
            decode_to_fit(data, (8, 8), 3)
    assert not mark.exists()


def test_multiple_frames_and_damaged_profiles_are_reported(tmp_path):
    frames = [Image.new("RGB", (8, 8), (50 * i, 9, 9)) for i in range(3)]
    files = {"a.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])}
    files |= {"b.tif": encoded(frames[1], "TIFF", save_all=True, append_images=frames)}
    files |= {"c.png": encoded(frames[2], icc_profile=b"nonsense" * 20), "d.gif": encoded(frames[0], "GIF")}
    report = packed(zip_of(tmp_path / "a.zip", files), tmp_path / "out")
    assert [path for path, _ in report.decided] == ["a.gif", "b.tif", "c.png"]
    assert "note: a.gif has several frames or pages, of which only the first is used (and 1 others)" in report.summary()
    assert "note: c.png has a colour profile that is damaged" in report.summary()
    assert load_index(str(tmp_path / "out")).table(8).image(1)[0, 0, 0] == 50
    again = packed(zip_of(tmp_path / "a.zip", files), tmp_path / "out")
    assert (again.was_complete, again.decided) == (True, report.decided)
