"""Micrographs of every kind that is read without an extra, against what other libraries wrote."""

import io
import struct
import zlib
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
from PIL import Image

from emssl_hf.data.reading import (
    DepthError,
    UnreadableMicrograph,
    crop_databar,
    find_databar,
    read_header,
    read_micrograph,
    to_uint8,
    to_uint16,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
DEEP = RNG.integers(33069, 36864, (40, 50), dtype=np.uint16)


def saved(tmp_path: Path, image: Image.Image, name: str) -> Path:
    image.save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a.tif"])
def test_grey_formats_keep_every_value(tmp_path: Path, name: str) -> None:
    micrograph = read_micrograph(saved(tmp_path, Image.fromarray(GREY), name))
    assert micrograph.array.dtype == np.uint8 and micrograph.bits == 8
    np.testing.assert_array_equal(micrograph.array, GREY)


def test_jpeg_is_pillows_decoding(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(GREY), "a.jpg")
    np.testing.assert_array_equal(read_micrograph(path).array, np.asarray(Image.open(path)))


def test_path_string_bytes_and_image_agree(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(DEEP), "a.png")
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(read_micrograph(source).array, DEEP)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "float32"])
def test_tiff_of_any_depth_and_byte_order(tmp_path: Path, order: str, dtype: str) -> None:
    array = (DEEP.astype(np.int64) - 33000).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=order)
    read = read_micrograph(tmp_path / "a.tif").array
    assert read.dtype == np.dtype(dtype) and read.dtype.isnative
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgb_wrapped_grey_keeps_its_values(tmp_path: Path, planar: str) -> None:
    colour = np.repeat(DEEP[..., None], 3, axis=2)
    data = colour if planar == "contig" else np.moveaxis(colour, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "a.tif").array, DEEP)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colour_becomes_rec_601_luminance(tmp_path: Path, dtype: type) -> None:
    colour = RNG.integers(0, np.iinfo(dtype).max + 1, (20, 30, 3), dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    read = read_micrograph(tmp_path / "a.tif").array
    assert np.abs(read - colour @ [0.299, 0.587, 0.114]).max() < 1.01


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "lzw.tif"])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "RGBA", "LA"])
def test_other_colour_spaces_as_pillow_converts_them(tmp_path: Path, mode: str, name: str) -> None:
    if mode in ("RGBA", "LA") and name.endswith("jpg"):
        pytest.skip("JPEG has no alpha")
    colour = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    compression = {"compression": "tiff_lzw"} if name.startswith("lzw") else {}
    colour.save(tmp_path / name, **compression)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB").convert("L"))
    np.testing.assert_array_equal(read_micrograph(tmp_path / name).array, expected)


def test_palette_and_white_is_zero(tmp_path: Path) -> None:
    palette = saved(tmp_path, Image.fromarray(GREY).convert("P"), "p.tif")
    np.testing.assert_array_equal(read_micrograph(palette).array // 256, GREY)
    tifffile.imwrite(tmp_path / "w.tif", DEEP, photometric="miniswhite")
    np.testing.assert_array_equal(read_micrograph(tmp_path / "w.tif").array, 65535 - DEEP)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    Image.fromarray(DEEP).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "a.tif").array, DEEP)


