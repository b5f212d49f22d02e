"""Packing pictures of every kind and shape: the pixels that a reader of the dataset gets."""

import json
import struct

import numpy as np
import pytest
from packing import encoded, folder_of, noise, only_image, packed, zip_of
from PIL import Image, ImageCms

from stylegan_pg.data.datasets.opening import load_index

RED = (255, 0, 0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """Return an RGB profile that swaps red and blue."""
    data = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "qRGB".encode("utf-16-be"))


def paletted() -> bytes:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.paste(0, (0, 0, 8, 4))
    return encoded(picture, transparency=0)


def tiff_12_bits(value: int) -> bytes:
    """Return an 8x8 grey TIFF with 12 bits per sample, all equal to `value`. Pillow can read these but not write
    them."""
    strip = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * 32
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


KINDS = {
    "grey.png": (encoded(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "bilevel.png": (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "rgb.bmp": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "rgb.gif": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "GIF"), (1, 2, 3)),
    "rgb.webp": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
    "rgb.jpg": (encoded(Image.new("RGB", (8, 8), (90, 90, 90)), "JPEG"), (90, 90, 90)),
    "grey.JPEG": (encoded(Image.new("L", (8, 8), 90), "JPEG"), (90, 90, 90)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
    "cmyk.tif": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "TIFF"), (255, 0, 255)),
    "alpha.png": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
    "alpha.webp": (encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "greyalpha.png": (encoded(Image.new("LA", (8, 8), (0, 51))), (204, 204, 204)),
    "sixteen.png": (encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16))), (156, 156, 156)),
    "sixteen.tif": (encoded(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF"), (255, 255, 255)),
    "sixteen.pgm": (b"P5 8 8 65535\n" + b"\x01\x01" * 64, (1, 1, 1)),
    "twelve.tif": (tiff_12_bits(2048), (128, 128, 128)),
    "srgb.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=SRGB), RED),
    "profile.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=swapped_profile()), (0, 0, 255)),
    "profile_alpha.png": (encoded(Image.new("RGBA", (8, 8), (*RED, 255)), icc_profile=swapped_profile()), (0, 0, 255)),
    "broken_profile.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=b"nonsense" * 30), RED),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_becomes_srgb(tmp_path, name):
    data, colour = KINDS[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    image = only_image(tmp_path / "in", tmp_path / "out")
    assert image.dtype == np.uint8
    assert image.shape == (3, 8, 8)
    assert np.abs(image.astype(int) - np.reshape(colour, (3, 1, 1))).max() <= (1 if "profile" in name else 0)


def test_transparent_palette_is_composited_over_white(tmp_path):
    image = only_image(zip_of(tmp_path / "a.zip", {"p.png": paletted()}), tmp_path / "out")
    assert (image[:, :4] == 255).all()
    assert (image[:, 4:] == np.reshape((10, 200, 30), (3, 1, 1))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, orientation, format):
    upright = noise(0, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The stored picture is the inverse of the transformation that the tag requests.
    ways = Image.Transpose
    inverse = {2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE}
    inverse |= {6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270}
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    data = encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    image = only_image(zip_of(tmp_path / "a.zip", {f"a.{format.lower()}": data}), tmp_path / "out")
    np.testing.assert_array_equal(image, np.asarray(upright).transpose(2, 0, 1))


def test_sixteen_bits_are_rounded_without_clipping(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    image = only_image(zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.fromarray(values))}), tmp_path / "out")
    np.testing.assert_array_equal(image[0], np.round(values / 257))


@pytest.mark.parametrize(("channels", "format"), [(1, "jpg"), (1, "webp"), (1, "png"), (4, "png"), (4, "webp")])
def test_numbers_of_channels_and_formats(tmp_path, channels, format):
    source = np.full((64, 64, 4), (200, 100, 50, 255), np.uint8)
    source[:32, :, 3] = 128
    file = zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.fromarray(source)), "b.png": encoded(noise(1, 64))})
    packed(file, tmp_path / "out", 64, channels=channels, format=format)
    table = load_index(str(tmp_path / "out")).table(64)
    assert len({table.image(i).shape for i in range(2)} | {(channels, 64, 64)}) == 1
    luma = Image.new("RGB", (1, 1), (200, 100, 50)).convert("L").getpixel((0, 0))
    expected = (200, 100, 50, 255) if channels == 4 else (luma,)
    assert np.abs(table.image(0)[:, -1, -1].astype(int) - expected).max() <= 3
    if channels == 4:
        assert abs(int(table.image(0)[3, 0, 0]) - 128) <= 1
        assert (table.image(1)[3] == 255).all()  # an opaque alpha channel is added


