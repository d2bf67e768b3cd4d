"""Images: a file becomes a square of uint8 pixels, augmented, in batches that do not depend on the number of workers."""
import io
import os
import warnings
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import chain

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from guie.errors import FileError, InputError
from guie.files import did_you_mean

IMAGE_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'HEIF', 'JPEG2000', 'TIFF', 'GIF', 'BMP', 'DIB', 'PPM', 'QOI')
# Of Pillow's other formats some run other programs, and some have no signature and would show damaged files
NEEDED = {'heic': 'pillow-heif', 'heif': 'pillow-heif', 'hif': 'pillow-heif', 'avif': 'pillow 11.3 or later'}
WHITE = (1, 255, 1023, 4095, 16383, 65535)  # possible whites of images of more than 8 bits, which do not name theirs


@cache
def register_plugins():
    """Loads all formats that Pillow can read here; for HEIC, the format of phones, a plugin may be installed."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()


def image_suffixes():
    """Suffixes, without the dot and in lower case, of the files that Pillow reads here: {'jpg', 'png', ...}."""
    register_plugins()
    return {suffix[1:] for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}


def read_image(path, size, max_pixels=89_000_000):
    """An image file as upright RGB Image, squashed to (size, size) by antialiased bicubic, alpha on white (read_pixels)."""
    return Image.fromarray(read_pixels(path, size, max_pixels).numpy())


def read_pixels(path, size, max_pixels=89_000_000, content=None):
    """What read_image shows, as uint8 (size, size, 3). OSError, naming the file, if it cannot be decoded or is too large.
    content: the file's bytes, where it is no file on disk.
    JPEGs are decoded at the smallest of 1, 1/2, 1/4, 1/8 that leaves twice `size`: at most 2/255 mean absolute error.
    max_pixels limits what is decoded, so a JPEG may have 8 times as many, or 4 times if it is progressive and held whole."""
    try:
        try:
            return decode(path if content is None else io.BytesIO(content), size, max_pixels)
        except ValueError as error:
            return decode(without_texts(path, error, content), size, max_pixels)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        plugin = NEEDED.get(os.path.splitext(path)[1][1:].lower())
        hint = f' (files of this kind need {plugin})' if plugin else ''
        raise FileError(f'The image {path} cannot be read: {error}{hint}') from error


def decode(file, size, max_pixels):
    """read_pixels, raising whatever Pillow raises."""
    try:
        image = JpegImageFile(file)  # Image.open would refuse 200 megapixels before they can be reduced
    except SyntaxError:
        register_plugins()
        image = Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    with image:
        most = max_pixels
        if image.format == 'JPEG':
            most *= 4 if 'progressive' in image.info else 8
        check_size(image, most)
        _, box = image.draft(None, (2 * size, 2 * size)) or (None, (0, 0, *image.size))
        check_size(image, max_pixels)
        return upright(squash(to_rgb(image), size, box), image)


def check_size(image, most):
    """OSError if an image has more than `most` pixels."""
    if image.width * image.height > most:
        raise FileError(f'{image.width} × {image.height} pixels are more than {most:,}')


def without_texts(path, error, content=None):
    """The bytes of a PNG without texts and profile: Pillow refuses more than a megabyte of them. Else raises `error`."""
    with open(path, 'rb') if content is None else io.BytesIO(content) as file:
        kept = [file.read(8)]
        if kept[0] != b'\x89PNG\r\n\x1a\n':
            raise error
        while len(head := file.read(8)) == 8:
            body = file.read(int.from_bytes(head[:4], 'big') + 4)
            if head[4:5].isupper() or head[4:] in (b'tRNS', b'eXIf'):  # a capital: needed to decode the image
                kept += head, body
    return io.BytesIO(b''.join(kept))


def to_rgb(image):
    """A Pillow image as RGB: more than 8 bits and floats by to_grey, transparency on white."""
    if image.mode[0] in 'IF':
        image = to_grey(image)
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')  # convert would copy


def to_grey(image):
    """A Pillow image of 16 or 32 bits or of floats as 8 bits: black is 0, white the smallest of WHITE that no value exceeds.
    The transparent grey of a PNG becomes white."""
    values = np.array(image, np.float32)
    clear = values == image.info.get('transparency', np.nan)
    values[clear | np.isnan(values)] = 0
    brightest = values.max(where=np.isfinite(values), initial=0)
    white = next((level for level in WHITE if brightest <= 1.1 * level), WHITE[-1])  # resizing overshoots
    values = values.clip(0, white) * (255 / white) + .5
    values[clear] = 255
    return Image.fromarray(values.astype(np.uint8))


def squash(image, size, box):
    """uint8 (size, size, 3) by torch's kernel: within 2 levels of Pillow's bicubic, in less than half of its time. `box` is
    the exact extent: 427 rows decoded at half scale are 214, but the image ends at 213.5."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # bytes are read-only: nobody writes to them, and a copy takes .3 ms
        pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(1, *image.size[::-1], 3).permute(0, 3, 1, 2)
    scale = [size / side * (1 + 1e-9) for side in (box[3], box[2])]  # the output's side is rounded down
    return F.interpolate(pixels, scale_factor=scale, mode='bicubic', antialias=True)[0].permute(1, 2, 0)