def test_first_of_several_pages_and_the_rest_named(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(GREY)
        tif.write(DEEP)
    micrograph = read_micrograph(tmp_path / "a.tif")
    np.testing.assert_array_equal(micrograph.array, GREY)
    assert micrograph.other_pages == ("page 1",)


def test_mrc_section_and_voxel_size(tmp_path: Path) -> None:
    stack = RNG.normal(size=(3, 40, 50)).astype(np.float32)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(stack)
        mrc.voxel_size = 2.5
    micrograph = read_micrograph(tmp_path / "a.mrc")
    np.testing.assert_array_equal(micrograph.array, stack[0])
    assert micrograph.pixel_size == pytest.approx(2.5e-10)
    assert micrograph.other_pages == ("section 1", "section 2")


def zeiss_tiff(path: Path) -> None:
    """A TIFF with the text record of a Zeiss microscope in tag 34118."""
    lines = [
        "",
        "AP_PIXEL_SIZE",
        "Pixel Size = 111.6 nm",
        "AP_IMAGE_PIXEL_SIZE",
        "Image Pixel Size = 6.57 nm",
    ]
    record = "\r\n".join([*lines, "AP_MAG", "Mag = 17.00 K X", ""]).encode("cp1252")
    tifffile.imwrite(path, GREY, extratags=[(34118, 7, len(record), record, True)])


def test_zeiss_pixel_size_is_that_of_the_image(tmp_path: Path) -> None:
    zeiss_tiff(tmp_path / "a.tif")
    assert read_micrograph(tmp_path / "a.tif").pixel_size == pytest.approx(6.57e-9)
    header = read_header(tmp_path / "a.tif")
    assert (header.width, header.height, header.pixel_size) == (50, 40, pytest.approx(6.57e-9))


def test_resolution_counts_only_with_a_real_unit(tmp_path: Path) -> None:
    def size(**options: object) -> float | None:
        tifffile.imwrite(tmp_path / "a.tif", GREY, **options)
        return read_micrograph(tmp_path / "a.tif").pixel_size

    assert size(imagej=True, resolution=(200.0, 200.0), metadata={"unit": "um"}) == pytest.approx(5e-9)
    assert size(imagej=True, resolution=(72.0, 72.0)) is None
    assert size(resolution=(72, 72), resolutionunit="INCH") is None
    assert size(resolution=(1e6, 1e6), resolutionunit="CENTIMETER") == pytest.approx(1e-8)


def test_truncated_and_foreign_files_say_so_in_one_sentence(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.tile(GREY, (8, 8))).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("not an image at all")
    (tmp_path / "empty.png").touch()
    deep = io.BytesIO()
    tifffile.imwrite(deep, DEEP)
    (tmp_path / "cut.tif").write_bytes(deep.getvalue()[:-2000])
    for name in ("cut.jpg", "text.jpg", "empty.png", "cut.tif", "absent.tif"):
        with pytest.raises(UnreadableMicrograph, match=name) as caught:
            read_micrograph(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_huge_declared_sizes_are_refused_before_decoding(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "bomb.tif", GREY)
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+") as tif:
        for tag in ("ImageWidth", "ImageLength"):
            tif.pages.first.tags[tag].overwrite(60000)
    header = struct.pack(">II5B", 60000, 60000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
    for name in ("bomb.tif", "bomb.png"):
        with pytest.raises(UnreadableMicrograph, match="60000 x 60000"):
            read_micrograph(tmp_path / name)
    path = saved(tmp_path, Image.fromarray(GREY), "a.png")
    with pytest.raises(UnreadableMicrograph, match="50 x 40 pixels, more than the limit of 1,999"):
        read_micrograph(path, max_pixels=1999)
    assert read_micrograph(path, max_pixels=2000).array.shape == (40, 50)


def test_formats_of_the_extra_name_it(tmp_path: Path) -> None:
    (tmp_path / "a.dm3").write_bytes(b"\0\0\0\3" + bytes(300))
    try:
        import rsciio  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UnreadableMicrograph, match=r"pip install 'emssl-hf\[em\]'"):
            read_micrograph(tmp_path / "a.dm3")
    else:
        with pytest.raises(UnreadableMicrograph, match=r"a\.dm3"):
            read_micrograph(tmp_path / "a.dm3")


def with_bar(image: np.ndarray, top: int, bottom: int, ground: int) -> np.ndarray:
    """A bar of one grey value over the whole width with some print on it."""
    image = image.copy()
    image[top:bottom] = ground
    for row in range(top + 6, bottom - 6, 8):
        image[row : row + 3, 40:300:6] = 255 - ground
    return image


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_white_bar_with_image_below_and_black_bar_at_the_edge(dtype: type) -> None:
    image = RNG.integers(20, 200, (768, 1024)).astype(dtype)
    assert find_databar(image) is None
    assert find_databar(with_bar(image, 640, 700, 255)) == (640, 0, 700, 1024)
    assert find_databar(with_bar(image, 700, 768, 0)) == (700, 0, 768, 1024)
    assert find_databar(with_bar(image, 300, 360, 255)) is None
    cropped = crop_databar(with_bar(image, 640, 700, 255), (640, 0, 700, 1024))
    np.testing.assert_array_equal(cropped, image[:640])


def test_bright_or_black_ground_is_no_bar() -> None:
    image = RNG.integers(0, 200, (768, 1024)).astype(np.uint8)
    for level in (0, 255):
        saturated = image.copy()
        saturated[500:] = level
        assert find_databar(saturated) is None
    assert find_databar(np.full((768, 1024), 255, np.uint8)) is None


def test_bars_of_real_nffa_images() -> None:
    files = sorted((SHARED / "nffa_sample").glob("*/*.jpg"))
    if not files:
        pytest.skip("the real micrographs are not here")
    for file in files:
        micrograph = read_micrograph(file)
        if micrograph.array.shape == (600, 1024):
            assert micrograph.databar is None, file
        else:
            assert micrograph.databar is not None, file
            top, _, bottom, _ = micrograph.databar
            assert 600 <= top <= 680 and 56 <= bottom - top <= 80, file
    for file in (SHARED / "superalloy_seg").glob("*/images/*.png"):
        assert read_micrograph(file).databar is None, file


def test_sixteen_bit_range_keeps_its_levels() -> None:
    narrow, stretch = to_uint8(DEEP)
    assert len(np.unique(narrow)) > 200 and narrow.min() == 0 and narrow.max() == 255
    assert 33069 <= stretch.low < stretch.high <= 36863
    restored = stretch.low + narrow / 255 * (stretch.high - stretch.low)
    assert np.abs(restored - DEEP).max() < 0.02 * (36863 - 33069)
    wide, same = to_uint16(DEEP)
    assert same == stretch and wide.min() == 0 and wide.max() == 65535
    inside = (stretch.low <= DEEP) & (stretch.high >= DEEP)
    assert inside.mean() > 0.99 and len(np.unique(wide[inside])) == len(np.unique(DEEP[inside]))


def test_eight_bits_stay_and_constant_images_pass() -> None:
    assert np.shares_memory(to_uint8(GREY)[0], GREY)
    np.testing.assert_array_equal(to_uint16(GREY)[0], GREY * np.uint16(257))
    for dtype in (np.uint16, np.float32):
        assert not to_uint8(np.full((9, 9), 40000, dtype))[0].any()


def test_conversions_that_ruin_an_image_are_refused() -> None:
    with pytest.raises(DepthError, match="clips"):
        to_uint8(DEEP, stretch=(10, 90))
    outliers = DEEP.astype(np.float32)
    outliers[0, :10] = 1e7
    with pytest.raises(DepthError, match="uint16"):
        to_uint8(outliers)


def test_not_a_number_becomes_black() -> None:
    broken = RNG.normal(size=(40, 50)).astype(np.float32)
    broken[3, 3] = np.nan
    assert to_uint8(broken)[0][3, 3] == 0
    with pytest.raises(DepthError, match="finite"):
        to_uint8(np.full((4, 4), np.nan, np.float32))
