"""Colours and tones: packing, and training on tars of other programs, use what a picture's metadata says about its
samples. Undefined cases are rejected by name."""

import re
import struct
import zlib

import numpy as np
import pytest
from packing import encoded, only_image, packed, zip_of
from PIL import Image, ImageCms

from stylegan_pg.data.images.decode import decode_to_fit
from stylegan_pg.data.images.open_image import BadPicture

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)  # 0 to 63
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def tiff(samples: np.ndarray, photometric: int, order: str = "<", planar: bool = False, **tags: int) -> bytes:
    """Return an uncompressed TIFF of [H, W] or [H, W, n] samples. `tags` are further tags, such as t339=2."""
    data = samples.reshape(*samples.shape[:2], -1)
    height, width, bands = data.shape
    stored = data.astype(order + data.dtype.str[1:])
    body = np.ascontiguousarray(stored.transpose(2, 0, 1) if planar else stored).tobytes()
    bits, at = 8 * data.dtype.itemsize, 8 + len(body)
    extra = struct.pack(f"{order}{bands}H", *[bits] * bands)
    planes = bands if planar else 1
    extra += struct.pack(f"{order}{planes}I", *[8 + i * len(body) // planes for i in range(planes)])
    extra += struct.pack(f"{order}{planes}I", *[len(body) // planes] * planes)
    entries = {256: (4, 1, width), 257: (4, 1, height), 259: (3, 1, 1), 262: (3, 1, photometric), 277: (3, 1, bands)}
    entries |= {278: (4, 1, height), 284: (3, 1, 2 if planar else 1)}
    entries[258] = (3, bands, bits if bands == 1 else at) if bands < 2 else (3, bands, at)
    entries[273] = (4, planes, 8 if planes == 1 else at + 2 * bands)
    entries[279] = (4, planes, len(body) if planes == 1 else at + 2 * bands + 4 * planes)
    entries |= {int(name[1:]): (3, 1, value) for name, value in tags.items()}
    directory = struct.pack(order + "H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        field = (
            struct.pack(order + "H", value) + b"\0\0" if kind == 3 and count == 1 else struct.pack(order + "I", value)
        )
        directory += struct.pack(order + "HHI", tag, kind, count) + field
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "I", at + len(extra)) + body + extra + directory + bytes(4)


def png(samples: np.ndarray, colour: int, bits: int = 16, **chunks: bytes) -> bytes:
    """Return a PNG of [H, W, n] samples of 8 or 16 bits. `chunks` are written before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = samples.reshape(len(samples), -1).astype(">u2" if bits == 16 else "u1")
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", samples.shape[1], len(samples), bits, colour, 0, 0, 0)
    parts = [
        (b"IHDR", head),
        *((name.encode(), data) for name, data in chunks.items()),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def profile(gamma: float, name: str, space: bytes = b"RGB ") -> bytes:
    """Return a small ICC profile with sRGB's primaries (or grey), the curve x^gamma, and any name."""

    def fixed(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    text = b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, 2 * len(name), 28) + name.encode("utf-16-be")
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(fixed, values))

    tags = {b"desc": text, b"cprt": text, b"wtpt": xyz(0.9642, 1, 0.8249)}
    if space == b"GRAY":
        tags |= {b"kTRC": curve}
    else:
        tags |= {b"rXYZ": xyz(0.4360, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
        tags |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7139), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    head = (
        struct.pack(">I4sI4s4s4s", at + len(body), b"", 0x04300000, b"mntr", space, b"XYZ ").ljust(36, b"\0") + b"acsp"
    )
    head = head.ljust(68, b"\0") + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + table + body


def to_srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055) * 255


def grey(levels: np.ndarray) -> np.ndarray:
    """[8, 8] -> [3, 8, 8]"""
    return np.repeat(np.asarray(levels, float)[None], 3, 0)


def colours(dtype: type = np.uint8) -> np.ndarray:
    """Return [8, 8, 3] samples that differ in each channel."""
    top = np.iinfo(dtype).max
    return np.stack([RAMP / 63 * top, (63 - RAMP) / 63 * top, np.full((8, 8), top // 3)], -1).astype(dtype)


LINEAR = png(grey(RAMP * 4).transpose(1, 2, 0), 2, 8, gAMA=struct.pack(">I", 100_000))
WIDE = RAMP * 1040  # to 65520
EIGHT = np.rint(colours() / 1.0).transpose(2, 0, 1)
CLEAR = np.where(RAMP == 9, 255, np.rint(WIDE / 257))
INK = np.stack([RAMP * 4, 255 - RAMP * 4, RAMP * 0 + 30, RAMP * 0], -1).astype(np.uint8)

# name -> bytes, and the expected RGB levels
RIGHT = {
    "white_is_zero_16.tif": (tiff(WIDE, 0), grey(255 - WIDE / 257)),
    "black_is_zero_16.tif": (tiff(WIDE, 1), grey(WIDE / 257)),
    "big_endian_16.tif": (tiff(WIDE, 1, ">"), grey(WIDE / 257)),
    "white_is_zero_8.tif": (tiff((RAMP * 4).astype(np.uint8), 0), grey(255 - RAMP * 4)),
    "colours_16.tif": (tiff(colours(np.uint16), 2), colours(np.uint16).transpose(2, 0, 1) >> 8),
    "colours_16_big.tif": (tiff(colours(np.uint16), 2, ">"), colours(np.uint16).transpose(2, 0, 1) >> 8),
    "planar_8.tif": (tiff(colours(), 2, planar=True), EIGHT),
    "inks_16.tif": (
        tiff(INK.astype(np.uint16) * 257, 5),
        np.asarray(Image.fromarray(INK, "CMYK").convert("RGB")).transpose(2, 0, 1),
    ),
    "twelve_stated.tif": (tiff(RAMP * 65, 1, t281=4095), grey(RAMP * 65 / 4095 * 255)),
    "twelve_stated.png": (png(RAMP[..., None] * 65, 0, sBIT=b"\x0c"), grey(RAMP * 65 / 4095 * 255)),
    "black_16.png": (png(RAMP[..., None] * 0, 0), grey(RAMP * 0)),
    "dim_but_stated.pgm": (b"P5 8 8 65535\n" + (RAMP * 65).astype(">u2").tobytes(), grey(RAMP * 65 / 257)),
    "twelve.pgm": (b"P5 8 8 4095\n" + (RAMP * 65).astype(">u2").tobytes(), grey(RAMP * 65 / 4095 * 255)),
    "colours_16.png": (png(colours(np.uint16), 2), colours(np.uint16).transpose(2, 0, 1) >> 8),
    "transparent_grey_16.png": (png(WIDE[..., None], 0, tRNS=struct.pack(">H", 9 * 1040)), grey(CLEAR)),
    "transparent_grey_8.png": (
        png(RAMP[..., None] * 4, 0, 8, tRNS=struct.pack(">H", 36)),
        grey(np.where(RAMP == 9, 255, RAMP * 4)),
    ),
    "alpha_16.png": (
        png(np.stack([WIDE, np.full((8, 8), 32768)], -1), 4),
        grey((WIDE >> 8) * 128 / 255 + 127),
    ),
    "lab.tif": (tiff(np.full((8, 8, 3), (128, 60, 40), np.uint8), 8), np.reshape([214.0, 60, 56], (3, 1, 1))),
    "linear_gamma.png": (LINEAR, grey(to_srgb(RAMP * 4 / 255))),
    "plain_gamma.png": (png(grey(RAMP * 4).transpose(1, 2, 0), 2, 8, gAMA=struct.pack(">I", 45455)), grey(RAMP * 4)),
    "linear_called_srgb.png": (
        encoded(Image.fromarray(grey(RAMP * 4).transpose(1, 2, 0).astype(np.uint8)), icc_profile=profile(1, "sRGB")),
        grey(to_srgb(RAMP * 4 / 255)),
    ),
    "linear_grey.png": (
        encoded(Image.fromarray((RAMP * 4).astype(np.uint8)), icc_profile=profile(1, "sRGB grey", b"GRAY")),
        grey(to_srgb(RAMP * 4 / 255)),
    ),
    "true_srgb_of_another_name.png": (
        encoded(
            Image.fromarray(colours()),
            icc_profile=SRGB.replace("sRGB".encode("utf-16-be"), "what".encode("utf-16-be")),
        ),
        EIGHT,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_tones_agree_with_the_metadata(tmp_path, name):
    data, expected = RIGHT[name]
    image = only_image(zip_of(tmp_path / "a.zip", {name: data}), tmp_path / "out").astype(float)
    assert np.abs(image - expected).max() <= 2, name
    if (
        "gamma" not in name and "called" not in name and "linear" not in name
    ):  # ordinary profiles are only used by packing
        assert np.abs(decode_to_fit(data, (8, 8), 3).astype(float) - expected).max() <= 2, name


REFUSED = {
    "planar_16.tif": (tiff(colours(np.uint16), 2, planar=True), "samples of 16 bits in separate planes"),
    "signed_16.tif": (tiff((RAMP * 500).astype(np.int16), 1, t339=2), "signed samples"),
    "signed_8.tif": (tiff(RAMP.astype(np.int8), 1, t339=2), "signed samples"),
    "float.tif": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "no defined range"),
    "halves.tif": (tiff(RAMP.astype(np.float16), 1, t339=3), "TIFF that cannot be read: unknown pixel mode"),
    "twelve.tif": (tiff(RAMP * 65, 1), "its brightest sample is 4095 of 65535"),
    "twelve.png": (png(RAMP[..., None] * 65, 0), "its brightest sample is 4095 of 65535"),
    "twelve_colours.png": (png(colours(np.uint16) >> 4, 2), "its brightest sample is below 4096 of 65535"),
    "transparent_colour_16.png": (png(colours(np.uint16), 2, tRNS=bytes(6)), "transparent colour of 16 bits"),
    "hdr.png": (png(colours(), 2, 8, cICP=bytes([9, 16, 0, 1])), r"high dynamic range \(PQ\)"),
    "ycbcr.tif": (tiff(colours(), 6), "YCbCr samples without compression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_undefined_tones_are_rejected_by_name(tmp_path, name):
    data, message = REFUSED[name]
    source = zip_of(tmp_path / "a.zip", {name: data, "good.png": encoded(Image.new("RGB", (8, 8)))})
    report = packed(source, tmp_path / "out")
    assert (report.count, report.unreadable[0][0]) == (1, name)
    assert re.search(message, report.unreadable[0][1])
    with pytest.raises(BadPicture, match=message):
        decode_to_fit(data, (8, 8), 3)