def upright(pixels, image):
    """Squashed pixels turned as the image's EXIF says: the same as before squashing, and cheaper."""
    with suppress(Exception):  # a broken EXIF block does not make an image unreadable
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            turned = Image.fromarray(pixels.numpy())
            turned.getexif()[ExifTags.Base.Orientation] = orientation
            return torch.from_numpy(np.array(ImageOps.exif_transpose(turned)))
    return pixels


def uniform(low, high):
    """A random number from torch's generator, which all of an augmentation's randomness comes from."""
    return torch.empty(1).uniform_(low, high).item()


def shift_scale_rotate(image, shift, scale, angle, border):
    """A random shift, scale and rotation about the centre; `border` names cv2's way to fill the edge."""
    centre = [(side - 1) / 2 for side in image.size]
    matrix = cv2.getRotationMatrix2D(centre, uniform(-angle, angle), 1 + uniform(-scale, scale))
    matrix[:, 2] += [side * uniform(-shift, shift) for side in image.size]
    border = getattr(cv2, f'BORDER_{border}')
    return Image.fromarray(cv2.warpAffine(np.asarray(image), matrix, image.size, borderMode=border))


def sharpen(image):
    """albumentations' Sharpen of lightness 1: each pixel moves away from its eight neighbours."""
    kernel = np.full((3, 3), -uniform(.2, .5))
    kernel[1, 1] = 1 - kernel[0, 0] * 8
    return Image.fromarray(cv2.filter2D(np.asarray(image), -1, kernel))


def equalise(image):
    """CLAHE: the lightness' histogram equalised tile by tile, with a random contrast limit."""
    lab = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(uniform(1, 4), (8, 8)).apply(lab[..., 0])
    return Image.fromarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def turn_hue(image, part):
    """The hue turned by up to `part` of the circle; eight times as fast as torchvision's."""
    hsv = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * uniform(-part, part)) % 256)
    return Image.fromarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


AUGMENTATIONS = {
    'none': lambda: [],
    'flip': lambda: [v2.RandomHorizontalFlip()],
    'autoaugment': lambda: [v2.AutoAugment()],
    'cutout': lambda: [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.JPEG((99, 100))], .5),
        v2.RandomApply([partial(shift_scale_rotate, shift=.2, scale=.2, angle=10, border='CONSTANT')], .7),
        v2.PILToTensor(),
        v2.RandomErasing(.5, scale=(.16, .16), ratio=(1, 1))],  # one square, 40 % of the side
    'happywhale': lambda: [
        v2.RandomApply([partial(shift_scale_rotate, shift=.0625, scale=.1, angle=15, border='REFLECT')], .5),
        v2.RandomApply([v2.RandomChoice([sharpen, v2.Grayscale(3), equalise])], .5),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(.1, .1, .1), partial(turn_hue, part=.2)], .5)],
}


def augmentation(name):
    """One of AUGMENTATIONS: RGB image (s, s) -> uint8 tensor (3, s, s), random by torch's generator alone.
    The 4th place's augmentations with two differences: they run at the tower's size (theirs ran before the resize, at
    several times the cost), and cutout's hole lies inside the image (theirs could stick out)."""
    if name not in AUGMENTATIONS:
        raise InputError(f'Unknown augmentation {name!r}; there are {", ".join(AUGMENTATIONS)}.'
                         f'{did_you_mean(name, AUGMENTATIONS)}')
    return v2.Compose([*AUGMENTATIONS[name](), v2.PILToTensor()])


