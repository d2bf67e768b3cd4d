"""Every kind of image file is read upright or refused in one sentence; augmentations; batches that repeat themselves."""
import io
import pickle
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import v2

from guie import images
from guie.images import AUGMENTATIONS, ImageDataset, augmentation, loader, read_image


def picture(width, height, seed=0):
    """A smooth random image, so that resizing and JPEG keep its colours: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(image, format, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def difference(image, expected):
    return np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).mean()


BASE = picture(64, 48)
SMALL = np.asarray(Image.fromarray(BASE).resize((16, 16), Image.Resampling.BICUBIC))
GREY = np.asarray(Image.fromarray(BASE).convert('L'))
GREY_SMALL = np.repeat(np.asarray(Image.fromarray(GREY).resize((16, 16), Image.Resampling.BICUBIC))[..., None], 3, 2)
HALF = np.dstack([BASE, np.where(np.arange(64) < 32, 255, 0)[None].repeat(48, 0)]).astype(np.uint8)  # right: clear
WHITE_RIGHT = np.where(np.arange(16)[None, :, None] < 8, SMALL, 255)
JPEG = encode(BASE, 'JPEG', quality=95)
PNG = encode(BASE, 'PNG')


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def with_chunks(png, *chunks, after=b'IHDR'):
    """A PNG with more chunks."""
    place = png.index(after) - 4
    place += 12 + int.from_bytes(png[place:place + 4], 'big')
    return png[:place] + b''.join(chunks) + png[place:]


def deep_grey(bits):
    """GREY as numbers of so many bits, in 16."""
    return (GREY.astype(np.float32) / 255 * (2**bits - 1)).round().astype(np.uint16)


def grey_with_clear_half():
    """A PNG of 16 bits whose right half is of the one grey that is transparent."""
    pixels = GREY.astype(np.uint16) * 257
    pixels[:, 32:] = 7
    return with_chunks(encode(Image.fromarray(pixels), 'PNG'), chunk(b'tRNS', struct.pack('>H', 7)))


def float_grey(white, **pixels):
    """A TIFF of floats from 0 to `white`, with some odd ones in a corner."""
    values = GREY.astype(np.float32) / 255 * white
    values.flat[:len(pixels)] = [*pixels.values()]
    return encode(Image.fromarray(values), 'TIFF')


def png_of_size(width, height):
    """A PNG that only claims a size; its pixels are missing."""
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'\0'))
        + chunk(b'IEND', b'')
    )


def jpeg_of_size(width, height, progressive=False):
    start = JPEG.index(b'\xff\xc0')
    kind = b'\xff\xc2' if progressive else b'\xff\xc0'
    return JPEG[:start] + kind + JPEG[start + 2:start + 5] + struct.pack('>HH', height, width) + JPEG[start + 9:]


def palette(**options):
    return encode(Image.fromarray(BASE).quantize(64), 'PNG', **options)


def palette_with_alpha():
    image = Image.fromarray(HALF).quantize(64, method=Image.Quantize.FASTOCTREE)
    assert image.palette.mode == 'RGBA'
    return encode(image, 'PNG')


def key_colour():
    pixels = BASE.copy()
    pixels[:, 32:] = (1, 2, 3)
    return encode(pixels, 'PNG', transparency=(1, 2, 3))


def with_exif(orientation, pixels=BASE):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, 'JPEG', quality=95, exif=exif)


MUCH = zlib.compress(bytes(2_000_000))
JPEG_108 = encode(Image.new('L', (12000, 9000), 99), 'JPEG')
MOVING = {'save_all': True, 'append_images': [Image.new('RGB', (64, 48), 'red')]}
READABLE = {  # bytes, what they must look like at 16 × 16, mean absolute tolerance
    'JPEG': (JPEG, SMALL, 3),
    'progressive JPEG': (encode(BASE, 'JPEG', quality=95, progressive=True), SMALL, 3),
    'greyscale JPEG': (encode(GREY, 'JPEG', quality=95), GREY_SMALL, 3),
    'CMYK JPEG': (encode(Image.fromarray(BASE).convert('CMYK'), 'JPEG', quality=95), SMALL, 4),
    'JPEG with an appended trailer': (JPEG + b'trailing bytes', SMALL, 3),
    'JPEG with broken EXIF': (encode(BASE, 'JPEG', quality=95, exif=b'Exif\0\0II*\0\xff\xff\xff\xff' + bytes(8)), SMALL, 3),
    'EXIF orientation 0': (with_exif(0), SMALL, 3),
    'EXIF orientation 9': (with_exif(9), SMALL, 3),
    'PNG': (PNG, SMALL, 1),
    'greyscale PNG': (encode(GREY, 'PNG'), GREY_SMALL, 1),
    'PNG of 16 bits': (encode(Image.fromarray(GREY.astype(np.uint16) * 257), 'PNG'), GREY_SMALL, 1),
    'TIFF of 16 bits': (encode(Image.fromarray(GREY.astype(np.uint16) * 257), 'TIFF'), GREY_SMALL, 1),
    'TIFF of 32 bits, white beyond 16': (
        encode(Image.fromarray(np.full((9, 9), 2**20, np.int32)), 'TIFF'), np.full((16, 16, 3), 255), 0),
    **{f'{kind} of {bits} bits in 16': (encode(Image.fromarray(deep_grey(bits)), kind), GREY_SMALL, 1)
       for bits in (8, 10, 12, 14) for kind in ('PNG', 'TIFF')},
    'TIFF of floats 0 to 1': (float_grey(1), GREY_SMALL, 1),
    'TIFF of floats a little above 1': (float_grey(1, overshoot=1.04), GREY_SMALL, 1),
    'TIFF of floats 0 to 255': (float_grey(255), GREY_SMALL, 1),
    'TIFF of floats, some no numbers': (float_grey(1, none=np.nan, below=-np.inf), GREY_SMALL, 6),
    'TIFF of floats, infinite is white': (encode(Image.fromarray(np.full((9, 9), np.inf, np.float32)), 'TIFF'),
                                          np.full((16, 16, 3), 255), 0),
    'TIFF of CMYK': (encode(Image.fromarray(BASE).convert('CMYK'), 'TIFF'), SMALL, 1),
    'TIFF of palette and alpha': (encode(Image.fromarray(GREY).convert('PA'), 'TIFF'), GREY_SMALL, 1),
    'PNG of 16 bits with a transparent grey': (
        grey_with_clear_half(), np.where(np.arange(16)[None, :, None] < 8, GREY_SMALL, 255), 4),
    'PNG with a megabyte of text': (with_chunks(PNG, chunk(b'zTXt', b'key\0\0' + MUCH)), SMALL, 1),
    'PNG with a megabyte of text at its end': (
        with_chunks(PNG, chunk(b'iTXt', b'key\0\1\0\0\0' + MUCH), after=b'IDAT'), SMALL, 1),
    'PNG with a profile of a megabyte': (with_chunks(PNG, chunk(b'iCCP', b'key\0\0' + MUCH)), SMALL, 1),
    'PNG with many texts': (with_chunks(PNG, *[chunk(b'tEXt', b'key\0' + bytes(9_000_000))] * 8), SMALL, 1),
    'PNG with much text and a transparent colour': (
        with_chunks(key_colour(), chunk(b'zTXt', b'key\0\0' + MUCH)), WHITE_RIGHT, 4),
    'JPEG of 108 megapixels': (JPEG_108, np.full((16, 16, 3), 99), 1),
    'progressive JPEG of 108 megapixels': (
        encode(Image.new('L', (12000, 9000), 99), 'JPEG', progressive=True), np.full((16, 16, 3), 99), 1),
    'JPEG of 200 megapixels': (encode(Image.new('L', (16320, 12240), 99), 'JPEG'), np.full((16, 16, 3), 99), 1),
    'AVIF': (encode(BASE, 'AVIF', quality=95) if 'AVIF' in Image.SAVE else PNG, SMALL, 4),
    'JPEG 2000': (encode(BASE, 'JPEG2000') if 'JPEG2000' in Image.SAVE else PNG, SMALL, 3),
    'PPM': (encode(BASE, 'PPM'), SMALL, 1),
    'black and white PNG': (encode(Image.fromarray(GREY > 127), 'PNG'),
                            np.asarray(Image.fromarray(GREY > 127).convert('RGB').resize((16, 16), 3)), 1),
    'RGBA PNG': (encode(HALF, 'PNG'), WHITE_RIGHT, 4),
    'greyscale with alpha': (encode(Image.fromarray(HALF).convert('LA'), 'PNG'),
                             np.where(np.arange(16)[None, :, None] < 8, GREY_SMALL, 255), 4),
    'palette PNG': (palette(), SMALL, 12),
    'palette with alpha': (palette_with_alpha(), WHITE_RIGHT, 24),
    'PNG with a transparent colour': (key_colour(), WHITE_RIGHT, 4),
    'animated GIF, first frame': (encode(BASE, 'GIF', **MOVING), SMALL, 8),
    'animated WebP, first frame': (encode(BASE, 'WEBP', lossless=True, **MOVING), SMALL, 1),
    'animated PNG, first frame': (encode(BASE, 'PNG', **MOVING), SMALL, 1),
    'MPO of a phone': (encode(BASE, 'MPO', quality=95, **MOVING), SMALL, 3),
    'BMP': (encode(BASE, 'BMP'), SMALL, 1),
    '1 × 1': (encode(np.full((1, 1, 3), 77, np.uint8), 'PNG'), np.full((16, 16, 3), 77), 0),
    '20000 × 3': (encode(np.full((3, 20000, 3), 77, np.uint8), 'JPEG'), np.full((16, 16, 3), 77), 1),
    '3 × 20000': (encode(np.full((20000, 3, 3), 77, np.uint8), 'PNG'), np.full((16, 16, 3), 77), 0),
}
UNREADABLE = {  # bytes, what the sentence says
    **{f'JPEG cut after {percent} %': (JPEG[:len(JPEG) * percent // 100], '')
       for percent in (1, 5, 10, 20, 30, 45, 60, 75, 90, 98)},
    'PNG cut': (PNG[: len(PNG) // 2], 'truncated'),
    'PNG with a flipped byte': (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], ''),
    'WebP cut': (encode(BASE, 'WEBP')[:40], ''),
    'GIF cut': (encode(BASE, 'GIF')[:900], 'truncated'),
    'TIFF cut': (encode(BASE, 'TIFF')[:100], ''),
    'zero bytes': (b'', 'cannot identify'),
    'HTML named .jpg': (b'<!DOCTYPE html><html><body>404 Not Found</body></html>', 'cannot identify'),
    'text': (b'not an image', 'cannot identify'),
    'zeros': (bytes(5000), 'cannot identify'),
    'SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'cannot identify'),
    'PostScript, which Pillow would hand to another program': (encode(BASE, 'EPS'), 'cannot identify'),
    'a bomb just above the limit': (png_of_size(10_000, 8_901), '10000 × 8901 pixels are more than 89,000,000'),
    'a PNG bomb': (png_of_size(50_000, 50_000), 'pixels'),
    'a JPEG bomb': (jpeg_of_size(65_000, 65_000), '65000 × 65000 pixels are more than 712,000,000'),
    'a progressive JPEG bomb': (jpeg_of_size(20_000, 20_000, progressive=True), 'pixels are more than 356,000,000'),
    'a PNG bomb with much text': (
        with_chunks(png_of_size(50_000, 50_000), chunk(b'zTXt', b'key\0\0' + MUCH)), 'pixels'),
    'a cut PNG with much text': (with_chunks(PNG, chunk(b'zTXt', b'key\0\0' + MUCH))[:-99], 'truncated|broken'),
    'a header without pixels': (png_of_size(100, 100), ''),
}


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
@pytest.mark.parametrize('content, expected, tolerance', READABLE.values(), ids=READABLE)
def test_every_readable_kind_of_image_becomes_a_small_rgb_square(tmp_path, content, expected, tolerance):
    (tmp_path / 'image.jpg').write_bytes(content)
    image = read_image(tmp_path / 'image.jpg', 16)
    assert image.mode == 'RGB' and image.size == (16, 16)
    assert difference(image, expected) <= tolerance
    assert (tmp_path / 'image.jpg').read_bytes() == content


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning', 'ignore:Truncated File Read')
@pytest.mark.parametrize('content, reason', UNREADABLE.values(), ids=UNREADABLE)
def test_every_unreadable_image_is_one_sentence_with_its_path(tmp_path, content, reason):
    (tmp_path / 'image.jpg').write_bytes(content)
    with pytest.raises(OSError, match=reason or 'cannot be read') as error:
        read_image(tmp_path / 'image.jpg', 16)
    message = str(error.value)
    assert message.startswith(f'The image {tmp_path}/image.jpg cannot be read: ') and '\n' not in message
    assert (tmp_path / 'image.jpg').read_bytes() == content


@pytest.mark.parametrize('path', ['absent.jpg', '.', 'nul\0.jpg'])
def test_a_path_that_is_no_file_is_named(tmp_path, path):
    with pytest.raises(OSError, match='The image .* cannot be read'):
        read_image(tmp_path / path, 16)


def test_reading_leaves_pillows_global_switches_alone(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / 'image.jpg').write_bytes(JPEG)
    read_image(tmp_path / 'image.jpg', 16)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_a_large_jpeg_that_cannot_be_reduced_enough_is_refused(tmp_path):
    (tmp_path / 'image.jpg').write_bytes(JPEG_108)
    with pytest.raises(OSError, match='12000 × 9000 pixels are more than 89,000,000'):
        read_image(tmp_path / 'image.jpg', 5000)


@pytest.mark.parametrize('suffix', ['jpg', 'jpeg', 'jpe', 'jfif', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'mpo', 'ppm'])
def test_a_suffix_that_pillow_reads_here_is_an_images(suffix):
    assert suffix in images.image_suffixes()


@pytest.mark.parametrize('suffix', ['eps', 'ps', 'pdf', 'wmf', 'emf', 'grib', 'h5', 'mpeg', 'svg', 'txt', ''])
def test_a_suffix_of_what_is_no_image_or_would_run_another_program_is_none(suffix):
    assert suffix not in images.image_suffixes()


def test_a_plugin_that_the_user_registered_is_taken_and_a_missing_one_is_named(tmp_path, monkeypatch):
    for table in ('OPEN', 'EXTENSION', 'ID'):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())
    for suffix in [suffix for suffix, name in Image.EXTENSION.items() if name == 'HEIF']:
        del Image.EXTENSION[suffix]  # where the plugin is installed
    Image.OPEN.pop('HEIF', None)
    (tmp_path / 'image.HEIC').write_bytes(b'\0\0\0\x18ftypheic')
    with pytest.raises(OSError, match='cannot be read: .* \\(files of this kind need pillow-heif\\)$'):
        read_image(tmp_path / 'image.HEIC', 16)
    assert 'heic' not in images.image_suffixes()
    Image.register_open('HEIF', lambda file, name: Image.open(io.BytesIO(PNG)), lambda start: start[4:12] == b'ftypheic')
    Image.register_extension('HEIF', '.heic')
    assert 'heic' in images.image_suffixes() and difference(read_image(tmp_path / 'image.HEIC', 16), SMALL) <= 1


STORED = {  # orientation -> how the upright picture lies in the file
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('width, height', [(64, 48), (123, 89)])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, width, height):
    upright = picture(width, height)
    content = with_exif(orientation, np.ascontiguousarray(STORED[orientation](upright)))
    (tmp_path / 'image.jpg').write_bytes(content)
    image = read_image(tmp_path / 'image.jpg', 16)
    expected = Image.fromarray(upright).resize((16, 16), Image.Resampling.BICUBIC)
    assert difference(image, expected) < 3
    pillow = ImageOps.exif_transpose(Image.open(tmp_path / 'image.jpg')).resize((16, 16), Image.Resampling.BICUBIC)
    assert difference(image, pillow) < 2


@pytest.mark.parametrize(
    'suffix, width, height, size',
    [('png', 320, 240, 64), ('png', 97, 131, 32), ('png', 20, 30, 64), ('png', 64, 64, 64), ('jpg', 127, 127, 64)],
)
def test_resizing_equals_pillows_antialiased_bicubic(tmp_path, suffix, width, height, size):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f'image.{suffix}')
    with Image.open(tmp_path / f'image.{suffix}') as image:
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(read_image(tmp_path / f'image.{suffix}', size)) - expected).max() <= 2


@pytest.mark.parametrize('width, height, size', [(640, 427, 80), (641, 427, 106), (427, 640, 50), (600, 599, 37)])
def test_reduced_jpeg_decoding_stays_within_two_levels(tmp_path, width, height, size):
    rng = np.random.default_rng(0)  # detail at every scale, as in a photograph
    layers = [
        Image.fromarray(rng.integers(0, 256, (height // step + 1, width // step + 1, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for step in (2, 4, 8, 16, 32, 64)
    ]
    pixels = np.average([np.asarray(layer) for layer in layers], axis=0, weights=[1, 2, 4, 8, 16, 32])
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'image.jpg', quality=90)
    with Image.open(tmp_path / 'image.jpg') as image:
        expected = image.resize((size, size), Image.Resampling.BICUBIC)
    image = read_image(tmp_path / 'image.jpg', size)
    assert 0 < difference(image, expected) <= 2  # 0: it was not reduced


@pytest.mark.parametrize(
    'width, height, size, decoded',
    [
        (640, 640, 321, (640, 640)),  # half would leave less than twice 321
        (640, 640, 320, (640, 640)),
        (640, 640, 160, (320, 320)),
        (640, 640, 161, (640, 640)),
        (640, 427, 80, (320, 214)),  # the shorter side decides
        (640, 427, 53, (160, 107)),
        (427, 640, 54, (214, 320)),
        (1600, 1203, 50, (200, 151)),
        (1600, 1203, 10, (200, 151)),  # an eighth is the least there is
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_twice_the_side(
    tmp_path, monkeypatch, width, height, size, decoded
):
    seen, squash = [], images.squash
    monkeypatch.setattr(images, 'squash', lambda image, *rest: (seen.append(image.size), squash(image, *rest))[1])
    Image.new('RGB', (width, height), 'red').save(tmp_path / 'image.jpg')
    assert read_image(tmp_path / 'image.jpg', size).size == (size, size)
    assert seen == [decoded]


@pytest.mark.parametrize('side, size', [(47, 96), (49, 16), (55, 224), (83, 224), (98, 16)])
def test_a_side_whose_scale_rounds_down_still_gives_the_whole_square(side, size):
    square = images.squash(Image.new('RGB', (side, side)), size, (0, 0, side, side))
    assert square.shape == (size, size, 3)


def test_reduced_decoding_does_not_shift_the_picture(tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 205)[None, :, None], 205, 0).repeat(3, 2)  # at 1/4: 52 columns, 51.25 of picture
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / 'image.jpg', quality=100)
    image = np.asarray(read_image(tmp_path / 'image.jpg', 25)).astype(float)
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).resize((25, 25), Image.Resampling.BICUBIC))
    assert np.abs(image[:, 2:-2] - expected[:, 2:-2]).max() < 2


# Augmentations

SIDE = 50
WHITE = Image.new('RGB', (SIDE, SIDE), 'white')
COLOURS = Image.fromarray(picture(SIDE, SIDE))


def drawn(name, image, count, seed=0):
    transform = augmentation(name)
    torch.manual_seed(seed)
    return torch.stack([transform(image) for _ in range(count)])


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_an_augmentation_gives_uint8_of_its_input_size_by_torchs_generator_alone(name):
    random.seed(1)
    np.random.seed(1)
    first = drawn(name, COLOURS, 12)
    random.seed(2)
    np.random.seed(2)
    again = drawn(name, COLOURS, 12)
    assert first.dtype == torch.uint8 and first.shape == (12, 3, SIDE, SIDE)
    assert torch.equal(first, again)
    assert torch.equal(first, drawn(name, COLOURS, 12, seed=3)) == (name == 'none')


def test_none_changes_nothing():
    assert torch.equal(drawn('none', COLOURS, 1)[0], torch.tensor(np.asarray(COLOURS)).permute(2, 0, 1))


def test_flip_mirrors_half_of_the_images_and_does_nothing_else():
    original = drawn('none', COLOURS, 1)[0]
    images = drawn('flip', COLOURS, 300)
    flipped = sum(torch.equal(image, original.flip(-1)) for image in images)
    assert flipped + sum(torch.equal(image, original) for image in images) == 300
    assert 120 < flipped < 180  # 3.5 standard deviations


def test_autoaugment_is_torchvisions_imagenet_policy():
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
    images = drawn('autoaugment', COLOURS, 40)
    torch.manual_seed(0)
    assert torch.equal(images, torch.stack([v2.functional.pil_to_tensor(policy(COLOURS)) for _ in range(40)]))


def test_cutout_cuts_one_hole_of_forty_percent_out_of_half_of_the_images():
    black = (drawn('cutout', WHITE, 400) == 0).all(1).float()
    # shifted, shrunk and rotated borders are at most 19 wide, so a black square of 20 is the hole
    holes = torch.nn.functional.avg_pool2d(black[:, None], 20, 1).flatten(1).amax(1) == 1
    assert 160 < holes.sum() < 240
    share = black.mean((1, 2))
    assert ((share[holes] - 0.16).abs() < 1e-6).sum() > 20  # those that were not moved
    assert share[holes].min() > 0.1599 and (share[~holes] < 0.16).float().mean() > 0.5


def test_cutout_moves_seventy_percent_within_its_limits_over_a_black_border():
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[22:28, 22:28] = 255
    transform = v2.Compose(AUGMENTATIONS['cutout']()[:-1])  # without the hole, which may eat the dot
    torch.manual_seed(0)
    images = torch.stack([transform(Image.fromarray(pixels)) for _ in range(400)])[:, 0].float()
    places = torch.arange(SIDE) + 0.5
    rows = (images.sum(2) * places).sum(1) / images.sum((1, 2)) - 25
    columns = (images.sum(1) * places).sum(1) / images.sum((1, 2)) - 25
    moved = (rows.abs() > 0.5) | (columns.abs() > 0.5)
    assert 0.6 < moved.float().mean() < 0.8
    assert 9 < rows.abs().max() < 10.5 and 9 < columns.abs().max() < 10.5
    mass = images.sum((1, 2)) / (36 * 255)
    assert 0.6 < mass.min() < 0.7 and 1.35 < mass.max() < 1.5  # areas of .8² and 1.2²


def test_happywhale_reflects_at_the_border_and_stays_near_the_original():
    assert drawn('happywhale', WHITE, 200).min() > 200  # a zero border would be black
    original = drawn('none', COLOURS, 1)[0].float()
    images = drawn('happywhale', COLOURS, 100).float()
    nearer = torch.minimum((images - original).abs().mean((1, 2, 3)), (images - original.flip(-1)).abs().mean((1, 2, 3)))
    assert nearer.median() < 40


def test_happywhale_makes_one_in_six_grey():
    images = drawn('happywhale', COLOURS, 400).int()
    grey = ((images.amax(1) - images.amin(1)).amax((1, 2)) <= 2).sum()
    assert 40 < grey < 95  # 67 expected


def test_sharpening_adds_detail_and_clahe_adds_contrast_and_both_keep_flat_areas():
    flat = Image.new('RGB', (SIDE, SIDE), (90, 120, 150))
    faint = Image.fromarray((np.asarray(COLOURS) // 8 + 100).astype(np.uint8))
    assert difference(images.sharpen(flat), flat) == 0
    noise = Image.fromarray(np.random.default_rng(0).integers(100, 156, (SIDE, SIDE, 3), dtype=np.uint8))
    assert np.asarray(images.sharpen(noise)).std() > 1.5 * np.asarray(noise).std()
    assert np.asarray(images.equalise(faint).convert('L')).std() > 1.2 * np.asarray(faint.convert('L')).std()


def test_sharpening_is_the_kernel_of_albumentations(monkeypatch):
    """https://albumentations.ai, Sharpen: (1 - alpha) · identity + alpha · [-1 around, 8 + lightness]; lightness 1."""
    monkeypatch.setattr(images, 'uniform', lambda low, high: (low + high) / 2)
    pixels = picture(SIDE, SIDE).astype(float)
    kernel = 0.65 * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]) + 0.35 * np.array([[-1, -1, -1], [-1, 9, -1], [-1, -1, -1]])
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode='reflect')
    expected = sum(kernel[i, j] * padded[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3))
    found = np.asarray(images.sharpen(COLOURS)).astype(float)
    assert np.abs(found - expected.clip(0, 255)).max() <= 0.51


