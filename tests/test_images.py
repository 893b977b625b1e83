import numpy as np
import pytest
import torch
from PIL import Image

from hotdog_hf.data import transforms
from hotdog_hf.data.images import Photo, decode_image, describe_preprocessing, resize_and_crop
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


@pytest.fixture(scope="module")
def phone_photo(tmp_path_factory):
    """A JPEG whose sides are no multiples of 8, turned by EXIF: 1003 x 1341 pixels upright."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (14, 11, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("phone") / "phone.jpg"
    save_exif(path, noise.resize((1341, 1003), Image.Resampling.BICUBIC), orientation=6)
    return path


def test_a_photo_is_decoded_at_the_smallest_size_that_is_twice_what_is_needed(phone_photo):
    assert Photo(phone_photo).size == decode_image(phone_photo).size == (1003, 1341)
    for needed, min_area, reduction, size in [
        ((62, 62), None, 8, (126, 168)),  # 1003 / 8 is at least 2 x 62
        ((63, 63), None, 4, (251, 336)),
        ((62, 84), None, 4, (251, 336)),  # 1341 / 8 is less than 2 x 84
        ((250, 250), None, 2, (502, 671)),
        ((502, 62), None, 1, (1003, 1341)),
        ((144, 144), 1.0, 8, (126, 168)),  # a square of that area has sides of 1159 = 8 x 144.9
        ((145, 145), 1.0, 4, (251, 336)),
        ((72, 72), 0.25, 8, (126, 168)),  # of 579
        ((56, 73), 0.25, 4, (251, 336)),
    ]:
        photo = Photo(phone_photo.read_bytes())
        assert photo.reduction_for(needed, min_area) == reduction
        assert photo.decode(reduction).size == size
    with pytest.raises(UserError, match=r"cut\.jpg"):
        cut = phone_photo.with_name("cut.jpg")
        cut.write_bytes(phone_photo.read_bytes()[:-2000])
        Photo(cut).decode(8)


def test_other_formats_are_never_reduced(tmp_path):
    Image.new("RGB", (640, 640)).save(tmp_path / "large.png")
    assert Photo(tmp_path / "large.png").reduction_for((16, 16)) == 1
    assert Photo(Image.new("RGB", (640, 640))).reduction_for((16, 16)) == 1


CONFIG = {
    "input_size": (3, 56, 56),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.875,
}


@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
def test_evaluation_sees_a_reduced_photo_almost_as_the_full_one(phone_photo, crop_mode):
    config = CONFIG | {"crop_mode": crop_mode}
    full = resize_and_crop(decode_image(phone_photo), config).astype(int)
    small = resize_and_crop(Photo(phone_photo), config)
    assert not np.array_equal(small, full)  # so it was reduced
    assert np.abs(small - full).mean() < 3  # a size is rounded differently: of noise, 1.1 to 2.2
    transformed = transforms.eval_transform(config).pixels(Photo(phone_photo))
    assert np.array_equal(transformed.permute(1, 2, 0).numpy(), small)  # training and prediction agree


def test_a_crop_is_the_same_part_of_a_reduced_photo(phone_photo):
    crop, reductions = transforms.train_transform(CONFIG), set()
    for seed in range(12):
        full = crop.pixels(decode_image(phone_photo), seed).numpy().astype(int)
        photo = Photo(phone_photo)
        decode = photo.decode
        photo.decode = lambda reduction, decode=decode: reductions.add(reduction) or decode(reduction)
        small = crop.pixels(photo, seed).numpy()
        assert np.abs(small - full).mean() < 2.5
    assert reductions == {crop.reduction(Photo(phone_photo))} == {4}


def test_a_photo_that_needs_no_reduction_keeps_its_bits(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 223, 3), dtype=np.uint8)
    save_exif(tmp_path / "small.jpg", Image.fromarray(noise), orientation=8)
    crop, whole = transforms.train_transform(CONFIG), transforms.eval_transform(CONFIG)
    for transform in (crop, whole):
        full = transform.pixels(decode_image(tmp_path / "small.jpg"), 1)
        assert torch.equal(transform.pixels(Photo(tmp_path / "small.jpg"), 1), full)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("squash", "resized to 50 x 40 pixels whatever their aspect ratio (bicubic)"),
        (None, "resized to cover 50 x 40 pixels with their aspect ratio kept (bicubic)"),
        ("border", "resized to fit into 50 x 40 pixels with their aspect ratio kept (bicubic)"),
    ],
)
def test_preprocessing_is_told_in_words(mode, words):
    config = {"input_size": (3, 32, 40), "crop_pct": 0.8, "crop_mode": mode, "interpolation": "bicubic"}
    told = describe_preprocessing(config | {"mean": (0.5, 0.25, 1 / 3), "std": (1, 1, 0.125)})
    assert told.startswith(f"{words}, the central 40 x 32 cropped, normalised by mean (0.5, 0.25, 0.3333)")
