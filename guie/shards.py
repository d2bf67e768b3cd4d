"""Shards: vectors of the images in tar files, as webdataset packs them, by any number of processes and machines.

    accelerate launch -m guie.shards RUN FOLDER TAR…

leaves those of each tar file in FOLDER: float32 (n, dim), unit rows, and a table that names them. TAR: files, addresses
that webdataset opens, or folders of files. A tar file that has vectors is not read again: delete these if it has changed."""
import hashlib
import os
import sys
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from guie.collection import SubmissionFile, hash_of, read_parts, write_part
from guie.distributed import best_device, report_error, take_place
from guie.errors import FileError, InputError, MissingError
from guie.files import check_writable, printable, progress_bar, user_path
from guie.images import default_workers, image_suffixes, one_thread, read_pixels
from guie.model import Ensemble
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours
from guie.search import open_model

BATCH = 64  # images that a tower sees at a time


class TarImages(IterableDataset):
    """Images of tar files, each file read from its beginning to its end by one worker. Items: (tar file, names, bytes of
    each, whether it can be read, a tensor uint8 (n, 3, side, side) of those that can for each of `sides`). The last item of
    a file has no names, or instead of them the error that ended it."""

    def __init__(self, files, sides):
        self.files, self.sides = files, sides

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for file in self.files[number::workers]:
            try:
                images = images_of(file)
                while some := [*islice(images, BATCH)]:
                    yield batch_of(file, some, self.sides)
                yield file, [], [], [], []
            except Exception as error:  # whatever opening an address or a damaged file raises
                yield file, ' '.join(f'{type(error).__name__}: {error}'.split()), [], [], []


def images_of(file):
    """Yields (name in the tar file, bytes) of its images; texts and numbers beside them are left out."""
    from webdataset import WebDataset
    suffixes = image_suffixes()
    for sample in WebDataset([file], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False):
        for suffix, content in sample.items():
            if not suffix.startswith('_') and suffix.rpartition('.')[2].lower() in suffixes:
                yield f'{sample["__key__"]}.{suffix}', content


def pixels_of(content, sides):
    """[uint8 (3, side, side) for each of `sides`] of an image's bytes, or None if it cannot be read."""
    try:
        return [read_pixels(content, side).permute(2, 0, 1) for side in sides]
    except OSError:
        return None


def batch_of(file, some, sides):
    """The item of TarImages of some (name, bytes)."""
    names, contents = zip(*some)
    pixels = [pixels_of(content, sides) for content in contents]
    return (file, names, [*map(len, contents)], [part is not None for part in pixels],
            [torch.stack(part) for part in zip(*filter(None, pixels))])


# Embedding

def tar_files(given):
    """The tar files of some files, addresses and folders of files, in order. FileNotFoundError: there are none."""
    found = chain.from_iterable(sorted(map(str, user_path(one).glob('*.tar'))) if os.path.isdir(user_path(one)) else [one]
                                for one in map(str, given))
    files = [one if '://' in one or one.startswith('pipe:') else os.path.abspath(user_path(one)) for one in found]
    if not files:
        raise MissingError(printable(f'There is no .tar file in {", ".join(map(str, given))}: name such files or their '
                                     f'folder.'))
    return [*dict.fromkeys(files)]


def part_of(folder, file):
    """The table of a tar file's vectors, whether there or not."""
    name = os.path.basename(file.rstrip('/')).removesuffix('.tar')
    return folder / f'{name}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}.csv'