def test_non_square_pictures(tmp_path):
    wide = Image.new("RGB", (16, 8), "black")
    wide.paste(RED, (4, 0, 12, 8))
    file = zip_of(tmp_path / "a.zip", {"wide.png": encoded(wide), "square.png": encoded(noise(0))})
    packed(file, tmp_path / "centre")
    image = load_index(str(tmp_path / "centre")).table(8).image(1)
    assert (image == np.reshape(RED, (3, 1, 1))).all()
    report = packed(file, tmp_path / "none", crop="none")
    assert report.count == 1
    assert report.unreadable == (("wide.png", "is 16x8 (width x height), not square, and crop = none"),)


def box_mean(top: np.ndarray, factor: int) -> np.ndarray:
    """Return means of factor x factor pixels: [H, W, C] -> float64."""
    h, w, c = top.shape
    return top.astype(np.float64).reshape(h // factor, factor, w // factor, factor, c).mean((1, 3))


# Sources of several sizes. (left, top, right, bottom) is their centred crop to a shape of 4 rows by 6 columns.
SHAPES = {
    "fits": ((48, 32), (0, 0, 48, 32)),
    "large": ((96, 64), (0, 0, 96, 64)),
    "high": ((48, 60), (0, 14, 48, 46)),
    "wide": ((100, 32), (26, 0, 74, 32)),
    "small": ((12, 30), (0, 11, 12, 19)),
    "uneven": ((50, 50), (0, 8, 50, 41)),  # 33 1/3 rows would be 6 for 4
}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_of_any_shape_on_a_base_of_four_by_six(tmp_path, channels, mode):
    """Compared with Pillow: convert, crop, resize once with a box filter, and average."""
    dice = np.random.default_rng(2)
    pictures = {}
    for name, (size, _) in SHAPES.items():
        pixels = dice.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        pixels[:, :, 3] |= 128 if channels == 4 else 255
        pictures[f"{name}.png"] = Image.fromarray(pixels)
    source = zip_of(tmp_path / "a.zip", {name: encoded(picture) for name, picture in pictures.items()})
    report = packed(source, tmp_path / "out", 32, base="4x6", channels=channels, filter="box", format="png")
    assert (report.count, report.upscaled, report.base) == (len(SHAPES), 1, (4, 6))
    assert "at 4x6, 8x12, 16x24, 32x48 rows x columns" in report.summary()
    index = load_index(str(tmp_path / "out"))
    assert (index.base, index.size_at(1024)) == ((4, 6), (1024, 1536))
    assert json.loads((tmp_path / "out" / "index.json").read_text())["base"] == [4, 6]
    for i, name in enumerate(sorted(pictures)):
        box = SHAPES[name.removesuffix(".png")][1]
        top = pictures[name].convert(mode).crop(box).resize((48, 32), Image.Resampling.BOX)
        expected = np.asarray(top).reshape(32, 48, channels)
        for resolution in index.resolutions:
            table = index.table(resolution)
            height, width = table.image_size
            assert (height, width) == (resolution, resolution * 6 // 4)
            if channels < 4:
                level = np.floor(box_mean(expected, 32 // resolution) + 0.5)
            else:  # means are premultiplied by alpha
                alpha = expected[:, :, 3:] / 255
                opaque = box_mean(alpha, 32 // resolution)
                colours = box_mean(expected[:, :, :3] * alpha, 32 // resolution) / opaque
                level = np.floor(np.concatenate([colours, opaque * 255], axis=2) + 0.5 + 1e-9)
            np.testing.assert_array_equal(table.image(i), level.transpose(2, 0, 1), err_msg=f"{name} {resolution}")


def test_transparency_does_not_bleed_into_lower_levels(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (*RED, 255)  # to the left, invisible black
    pixels[0, 7] = (0, 200, 0, 1)
    file = zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.fromarray(pixels[:, [0, 4, 1, 5, 2, 6, 3, 7]]))})
    half = only_image(file, tmp_path / "out", 4, channels=4, format="png")  # resized by Pillow
    packed(file, tmp_path / "two", 8, channels=4, format="png")
    low = load_index(str(tmp_path / "two")).table(4).image(0)
    assert low[:, 1, 0].tolist() == [255, 0, 0, 128]
    assert low[:, 3, 3].tolist() == [255, 0, 0, 128]
    assert half[:3, 1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("base", "size"), [("4x6", (16, 24)), ((6, 4), (24, 16)), ("5x3", (20, 12)), ("4x4", (16, 16))]
)
def test_padding_keeps_the_whole_picture(tmp_path, base, size):
    """A picture of exactly the packed height or width is padded without being resized."""
    height, width = size
    for name, shape in {"low": (height // 2, width), "narrow": (height, width // 2), "full": size}.items():
        pixels = np.random.default_rng(1).integers(0, 250, (*shape, 4), dtype=np.uint8)
        pixels[:, :, 3] = 255
        file = zip_of(tmp_path / f"{name}.zip", {"a.png": encoded(Image.fromarray(pixels))})
        for channels, blank in ((3, [255] * 3), (4, [255, 255, 255, 0])):
            out = tmp_path / f"{name}{channels}"
            report = packed(file, out, 16, base=base, crop="pad", channels=channels, format="png")
            image = load_index(str(out)).table(16).image(0).transpose(1, 2, 0)
            assert image.shape == (*size, channels)
            expected = np.full(image.shape, blank, np.uint8)
            y, x = (height - shape[0]) // 2, (width - shape[1]) // 2
            expected[y : y + shape[0], x : x + shape[1]] = pixels[:, :, :channels]
            np.testing.assert_array_equal(image, expected)
            assert report.upscaled == 0


def test_no_crop_accepts_shapes_that_are_exact_to_a_pixel(tmp_path):
    sizes = {"a": (24, 16), "b": (48, 32), "c": (25, 17), "d": (16, 24), "e": (30, 16)}  # 17 rows for 25.5 columns
    file = zip_of(tmp_path / "a.zip", {f"{k}.png": encoded(Image.new("RGB", v)) for k, v in sizes.items()})
    report = packed(file, tmp_path / "out", 16, base="4x6", crop="none")
    assert report.count == 3
    assert report.unreadable == (
        ("d.png", "is 16x24 (width x height), not 6 wide for 4 high, and crop = none"),
        ("e.png", "is 30x16 (width x height), not 6 wide for 4 high, and crop = none"),
    )


def test_small_pictures_are_enlarged_and_counted(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"], size=8)
    noise(3, 64).save(source / "c.png")
    report = packed(source, tmp_path / "out", 16)
    assert report.upscaled == 2
    assert "2 pictures were smaller than 16 pixels" in report.summary()
    assert packed(folder_of(tmp_path / "in2", ["a.png"], 16), tmp_path / "out2", 16).upscaled == 0


@pytest.mark.parametrize(("format", "filter"), [("jpg", "lanczos"), ("png", "box")])
def test_levels_are_box_means_of_the_uncompressed_top(tmp_path, format, filter):
    source = folder_of(tmp_path / "in", ["a.png"], 96)
    packed(source, tmp_path / "out", 64, format=format, filter=filter)
    index = load_index(str(tmp_path / "out"))
    assert index.resolutions == (4, 8, 16, 32, 64)
    method = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}[filter]
    top = np.asarray(noise(0, 96).resize((64, 64), method)).transpose(2, 0, 1).astype(np.float64)
    for resolution in (4, 8, 16, 32):
        factor = 64 // resolution
        means = top.reshape(3, resolution, factor, resolution, factor).mean((2, 4))
        np.testing.assert_array_equal(index.table(resolution).image(0), np.floor(means + 0.5))
    difference = np.abs(index.table(64).image(0) - top).mean()
    assert difference == 0 if format == "png" else 0 < difference < 5


def test_means_of_many_white_pixels_do_not_overflow(tmp_path):
    white = zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.new("L", (2048, 2048), 255))})
    packed(white, tmp_path / "out", 2048, channels=1)
    index = load_index(str(tmp_path / "out"))
    assert all((index.table(resolution).image(0) == 255).all() for resolution in index.resolutions)


def test_selected_levels_only(tmp_path):
    packed(folder_of(tmp_path / "in", ["a.png"]), tmp_path / "out", 16, lowest=8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json", "pictures.json", "r0008", "r0016", "report.json", "sources.json",
    ]  # fmt: skip