def test_hue_turns_within_its_limit_and_leaves_grey_alone():
    grey, red = Image.new('RGB', (4, 4), (99, 99, 99)), Image.new('RGB', (4, 4), (200, 0, 0))
    assert difference(images.turn_hue(grey, 0.2), grey) == 0
    torch.manual_seed(0)
    hues = np.array([images.turn_hue(red, 0.2).convert('HSV').getpixel((0, 0))[0] for _ in range(200)])
    turned = np.where(hues > 127, hues - 256, hues) / 256
    assert -0.21 < turned.min() < -0.17 and 0.17 < turned.max() < 0.21


def test_an_unknown_augmentation_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="Unknown augmentation 'mixup'; there are none, flip, autoaugment, cutout, happywhale"
    ):
        augmentation('mixup')


# Dataset and loader


@pytest.fixture
def frame(tmp_path):
    """24 images of 4 classes."""
    rows = []
    for number in range(24):
        path = tmp_path / f'{number:02d}.png'
        Image.fromarray(picture(20, 16, seed=number)).save(path)
        rows.append((str(path), f'class {number // 6}'))
    return pd.DataFrame(rows, columns=['path', 'label'])


def spoil(frame, *numbers):
    for number in numbers:
        with open(frame['path'][number], 'wb') as stream:
            stream.write(b'spoiled')


