"""Shards: vectors of the images in tar files, as webdataset packs them, by any number of processes and machines.

    accelerate launch -m guie.shards RUN FOLDER TAR…

writes the vectors of each tar file into FOLDER: float32 (n, dim), unit rows, and a table that names them. TAR: files,
folders of files, or addresses that webdataset opens. A tar file that has vectors is not read again: delete these if it has
changed. It is known by its path, which must be the same on all machines."""
import gzip
import hashlib
import os
import re
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from guie.collection import SubmissionFile, hash_of, read_part, remove_leftovers, write_part
from guie.datasets import any_names
from guie.distributed import best_device, report_error, take_place
from guie.embedding import readable_loading
from guie.errors import FileError, InputError, MissingError, Stopped
from guie.files import folder_beside, printable, progress_bar, short_name, user_path
from guie.images import default_workers, image_suffixes, one_thread, read_pixels
from guie.listing import hidden, say_passed, suffix_of
from guie.model import Ensemble
from guie.projection import l2_normalise
from guie.retrieval import nearest_neighbours
from guie.search import open_model, whole_number

BATCH = 64  # images that a tower sees at a time
PADDING = 4 << 20  # bytes of zeros that may end a tar file: tar -b 4096 writes half of that
# Parameters that sign an address or let it expire; Azure's short names sign only beside its sig.
SIGNING = 'x-(amz|goog|oss)-.*|signature|expires|(aws|oss)accesskeyid|googleaccessid|key-pair-id|policy|token|sig'
AZURE = f'{SIGNING}|s[etpvrs]|srt|spr|sip|sk(oid|tid|t|e|s|v)'


class UnusableTars(FileError):
    """Some tar files are damaged, or none of their images can be read; all others are done."""


class StrictTarInfo(tarfile.TarInfo):
    """Raises where a tar file is cut off or damaged between two members, which tarfile takes for its end."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not buf.strip(b'\0'):  # the end
                raise
            raise tarfile.ReadError(f'cut off or damaged ({error})') from error


class ImageBatch(NamedTuple):
    """Some images of a tar file, in its order; the last one of a file has none, but what is to be said of the file."""
    file: str
    names: tuple = ()
    sizes: tuple = ()              # bytes
    readable: tuple = ()           # whether each can be read
    pixels: tuple = ()             # a tensor uint8 (n, 3, side, side) of those that can for each side
    reason: str = ''               # why the first of the others cannot
    last: bool = False
    error: str = ''                # what ended the file too early
    passed: dict = {}              # how many other files it has, by suffix


class TarImages(IterableDataset):
    """Yields ImageBatches of tar files; each file is read from its beginning to its end by one worker.
    sides: of the towers that see them."""

    def __init__(self, files, sides):
        self.files, self.sides = files, sides

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for file in self.files[number::workers]:
            error, passed = '', Counter()
            try:
                images = images_of(file, passed)
                while some := [*islice(images, BATCH)]:
                    yield decoded(file, some, self.sides)
            except Exception as reason:  # whatever opening an address or a damaged file raises
                error = ' '.join(f'{type(reason).__name__}: {reason}'.split())[:300]
            yield ImageBatch(file, last=True, error=error, passed=dict(passed))


def images_of(file, passed):
    """Yields (name, bytes) of the images in a tar file; counts other files by suffix in `passed`."""
    suffixes = image_suffixes()
    with opened(file) as stream, tarfile.open(fileobj=stream, mode='r|*', tarinfo=StrictTarInfo) as tar:
        member = None
        for member in tar:
            if member.isfile() and suffix_of(member.name)[1:] in suffixes and not hidden(os.path.basename(member.name)):
                yield member.name, tar.extractfile(member).read()
            elif not member.isdir():
                passed[suffix_of(member.name) if member.isfile() else 'links'] += 1
        check_end(tar, PADDING if member else tarfile.RECORDSIZE)


def check_end(tar, most):
    """ReadError unless a tar file ends where tarfile takes it to end, at the first zeros, but for `most` more of them."""
    zeros = 0
    while block := tar.fileobj.read(1 << 20):
        zeros += len(block)
        if block.strip(b'\0'):
            raise tarfile.ReadError('damaged, or several tar files joined: more follows the zeros that end it')
        if zeros > most:
            raise tarfile.ReadError(f'damaged or not copied to its end: more than {most:,} bytes of zeros end it')


def opened(file):
    """A tar file or address as a stream of bytes."""
    if is_address(file):
        from webdataset import gopen
        return gopen(file)
    with open(file, 'rb') as stream:
        packed = stream.read(2) == b'\x1f\x8b'
    return (gzip.open if packed else open)(file, 'rb')  # tarfile would read the first of gzip's members, and check none


def decoded(file, some, sides):
    """The ImageBatch of some (name, bytes) of a tar file."""
    names, contents = zip(*some)
    pixels, reason = [], ''
    for name, content in some:
        try:
            pixels.append([read_pixels(name, side, content=content).permute(2, 0, 1) for side in sides])
        except OSError as error:
            pixels.append(None)
            reason = reason or str(error)
    return ImageBatch(file, names, tuple(map(len, contents)), tuple(part is not None for part in pixels),
                      tuple(torch.stack(part) for part in zip(*filter(None, pixels))), reason)


# Embedding

def is_address(file):
    """Whether a TAR is no file of this machine but an address."""
    return '://' in file or file.startswith('pipe:')


def tar_files(given):
    """The tar files of some files, addresses and folders of files, in order, each once. MissingError: one that is not there,
    or none at all. InputError: an address without webdataset, or one that is named twice, signed in two ways."""
    files = []
    for one in map(str, given):
        path = one if is_address(one) else os.path.abspath(user_path(one))
        found = sorted(map(str, user_path(path).glob('*.tar'))) if os.path.isdir(path) else [path]
        if not found or not is_address(one) and not os.path.exists(path):
            raise MissingError(printable(f'There is no tar file {one}: check the path.' if not os.path.isdir(path) else
                                         f'There is no .tar file in {one}: name another folder.'))
        files += found
    if not files:
        raise MissingError('No tar file is named: name some, or their folder.')
    known = {}
    for file in files:
        if known.setdefault(unsigned(file), file) != file:
            raise InputError(printable(f'{unsigned(file)} is named with several signatures, which do not tell tar files '
                                       f'apart: name it once, or download them if these are several.'))
    if any(map(is_address, files)):
        try:
            import webdataset  # noqa: F401  (before a worker needs it)
        except ImportError:
            raise InputError('Addresses are opened by webdataset, which is not installed: pip install webdataset.') from None
    return [*known.values()]


def unsigned(file):
    """A tar file or address without what signs the latter or lets it expire."""
    if not file.startswith(('http://', 'https://')):
        return file
    address, _, query = file.partition('?')
    signing = re.compile(f'({AZURE if "&sig=" in f"&{query}" else SIGNING})(=.*)?', re.IGNORECASE)
    kept = '&'.join(one for one in query.split('&') if not signing.fullmatch(one))
    return f'{address}?{kept}' if kept else address


def part_of(folder, file):
    """The table of a tar file's vectors, whether there or not. The signature of an address does not count."""
    shown = file.partition('?')[0] if is_address(file) else file
    name = short_name(os.path.basename(shown.rstrip('/')).removesuffix('.tar')[:80], 236)  # with what write_part adds, 255
    return folder / f'{name}-{hashlib.sha256(os.fsencode(unsigned(file))).hexdigest()[:8]}.csv'


