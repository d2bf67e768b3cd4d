"""Cells: images with frames and names, in the rows and columns of a figure."""
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from unicodedata import east_asian_width

import numpy as np
import pandas as pd
from matplotlib import font_manager, rcParams
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.text import Text

from guie.datasets import DATASETS
from guie.errors import FileError
from guie.files import printable
from guie.images import ImageDataset

SIDE, LINE, GAP = 1.08, .165, .1  # inches: of an image, of a line of text, between images
WIDTH = 12  # characters of a line below an image
OTHER_SCRIPTS = ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans SC', 'WenQuanYi Zen Hei', 'Microsoft YaHei', 'SimHei',
                 'PingFang SC', 'Hiragino Sans', 'Malgun Gothic', 'Arial Unicode MS')  # letters that matplotlib's font lacks


@dataclass(frozen=True)
class Cell:
    """An image of a figure: its place in its row, and the texts around it. path None: no image."""
    column: float
    path: str | None
    name: str = ''      # below it
    distance: str = ''  # below it too
    colour: str = ''    # of its frame
    left: str = ''
    above: str = ''


def draw_cells(rows, size, meaning, together=1):
    """Draws rows of Cells as a figure, images at `size` pixels, with a space after each group of `together` rows.
    meaning: {frame colour: what it means}, for the legend."""
    cells = [cell for row in rows for cell in row]
    images = read_images([cell.path for cell in cells if cell.path is not None], size)
    beside = all(columns_of(f'{cell.name} · 0.00') <= WIDTH for cell in cells)
    texts = [[text_below(cell, beside) for cell in row] for row in rows]
    colours = {cell.colour for cell in cells}
    legend = [Patch(color=colour, label=says) for colour, says in meaning.items() if colour in colours]
    top = GAP + .25 * bool(legend) + .22 * any(cell.above for cell in cells)
    beside_first = [wrapped(cell.left, 16).count('\n') + 1 for cell in cells if cell.column == 0 and cell.left]
    left = GAP + (LINE * max(beside_first) + .085 if beside_first else 0)
    width = max(left + (SIDE + GAP) * (1 + max(cell.column for cell in cells)), 6 * bool(legend))
    lines = [max(text.count('\n') + 1 if text else 0 for text in row) for row in texts]
    bottoms = top + np.cumsum([SIDE + GAP + LINE * count + 2 * GAP * (place % together == together - 1 > 0)
                               for place, count in enumerate(lines)])
    figure = plt.figure(figsize=(width, bottoms[-1]))
    for start, row, below in zip([top, *bottoms], rows, texts):
        for cell, text in zip(row, below):
            corner = (left + (SIDE + GAP) * cell.column) / width, 1 - (start + SIDE) / bottoms[-1]
            draw_cell(figure.add_axes((*corner, SIDE / width, SIDE / bottoms[-1])), cell, images, text)
    if legend:
        figure.legend(handles=legend, ncols=len(legend), loc='upper left', frameon=False, handlelength=1, borderaxespad=.2)


def text_below(cell, beside):
    """A cell's name and distance; beside: in one line."""
    return (' · ' if beside else '\n').join(filter(None, (wrapped(cell.name), cell.distance)))


def draw_cell(axis, cell, images, below):
    """Draws a cell on its axis; images: from read_images."""
    if cell.path is None:
        axis.set_axis_off()
        write(axis, .5, .5, 'none')
    else:
        show_image(axis, *images[cell.path], cell.colour)
    write(axis, .5, -.04, below, va='top')
    write(axis, -.05, .5, wrapped(cell.left, 16), ha='right', rotation=90)
    write(axis, .5, 1.04, cell.above, va='bottom')


# Images

def read_images(paths, size):
    """{path: (uint8 (3, size, size), whether it could be read)}; prints how many could not. OSError if none could."""
    table = pd.DataFrame({'path': [*dict.fromkeys(paths)], 'label': ''}, dtype=object)  # pyarrow takes nothing but UTF-8
    images = ImageDataset(table, size, max_unreadable=len(table))
    pictures = [images[i]['image'] for i in range(len(images))]
    bad = note_unreadable(images, range(len(images)))
    return {path: (picture, path not in bad) for path, picture in zip(images.paths, pictures)}


def note_unreadable(images, shown):
    """Unreadable paths of an ImageDataset; prints their number and the first. OSError if all that are shown are."""
    bad, paths = {*images.unreadable}, {images.paths[i] for i in shown}
    if bad >= paths:
        raise FileError(printable(f'None of the {len(paths)} images of this figure can be read, first {min(paths)}: check '
                                  f'the data folder.'))
    if bad:
        print(printable(f'{len(bad)} images of this figure could not be read, first {min(bad)}; they are shown black, with '
                        f'a cross.'))
    return bad


def show_image(axis, image, readable=True, colour=None):
    """Draws an image (3, s, s) without ticks, in a coloured frame if given; one that could not be read gets a cross."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    if not readable:
        write(axis, .5, .5, '×', color='white', fontsize=24)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values() if colour else ():
        side.set(color=colour, linewidth=3)


# Names

def name_of(label):
    """A label without the name of a known data set: 'products-10k/17' is 17."""
    known, _, own = str(label).partition('/')
    return own if known in DATASETS and own else str(label)


def columns_of(text):
    """The width of a text in characters; Chinese letters, emoji and the broadest letters count as two."""
    return sum(1 + (east_asian_width(letter) in 'WF' or letter in 'MW@%') for letter in text)


def shortened(name, most):
    """A name of at most so many columns: one printable line, cut in the middle."""
    name = ' '.join(printable(name).split())
    if columns_of(name) <= most:
        return name
    cut = (f'{name[:kept - kept // 2]}…{name[len(name) - kept // 2:]}' for kept in range(most - 1, 0, -1))
    return next(text for text in cut if columns_of(text) <= most)


def wrapped(name, width=WIDTH):
    """A name on one or two lines of about `width` columns, cut in the middle if it is longer."""
    name = shortened(name, 2 * width - 2)
    if columns_of(name) <= width:
        return name
    halves = [(name[:cut].strip(), name[cut:].strip()) for cut in range(1, len(name)) if name[cut - 1] in ' -_/.…']
    middle = name[:len(name) // 2], name[len(name) // 2:]
    fitting = [pair for pair in halves if max(map(columns_of, pair)) <= width]
    return '\n'.join(min(fitting, key=lambda pair: max(map(columns_of, pair)), default=middle))


class QuietText(Text):
    """Text that draws a box, without a warning, for a letter that its fonts lack, and shows $ and _ as they are."""

    def draw(self, renderer):
        """As Text's, without its warnings."""
        with no_warnings():
            super().draw(renderer)

    def get_window_extent(self, renderer=None, dpi=None):
        """As Text's, without its warnings."""
        with no_warnings():
            return super().get_window_extent(renderer, dpi)


@contextmanager
def no_warnings():
    """Silences Python's UserWarnings within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        yield


def write(axis, x, y, text, *, ha='center', va='center', fontsize=10, **style):
    """Writes a text at a place of an axis, 0…1 each, in the first fonts here with its letters; an empty one does nothing."""
    if text:
        here = set(font_manager.get_font_names())  # matplotlib warns of each font that is not here
        family = [*rcParams['font.family'], *(font for font in OTHER_SCRIPTS if font in here)]
        axis.add_artist(QuietText(x, y, text, ha=ha, va=va, fontsize=fontsize, family=family, parse_math=False,
                                  transform=axis.transAxes, clip_on=False, **style))
