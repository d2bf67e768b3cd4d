"""Collection: the vectors of one's own images, kept on disk and mapped into memory; only new images are embedded."""
import csv
import hashlib
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.lib.format import write_array_header_1_0
from torch import nn

from guie.datasets import any_names, list_images
from guie.distributed import best_device
from guie.embedding import embed, vectors_hash
from guie.errors import FileError, InputError, MissingError
from guie.files import check_writable, file_hash, printable, reason_of, short_name, user_path, whole_file
from guie.projection import l2_normalise
from guie.submission import host_vectors

PART = 2_000  # images whose vectors a stopped session loses at most; ten times as many with a GPU
DAY = 24 * 60 * 60  # seconds
KEY = ['file', 'size', 'mtime']  # an image: its path below the folder, bytes, and time of change in nanoseconds


class SubmissionFile(NamedTuple):
    """A submission.zip that is open."""
    module: nn.Module
    path: Path


@dataclass(frozen=True)
class Collection:
    """Images and their vectors: files, DataFrame path, size, mtime and, where there are several, label; vectors float32 (n,
    dim), unit rows in the same order, mapped from disk; paths of images that cannot be read and are left out."""
    files: pd.DataFrame
    vectors: np.ndarray
    unreadable: list


# What there is

@any_names
def find_images(folder):
    """(DataFrame path, file (the path below the root) and, where there are several, label; root) of a folder, of a list of
    paths, or of a table with a column path. ValueError for another table or an empty one; FileNotFoundError for an empty
    folder, or if no path of a table exists."""
    if isinstance(folder, (list, tuple)):
        folder = pd.DataFrame({'path': list(folder)}, dtype=object)
    if isinstance(folder, pd.DataFrame):
        if 'path' not in folder or folder.empty:
            raise InputError('The table to search names no images: give one with a column path, or a folder.')
        check_paths(folder['path'].tolist())
        frame = folder.assign(path=[os.path.abspath(path) for path in folder['path']])
        if (again := frame['path'].duplicated()).any():
            print(f'{again.sum():,} rows of the table repeat an image and were dropped')
        if not any(map(os.path.exists, frame['path'])):
            raise MissingError(printable(f'None of the images of the table exist, first {frame["path"].iloc[0]}: relative '
                                         f'paths start at the current folder.'))
        frame, root = frame[~again], os.path.commonpath(frame['path'].map(os.path.dirname).tolist())
    else:
        frame, root = list_images(folder), os.path.abspath(user_path(folder))
    labels = ['label'] if 'label' in frame and frame['label'].nunique() > 1 else []
    below = len(root.rstrip('/')) + 1
    frame = frame[['path', *labels]].reset_index(drop=True)
    if labels and isinstance(frame['label'].dtype, pd.CategoricalDtype):  # it may have categories that no image is of
        frame['label'] = frame['label'].astype(object)
    return frame.assign(file=[path[below:] for path in frame['path']]), root


def check_paths(paths):
    """InputError unless each is a path, which an empty cell of a table is not."""
    if bad := [row for row, path in enumerate(paths) if not isinstance(path, (str, os.PathLike)) or not path]:
        raise InputError(f'The table to search names no image in {len(bad):,} of {len(paths):,} rows, first row {bad[0]} '
                         f'(path {paths[bad[0]]!r}): leave these out.')