def embed_shards(model, shards, folder, rank=0, processes=1, workers=None):
    """Embeds every processes-th tar file, from the rank-th on, that has no vectors yet -> the folder of the model's vectors.
    model: Embedder or Ensemble. shards: as in tar_files. Images that cannot be read are counted, printed, and have no
    vector. UnusableTars, a FileError, after all others are done: tar files that are damaged or of which no image can be
    read; they leave nothing. FileError: what cannot be written. Stopped: a worker was killed."""
    if isinstance(model, SubmissionFile):
        raise InputError('A submission.zip takes one image at a time: embed tar files by the run or ensemble that it is of.')
    folder = user_path(folder) / f'vectors-{hash_of(model)}'
    with folder_beside(folder / 'any'):  # it can be written
        files = [file for file in tar_files(shards)[rank::processes] if not is_done(part_of(folder, file))]
    remove_leftovers(folder)
    members, broken, held, passed = members_of(model), [], {}, Counter()
    workers = min(default_workers() if workers is None else workers, len(files))
    batches = DataLoader(TarImages(files, [member.spec.image_size for member in members]), batch_size=None,
                         num_workers=workers, worker_init_fn=one_thread, pin_memory=torch.cuda.is_available())
    model.to(best_device()).eval()
    loading = readable_loading('tar files', Stopped, 'start fewer processes; the same command goes on from here')
    with progress_bar(total=len(files), desc='tar files', disable=rank > 0) as bar, loading:
        for batch in batches if files else ():
            earlier = held.setdefault(batch.file, [])
            if not batch.last:
                earlier.append((*batch[1:4], unit_vectors(model, batch.pixels), batch.reason))
                continue
            passed.update(batch.passed)
            if error := batch.error or reason_without_images(earlier):
                broken.append((batch.file, error))
            else:
                write_shard(part_of(folder, batch.file), batch.file, earlier)
            del held[batch.file]
            bar.update()
    say_passed('tar files', passed)
    if broken:
        raise UnusableTars(printable(f'{len(broken):,} of {len(files):,} tar files cannot be used, first {broken[0][0]} '
                                     f'({broken[0][1]}): the others are done; mend or leave out these and run it again.'))
    return folder


def is_done(part):
    """Whether a tar file has its vectors."""
    return part.exists() and part.with_suffix('.npy').exists()


def members_of(model):
    """The Embedders of a model."""
    return model.members if isinstance(model, Ensemble) else [model]


