import numpy as np
import pytest
from PIL import Image

from hotdog_hf.data.images import decode_image
from hotdog_hf.errors import UserError


def save_exif(path, image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=100, subsampling=0)


def test_decode_applies_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    save_exif(tmp_path / "rotated.jpg", image, orientation=6)  # the camera was turned a quarter
    decoded = decode_image(tmp_path / "rotated.jpg")
    assert decoded.size == (20, 40)
    assert decoded.getpixel((10, 5))[2] > 200 and decoded.getpixel((10, 35))[0] > 200


def half_transparent(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    return image.convert(mode) if mode != "RGBA" else image


@pytest.mark.parametrize(
    ("image", "pixel", "expected"),
    [
        (half_transparent("RGBA"), (1, 1), (255, 255, 255)),
        (half_transparent("RGBA"), (0, 0), (255, 0, 0)),
        (half_transparent("LA"), (1, 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 65535, np.uint16)), (0, 0), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), (0, 0), (128, 128, 128)),
        (Image.new("L", (4, 4), 77), (0, 0), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (0, 0), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (0, 0), (255, 0, 0)),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), (0, 0), (128, 128, 128)),
    ],
)
def test_decode_brings_every_mode_to_rgb(tmp_path, image, pixel, expected):
    path = tmp_path / ("image.tif" if image.mode in ("CMYK", "F") else "image.png")
    image.save(path)
    decoded = decode_image(path)
    assert decoded.mode == "RGB" and decoded.getpixel(pixel) == expected
    assert decode_image(path.read_bytes()).tobytes() == decoded.tobytes()


def test_decode_lays_a_transparent_palette_on_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.save(tmp_path / "p.png", transparency=1)
    assert decode_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_decode_survives_a_broken_exif_block_and_names_a_broken_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00garbage")
    assert decode_image(tmp_path / "exif.jpg").size == (8, 8)
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.jpg"):
        decode_image(tmp_path / "page.jpg")