def embed_shards(model, shards, folder, rank=0, processes=1, workers=None):
    """Embeds every processes-th tar file, from the rank-th on, that has no vectors yet -> the folder of the model's vectors.
    model: Embedder or Ensemble. shards: as in tar_files. An image that cannot be read is counted, printed, and has no
    vector. FileError, after all others are done: tar files that could not be read; they leave nothing."""
    if isinstance(model, SubmissionFile):
        raise InputError('A submission.zip takes one image at a time: embed tar files by the run or ensemble that it is of.')
    try:
        import webdataset  # noqa: F401  (before a worker needs it)
    except ImportError:
        raise InputError('Tar files are read by webdataset, which is not installed: pip install webdataset.') from None
    folder = user_path(folder) / f'vectors-{hash_of(model)}'
    check_writable(folder)
    files = [file for file in tar_files(shards)[rank::processes] if not part_of(folder, file).exists()]
    members, broken, held = model.members if isinstance(model, Ensemble) else [model], [], {}
    workers = min(default_workers() if workers is None else workers, len(files))
    items = DataLoader(TarImages(files, [member.spec.image_size for member in members]), batch_size=None,
                       num_workers=workers, worker_init_fn=one_thread, pin_memory=torch.cuda.is_available())
    model.to(best_device()).eval()
    with progress_bar(total=len(files), desc='tar files', disable=rank > 0) as bar:
        for file, names, sizes, readable, pixels in items if files else ():
            if not isinstance(names, str) and names:
                held.setdefault(file, []).append((names, sizes, readable, vectors_of(model, pixels)))
                continue
            if names:
                held.pop(file, None)
                broken.append((file, names))
            else:
                write_shard(folder, file, held.pop(file, []), model)
            bar.update()
    if broken:
        raise FileError(printable(f'{len(broken):,} of {len(files):,} tar files cannot be read, first {broken[0][0]} '
                                  f'({broken[0][1][:300]}): the others are done; mend these and run it again.'))
    return folder


def vectors_of(model, pixels):
    """Unit vectors float32 (n, dim) of a batch, uint8 (n, 3, side, side) for each member; (0, 0) of none."""
    if not pixels:
        return np.zeros((0, 0), np.float32)
    device = best_device()
    members = model.members if isinstance(model, Ensemble) else [model]
    with torch.inference_mode(), torch.autocast('cuda', enabled=device.type == 'cuda', dtype=torch.float16):
        parts = [member(images.to(device, non_blocking=True)).float() for member, images in zip(members, pixels)]
    with torch.inference_mode():
        return l2_normalise((model.join(parts) if isinstance(model, Ensemble) else parts[0]).cpu().numpy())


def write_shard(folder, file, held, model):
    """Writes the vectors of one tar file from its [(names, bytes, readable, vectors)]."""
    names, sizes, readable, vectors = ([*chain.from_iterable(column)] for column in zip(*held)) if held else ([],) * 4
    table = pd.DataFrame({'file': [f'{file}/{name}' for name in names], 'size': np.array(sizes, np.int64), 'mtime': 0,
                          'readable': np.array(readable, bool)})
    if not np.isfinite(vectors).all():
        raise InputError(printable(f'The model gives NaN or infinite numbers for images of {file}: embed with another.'))
    width = len(vectors[0]) if len(vectors) else 0
    write_part(folder, table, [np.array(vectors, np.float32)] if width else [], width, part_of(folder, file).name)
    if bad := len(table) - len(vectors):
        print(printable(f'{file}: {bad:,} of {len(table):,} images cannot be read and have no vector, first '
                        f'{table["file"][~table["readable"]].iloc[0]}'))


# Search

def nearest_in_shards(folder, queries, k=5):
    """The k images nearest to each query among the vectors of all tar files, exactly: DataFrame query (its row), file (the
    tar file and the name in it), distance, the nearest first. folder: what embed_shards returned; its files are mapped from
    disk one after the other, so that they may be larger than memory. queries: float32 (n, dim), unit rows."""
    found = []
    for part in read_parts([user_path(folder)]):
        table = part.table[part.table['row'] >= 0]
        if len(table):
            distances, rows = nearest_neighbours(queries, part.vectors, min(k, len(part.vectors)))
            found.append(pd.DataFrame({'query': np.arange(len(queries)).repeat(rows.shape[1]), 'distance': distances.ravel(),
                                       'file': table['file'].to_numpy()[rows.ravel()]}))
            merged = pd.concat(found).sort_values(['query', 'distance'], kind='stable')
            found = [merged.groupby('query').head(k)]
    if not found:
        raise MissingError(printable(f'There are no vectors in {folder}: give the folder that embed_shards returned.'))
    return found[0][['query', 'file', 'distance']].reset_index(drop=True)


def main(run, folder, *shards):
    """One of several launched processes: embeds its share of the tar files. None waits for another; the same command goes on
    after a kill."""
    rank, processes = take_place()
    model, _, name = open_model(run)
    print(f'{name}: vectors of tar files are in {embed_shards(model, shards, Path(folder), rank, processes)}')


if __name__ == '__main__':
    report_error(sys.argv[1], lambda: main(*sys.argv[1:]))