def gathered(batches):
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_an_item_is_a_dict_of_image_target_and_index(frame):
    dataset = ImageDataset(frame, 8)
    item = dataset[7]
    assert item['image'].shape == (3, 8, 8) and item['image'].dtype == torch.uint8
    assert set(item) == {'image', 'target', 'index'} and (item['target'], item['index']) == (1, 7)
    assert len(dataset) == 24 == len(list(dataset)) and dataset[-1]['index'] == 23
    assert list(ImageDataset(frame, 8, targets=range(24)).targets) == list(range(24))


def test_batches_are_the_same_with_and_without_workers(frame):
    dataset = ImageDataset(frame, 8, 'happywhale', seed=5, replace=True)
    alone = gathered(loader(dataset, 5, train=True, epoch=1, workers=0))
    shared = gathered(loader(dataset, 5, train=True, epoch=1, workers=2))
    assert alone.keys() == shared.keys() and all(torch.equal(alone[key], shared[key]) for key in alone)
    assert alone['image'].dtype == torch.uint8 and alone['target'].dtype == torch.int64 and len(alone['index']) == 20


def test_augmentation_depends_on_seed_epoch_and_index_alone(frame):
    dataset = ImageDataset(frame, 8, 'cutout', seed=5)
    torch.manual_seed(0)
    first = [dataset[1, index]['image'] for index in range(24)]
    torch.manual_seed(1)
    again = [dataset[1, index]['image'] for index in reversed(range(24))][::-1]
    assert all(map(torch.equal, first, again))
    for other in (
        [dataset[2, index]['image'] for index in range(24)],
        [ImageDataset(frame, 8, 'cutout', seed=6)[1, index]['image'] for index in range(24)],
    ):
        assert sum(map(torch.equal, first, other)) < 12