def unit_vectors(model, pixels):
    """float32 (n, dim) of a batch, uint8 (n, 3, side, side) for each member; (0, 0) of none."""
    if not pixels:
        return np.zeros((0, 0), np.float32)
    device = best_device()
    with torch.inference_mode(), torch.autocast('cuda', enabled=device.type == 'cuda', dtype=torch.float16):
        parts = [member(images.to(device)).float() for member, images in zip(members_of(model), pixels)]
    with torch.inference_mode():
        return l2_normalise((model.join(parts) if isinstance(model, Ensemble) else parts[0]).cpu().numpy())


def reason_without_images(batches):
    """Why none of a tar file's images has a vector; '' if one has, or if it has no images."""
    readable = [one for batch in batches for one in batch[2]]
    return '' if any(readable) or not readable else f'none of its images can be read: {batches[0][-1]}'


@any_names
def write_shard(part, file, batches):
    """Writes the vectors of a tar file from its [(names, bytes, readable, vectors, reason)]; the table comes last."""
    names, sizes, readable, vectors = ([*chain.from_iterable(column)] for column in [*zip(*batches)][:4] or [()] * 4)
    table = pd.DataFrame({'file': [f'{file}/{name}' for name in names], 'size': np.array(sizes, np.int64), 'mtime': 0,
                          'readable': np.array(readable, bool)})
    if not np.isfinite(vectors).all():
        raise InputError(printable(f'The model gives NaN or infinite numbers for images of {file}: embed with another.'))
    with folder_beside(part) as beside:  # of its own: another process may write the same
        dim = len(vectors[0]) if vectors else 0
        write_part(beside, table, [np.array(vectors, np.float32)] if vectors else [], dim, part.name)
        for suffix in ('.npy', '.csv'):
            (beside / part.name).with_suffix(suffix).replace(part.with_suffix(suffix))
    if bad := len(table) - len(vectors):
        print(printable(f'{file}: {bad:,} of {len(table):,} images cannot be read and have no vector ('
                        f'{next(reason for *_, reason in batches if reason)})'))
    if not len(table):
        print(printable(f'{file}: there is no image in it'))


# Search

def nearest_in_shards(folder, queries, k=5):
    """The k images nearest to each query among the vectors of all tar files, exactly: DataFrame query (its row), file (the
    tar file and the name in it), distance, the nearest first. folder: what embed_shards returned; its files are mapped from
    disk one after the other, so that they may be larger than memory. queries: float32 (n, dim), unit rows. FileError:
    damaged vectors, which are deleted."""
    k = whole_number(k)
    parts = [part for part in sorted(user_path(folder).glob('*.csv')) if is_done(part) and not part.name.startswith('.')]
    distances, places = np.zeros((len(queries), 0), np.float32), None
    for number, part in enumerate(progress_bar(parts, 'searching', leave=False)):
        if len(vectors := vectors_in(part)):
            near, rows = nearest_neighbours(queries, vectors, min(k, len(vectors)))
            here = np.stack([np.full_like(rows, number), rows], -1)  # (part, row) of each
            distances = np.concatenate([distances, near], 1)
            places = here if places is None else np.concatenate([places, here], 1)
            best = distances.argsort(1, kind='stable')[:, :k]
            distances, places = np.take_along_axis(distances, best, 1), np.take_along_axis(places, best[..., None], 1)
    if places is None:
        raise MissingError(printable(f'There are no vectors in {folder}: give the folder that embed_shards returned.'))
    places = places.reshape(-1, 2)
    files = np.empty(len(places), object)
    for number in np.unique(places[:, 0]):
        here = places[:, 0] == number
        table = whole_part(parts[number]).table
        files[here] = table['file'][table['row'] >= 0].to_numpy()[places[here, 1]]
    return pd.DataFrame({'query': np.arange(len(queries)).repeat(distances.shape[1]), 'file': files,
                         'distance': distances.ravel()})


def vectors_in(part):
    """The mapped vectors of a part. FileError: damaged ones, which are deleted."""
    with suppress(OSError, ValueError, EOFError):  # whole_part says what it is; it reads the table too, which takes longer
        return np.load(part.with_suffix('.npy'), mmap_mode='r')
    return whole_part(part).vectors


def whole_part(part):
    """The Part of a table. FileError: a damaged one, which is deleted."""
    if (found := read_part(part)) is None:
        raise FileError(printable(f'{part} was damaged: run the command that embeds again, which makes it anew.'))
    return found


def main(run=None, folder=None, *shards):
    """One of several launched processes: embeds its share of the tar files. None waits for another; the same command goes on
    after a kill. Unusable tar files are printed: an error, such as of a full disk, ends the other processes of this machine.
    """
    if not shards:
        raise InputError('Name a run, a folder for the vectors, and tar files: accelerate launch -m guie.shards RUN FOLDER '
                         'TAR…')
    rank, processes = take_place()
    model, *_ = open_model(run)
    try:
        print(f'Process {rank} of {processes} is done; the vectors are in '
              f'{embed_shards(model, shards, folder, rank, processes)}')
    except UnusableTars as error:
        print(f'Process {rank} of {processes}: {error}')


if __name__ == '__main__':
    report_error(next(iter(sys.argv[1:]), None), lambda: main(*sys.argv[1:]))