class ImageDataset(Dataset):
    """The images of a table with columns path, label: dataset[epoch, i], or dataset[i] for epoch 0.
    An item is {'image': uint8 (3, size, size), 'target': int, 'index': i}; what is random depends on (seed, epoch, i) alone.
    Targets default to the rank of the label. With `replace` (training) the next readable image of its class, or else of any
    class, replaces an unreadable one. Without it (evaluation) its image is black. More than `max_unreadable` (None: 100, or
    one in a hundred if that is more) raise OSError."""

    def __init__(self, frame, size, augment='none', *, seed=5, targets=None, replace=False, max_unreadable=None):
        self.paths = frame['path'].tolist()
        ranks, _ = pd.factorize(frame['label'], sort=True)
        self.targets = ranks if targets is None else np.asarray(targets)
        transform = augmentation(augment)
        self.transform = None if augment == 'none' else transform  # it would only turn pixels into an image and back
        self.size, self.seed, self.replace = size, seed, replace
        self.max_unreadable = max(100, len(frame) // 100) if max_unreadable is None else max_unreadable
        self.bad = torch.zeros(len(frame), dtype=torch.bool).share_memory_()  # workers write too

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        pixels, source = self.readable(index)
        image = pixels.permute(2, 0, 1)
        if self.transform:
            with seeded(self.seed, epoch, index):
                image = self.transform(Image.fromarray(pixels.numpy()))
        return {'image': image, 'target': int(self.targets[source]), 'index': index}

    @property
    def unreadable(self):
        """Paths of the images that could not be read so far, by whichever worker."""
        bad = self.bad.clone()  # nonzero reads twice, and fails if a worker writes in between
        return [self.paths[index] for index in bad.nonzero().flatten().tolist()]

    def readable(self, index):
        """(pixels, index of their image) of an image, or of the one that replaces it."""
        for source in chain([index], self.others(index) if self.replace else ()):
            try:
                return read_pixels(self.paths[source], self.size), source
            except OSError as error:
                self.bad[source] = True
                if self.bad.sum() > self.max_unreadable:
                    raise FileError(f'More than {self.max_unreadable} images (max_unreadable) cannot be read; '
                                    f'the last: {error}') from None
        if self.replace:
            raise FileError(f'None of the {len(self):,} images can be read; the first is {self.paths[0]}.')
        return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), index

    def others(self, index):
        """Yields the images of the same class, then all others."""
        others = np.arange(index + 1, index + len(self)) % len(self)
        same = self.targets[others] == self.targets[index]
        yield from np.concatenate([others[same], others[~same]])

@contextmanager
def seeded(*entropy):
    """Seeds torch's CPU generator from `entropy` within the block; after it the stream continues where it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        generator.set_state(state)


def loader(dataset, batch_size, *, train=False, epoch=0, start=0, rank=0, processes=1, workers=None):
    """DataLoader for one pass over an ImageDataset; it draws nothing from torch's global generator.
    Evaluation: every image in order. Of several processes each takes every `processes`-th image, as many as the others; the
    last images may repeat some. Training: full batches in an order that depends on (dataset.seed, epoch) alone, from
    position `start` on (the images of this epoch that all processes have used). `workers` None: default_workers."""
    if train and len(dataset) < batch_size:
        raise InputError(f'{len(dataset)} images do not fill a batch of {batch_size}; lower the batch size.')
    if train:
        order = np.random.default_rng([dataset.seed, epoch]).permutation(len(dataset))[start:].tolist()
        together = batch_size * processes
        order = [(epoch, index) for place, index in enumerate(order[:len(order) // together * together])
                 if place % together // batch_size == rank]  # every process takes its part of the same global batch
    else:
        order = [place % len(dataset) for place in range(rank, -(-len(dataset) // processes) * processes, processes)]
    return DataLoader(dataset, batch_size, sampler=order, drop_last=train, pin_memory=torch.cuda.is_available(),
                      num_workers=default_workers() if workers is None else workers,
                      worker_init_fn=one_thread, generator=torch.Generator().manual_seed(dataset.seed))


def default_workers():
    """Up to 8 with a GPU or 8 cores, else 0, since the tower then needs the cores itself."""
    cores = os.cpu_count() or 1
    return min(cores, 8) if torch.cuda.is_available() or cores >= 8 else 0


def one_thread(_):
    """In a worker: one thread, since the other cores are for the other workers."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