def state_of(path):
    """(bytes, time of change in nanoseconds) of a file; (-1, -1) if it is gone."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    return -1, -1


def cache_folders(root, home, name, cache=None):
    """Folders that may hold the vectors of the images below a root; the last one can be written.
    home: the run's folder, or None for a model without one. cache: None is home, or runs/search/<name> where that cannot be
    written. FileError if neither can."""
    below = f'{short_name(os.path.basename(root), 246)}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}'
    places = [home and home / 'search', Path('runs/search', name)] if cache is None else [user_path(cache)]
    folders = [place / below for place in places if place]
    for count, folder in enumerate(folders, start=1):
        with suppress(FileError):
            check_writable(folder)
            return folders[:count]
    raise FileError(printable(f'{" and ".join(map(str, folders))} cannot be written: give another folder for the vectors as '
                              f'cache=.'))


# A part: <time>.npy, float32 (n, dim), and <time>.csv, which names its images; the latter is written last

class Part(NamedTuple):
    """One file of vectors: its table file, size, mtime, row (-1: unreadable), and the mapped array."""
    file: Path
    table: pd.DataFrame
    vectors: np.ndarray


def read_parts(folders):
    """[Part] in the folders, the newest last; a damaged one is printed and deleted."""
    files = [file for folder in folders for file in sorted(folder.glob('*.csv')) if not file.name.startswith('.')]
    return [part for part in map(read_part, files) if part]


@any_names
def read_part(file):
    """The Part of a table; None if it is damaged, or gone. FileError if the system refuses to read it."""
    types = {'file': str, 'size': np.int64, 'mtime': np.int64, 'row': np.int64}
    try:
        table = pd.read_csv(file, dtype=types, keep_default_na=False, encoding_errors='surrogateescape')[[*types]]
        vectors = np.load(file.with_suffix('.npy'), mmap_mode='r')
        if vectors.ndim == 2 and vectors.dtype == np.float32 and (table['row'] < len(vectors)).all():
            return Part(file, table, vectors)
    except FileNotFoundError:
        if not file.exists():  # another process joined it with others
            return None
    except OSError as error:
        raise FileError(printable(f'{file} could not be read ({reason_of(error)}): try again; after "Too many open files" '
                                  f'raise the limit first (ulimit -n).')) from error
    except (ValueError, LookupError, TypeError, EOFError):
        pass
    print(printable(f'{file} is damaged: its images are embedded again.'))
    remove_part(file)


def write_part(folder, table, blocks, dim, name=None):
    """Writes a part. table: file, size, mtime and whether each is `readable`; blocks: arrays (m, dim) of those that are.
    name: of its table, or None for the time."""
    file, readable = folder / (name or f'{time.time_ns()}.csv'), table['readable'].to_numpy()
    with whole_file(file.with_suffix('.npy')) as beside, open(beside, 'wb') as stream:
        shape = int(readable.sum()), dim
        write_array_header_1_0(stream, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
        for block in blocks:
            stream.write(np.ascontiguousarray(block, '<f4').data)
    with whole_file(file) as beside:
        rows = np.where(readable, readable.cumsum() - 1, -1)
        table[KEY].assign(row=rows).to_csv(beside, index=False, quoting=csv.QUOTE_ALL, errors='surrogateescape')


def remove_part(file):
    """Deletes a part, where that is allowed; another process may have done so."""
    for path in (file, file.with_suffix('.npy')):
        with suppress(OSError):
            path.unlink()


def remove_leftovers(folder):
    """Deletes what killed processes left in a folder: half-written files, and vectors whose table was never written. Only
    what is older than a day: another process may be writing."""
    untabled = (file for file in folder.glob('*.npy') if file.stem.isdigit() and not file.with_suffix('.csv').exists())
    for path in [*folder.glob('.part-*'), *untabled]:
        with suppress(OSError):  # it may not be deleted, or another process did
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@any_names
def look_up(frame, folders):
    """(parts, their images as one table with `part` and `row`, the position in it of each image of the frame or -1)."""
    parts = read_parts(folders)
    stored = pd.concat([pd.DataFrame({'file': [], 'size': [], 'mtime': [], 'row': [], 'part': []}).astype(
        {'file': str} | dict.fromkeys(['size', 'mtime', 'row', 'part'], np.int64)),
        *(part.table.assign(part=number) for number, part in enumerate(parts))])
    stored = stored.drop_duplicates(KEY, keep='last', ignore_index=True)
    places = frame[KEY].merge(stored[KEY].assign(place=stored.index), how='left', on=KEY)['place']
    return parts, stored, places.fillna(-1).to_numpy(np.int64)


def gather(parts, table):
    """float32 (n, dim): the vectors of the rows of a table part, row."""
    vectors = np.empty((len(table), max((part.vectors.shape[1] for part in parts), default=0)), np.float32)
    numbers, rows = table['part'].to_numpy(), table['row'].to_numpy()
    for number in np.unique(numbers):
        vectors[numbers == number] = parts[number].vectors[rows[numbers == number]]
    return vectors


# Vectors

def vectors_of(model, paths, desc, workers=None):
    """(unit vectors float32 (m, dim) of the images that can be read, bool (n,): which these are).
    model: Embedder, Ensemble or SubmissionFile. ValueError for one that returns NaN or infinite numbers."""
    if isinstance(model, SubmissionFile):
        with torch.no_grad():
            found, _ = host_vectors(*model, paths, len(paths), desc)
        vectors = [*found.values()] or np.zeros((0, 0))
        readable = np.array([path in found for path in paths])
    else:
        frame, bad = pd.DataFrame({'path': paths, 'label': ''}, dtype=object), []
        vectors = embed(model, frame, desc=desc, workers=workers, max_unreadable=len(paths), unreadable=bad)
        bad = {*bad}
        readable = np.array([path not in bad for path in paths])
        vectors = vectors[readable]
    vectors = l2_normalise(vectors)
    if not (finite := np.isfinite(vectors).all(-1)).all():
        raise InputError(printable(f'The model gives NaN or infinite numbers for {np.array(paths)[readable][~finite][0]}: '
                                   f'search with another one.'))
    return vectors, readable


def hash_of(model):
    """16 hex digits that everything that vectors_of depends on decides."""
    return file_hash(model.path)[:16] if isinstance(model, SubmissionFile) else vectors_hash(model)


def collect(frame, root, model, folders, kind='vectors'):
    """The Collection of the images of find_images: what the folders hold for this model is read, and the rest is embedded.
    kind: how the names of the folders below begin. An image that cannot be read is remembered until it changes; what is gone
    leaves. FileError if none can be read."""
    folders = [folder / f'{kind}-{hash_of(model)}' for folder in folders]
    remove_leftovers(folders[-1])
    frame = with_states(frame)
    parts, stored, places = look_up(frame, folders)
    new = frame[(places < 0) & (frame['size'] >= 0)]
    if len(new):
        say_other_model(folders[-1], kind, len(frame) if not len(stored) else 0)
        embed_new(new, model, folders[-1])
        parts, stored, places = look_up(frame, folders)
    if merge(parts, stored, places, root, folders[-1]):
        parts, stored, places = look_up(frame, folders)
    for _ in range(10):  # another process may have joined parts while they were read
        if not still_there(frame[places < 0]):
            break
        parts, stored, places = look_up(frame, folders)
    say_left_out(frame['path'][places < 0], 'vanished while the folder was read, and {are} left out')
    frame, table = frame[places >= 0], stored.iloc[places[places >= 0]]
    readable = (table['row'] >= 0).to_numpy()
    unreadable, frame, table = frame['path'][~readable].tolist(), frame[readable], table[readable]
    if not len(frame):
        raise FileError(printable(f'None of the images below {root} can be read'
                                  f'{f", first {unreadable[0]}" if unreadable else ""}: check the folder.'))
    say_left_out(unreadable, 'cannot be read, and {are} left out until changed')
    whole = table['part'].nunique() == 1 and np.array_equal(table['row'], np.arange(len(table)))
    vectors = parts[table['part'].iloc[0]].vectors[:len(table)] if whole else gather(parts, table)
    return Collection(frame.drop(columns='file').reset_index(drop=True), vectors, unreadable)


def with_states(frame):
    """A table of images with the columns size and mtime of state_of."""
    return frame.assign(**dict(zip(['size', 'mtime'], np.array([*map(state_of, frame['path'])], np.int64).reshape(-1, 2).T)))


def still_there(frame):
    """Whether one of some images is what with_states saw."""
    return any(state_of(path) == (size, mtime) != (-1, -1)
               for path, size, mtime in zip(frame['path'], frame['size'], frame['mtime']))


def missing(frame, model, folders):
    """Those of some images, with their states, that the folders do not hold for this model."""
    frame = with_states(frame)
    *_, places = look_up(frame, [folder / f'vectors-{hash_of(model)}' for folder in folders])
    return frame[(places < 0) & (frame['size'] >= 0)]


def embed_share(frame, model, folders, rank, processes):
    """Embeds what the folders lack of every processes-th image, from the rank-th on, and leaves it there for collect."""
    mine = missing(frame.iloc[rank::processes], model, folders)
    embed_new(mine, model, folders[-1] / f'vectors-{hash_of(model)}')


def embed_new(new, model, folder):
    """Embeds images and writes them, a part at a time."""
    size = PART * (10 if best_device().type == 'cuda' else 1)
    for start in range(0, len(new), size):
        some = new.iloc[start:start + size]
        desc = f'embedding {start + 1:,} to {start + len(some):,} of {len(new):,}'
        vectors, readable = vectors_of(model, some['path'].tolist(), desc)
        there = readable | some['path'].map(os.path.exists).to_numpy()  # what is gone may come back
        if there.any():
            write_part(folder, some.assign(readable=readable)[there], [vectors], vectors.shape[1])


def merge(parts, stored, places, root, folder):
    """Writes what is spread over several parts as one, without the images that are gone or have changed; whether it did.
    Images of the same folder that the table to search does not name stay."""
    rest = stored.drop(index=places[places >= 0])
    there = [state_of(os.path.join(root, file)) == (size, mtime)
             for file, size, mtime in zip(rest['file'], rest['size'], rest['mtime'])]
    ours = [part.file.parent == folder for part in parts]
    gone = any(ours[number] for number in rest['part'][~np.array(there, bool)])
    table = stored.iloc[[*places[places >= 0], *rest.index[np.array(there, bool)]]]
    if not gone and table['part'].nunique() < 2:
        return False
    table = table.assign(readable=table['row'] >= 0)
    known = table[table['readable']]
    blocks = (gather(parts, known.iloc[start:start + 100_000]) for start in range(0, len(known), 100_000))
    write_part(folder, table, blocks, gather(parts, known.head(0)).shape[1])
    for part, own in zip(parts, ours):
        if own:
            remove_part(part.file)
    return True


def say_other_model(folder, kind, count):
    """Prints that vectors of another model were found, if all `count` images are embedded again because of it."""
    if count and (others := [other for other in sorted(folder.parent.glob(f'{kind}-*')) if other != folder]):
        print(printable(f'{folder.parent} holds vectors of another model, so all {count:,} images are embedded again. Those '
                        f'of the other model stay in {", ".join(other.name for other in others)}: delete them if you need '
                        f'the space.'))


def say_left_out(paths, why):
    """Prints how many images are left out, why ({are} is is or are), and the first."""
    if len(paths):
        images, are = ('image', 'is') if len(paths) == 1 else ('images', 'are')
        print(printable(f'{len(paths):,} {images} {why.format(are=are)}, first {[*paths][0]}.'))