def test_one_image_in_two_rows_is_augmented_in_two_ways(frame):
    frame['path'] = frame['path'][0]
    dataset = ImageDataset(frame, 8, 'cutout', seed=5)
    first, *others = [dataset[index]['image'] for index in range(24)]
    assert sum(torch.equal(first, other) for other in others) < 12


def test_neither_making_nor_using_a_loader_touches_the_global_generator(frame):
    state = torch.get_rng_state()
    gathered(loader(ImageDataset(frame, 8, 'happywhale'), 4, train=True))
    gathered(loader(ImageDataset(frame, 8), 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_order_is_a_permutation_that_changes_with_seed_and_epoch_only(frame):
    def order(seed, epoch):
        dataset = ImageDataset(frame, 4, seed=seed)
        return gathered(loader(dataset, 4, train=True, epoch=epoch))['index'].tolist()

    assert sorted(order(5, 0)) == list(range(24)) and order(5, 0) == order(5, 0)
    assert len({tuple(order(5, 0)), tuple(order(5, 1)), tuple(order(6, 0))}) == 3


@pytest.mark.parametrize('done', [0, 4, 12, 24])
def test_an_epoch_resumes_where_it_stopped(frame, done):
    dataset = ImageDataset(frame, 8, 'cutout')
    whole = list(loader(dataset, 4, train=True, epoch=3))
    rest = list(loader(dataset, 4, train=True, epoch=3, start=done))
    assert len(rest) == len(whole) - done // 4
    for batch, expected in zip(rest, whole[done // 4 :], strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_training_drops_the_ragged_batch_and_evaluation_keeps_every_image_in_order(frame):
    dataset = ImageDataset(frame, 8)
    assert [len(batch['index']) for batch in loader(dataset, 10, train=True)] == [10, 10]
    batches = list(loader(dataset, 10))
    assert torch.cat([batch['index'] for batch in batches]).tolist() == list(range(24))
    assert [len(batch['index']) for batch in batches] == [10, 10, 4]


def test_fewer_images_than_a_batch_cannot_be_trained_on(frame):
    with pytest.raises(ValueError, match='24 images do not fill a batch of 25'):
        loader(ImageDataset(frame, 8), 25, train=True)


def test_an_unreadable_image_gives_way_to_the_next_readable_one_of_its_class(frame):
    spoil(frame, 4, 5)
    dataset = ImageDataset(frame, 8, replace=True)
    item = dataset[4]
    assert torch.equal(item['image'], dataset[0]['image'])  # 5 is broken too, and after it the class begins again
    assert (item['target'], item['index']) == (0, 4)
    assert dataset.unreadable == [frame['path'][4], frame['path'][5]]


def test_the_last_of_a_class_gives_way_to_another_class_with_that_ones_target(frame):
    spoil(frame, *range(6, 12))
    dataset = ImageDataset(frame, 8, replace=True)
    item = dataset[8]
    assert torch.equal(item['image'], dataset[12]['image']) and item['target'] == 2 and item['index'] == 8


@pytest.mark.parametrize('workers', [0, 2])
def test_in_evaluation_an_unreadable_image_is_black_and_named_never_replaced(frame, workers):
    spoil(frame, 3, 20)
    dataset = ImageDataset(frame, 8)
    batch = gathered(loader(dataset, 6, workers=workers))
    assert (batch['image'].flatten(1).amax(1) == 0).nonzero().flatten().tolist() == [3, 20]
    assert batch['target'][20] == 3 and batch['index'].tolist() == list(range(24))
    assert dataset.unreadable == [frame['path'][3], frame['path'][20]]  # known to this process, whoever read


def stopped_by(dataset, workers):
    try:
        gathered(loader(dataset, 4, train=True, workers=workers))
    except OSError as error:
        return str(error)


@pytest.mark.parametrize('workers', [0, 1])
def test_more_unreadable_images_than_allowed_stop_the_run(frame, workers):
    spoil(frame, 0, 6, 12, 18)
    message = stopped_by(ImageDataset(frame, 8, replace=True, max_unreadable=3), workers)
    assert 'More than 3 images (max_unreadable) cannot be read; the last: The image ' in message
    allowed = ImageDataset(frame, 8, replace=True, max_unreadable=4)
    assert stopped_by(allowed, workers) is None and len(allowed.unreadable) == 4


def test_no_readable_image_at_all_stops_at_once(frame):
    spoil(frame, *range(24))
    with pytest.raises(OSError, match='None of the 24 images can be read'):
        ImageDataset(frame, 8, replace=True)[5]


def test_datasets_travel_to_processes_that_are_not_forked(frame):
    dataset = ImageDataset(frame, 8, 'happywhale')
    transform = pickle.loads(pickle.dumps(dataset.transform))
    torch.manual_seed(0)
    first = dataset.transform(COLOURS)
    torch.manual_seed(0)
    assert torch.equal(transform(COLOURS), first)


def test_of_several_processes_each_reads_as_many_in_order(frame):
    dataset = ImageDataset(frame.head(7), 8)
    parts = [gathered(loader(dataset, 2, rank=rank, processes=3))['index'].tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]


def test_of_several_processes_each_trains_on_its_part_of_the_batch_of_one(frame):
    dataset = ImageDataset(frame, 8)
    one = gathered(loader(dataset, 6, train=True, epoch=2, start=6))['index']
    parts = [gathered(loader(dataset, 3, train=True, epoch=2, start=6, rank=rank, processes=2))['index'] for rank in (0, 1)]
    assert torch.equal(torch.stack([part.view(-1, 3) for part in parts], 1).flatten(), one) and len(one) == 18


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_the_default_number_of_workers_leaves_few_cores_to_the_tower(frame, monkeypatch):
    def workers(cores, cuda):
        monkeypatch.setattr('os.cpu_count', lambda: cores)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        return loader(ImageDataset(frame, 8), 4).num_workers

    assert [workers(2, False), workers(4, False), workers(16, False), workers(4, True), workers(96, True)] == [0, 0, 8, 4, 8]


def test_every_class_is_seen_once_an_epoch_as_often_as_it_has_images(frame):
    targets = gathered(loader(ImageDataset(frame, 4), 6, train=True))['target']
    assert Counter(targets.tolist()) == {0: 6, 1: 6, 2: 6, 3: 6}
