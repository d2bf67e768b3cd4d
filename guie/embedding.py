"""Embedding: images to vectors, cached in files; `accelerate launch -m guie.embedding FOLDER` runs it on several GPUs."""
import json
import os
import re
import sys
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object

from guie.checkpoints import load_run, open_checkpoint, save_run
from guie.config import Config
from guie.distributed import best_device, end_with_notebook, launch, processes_here, rank_and_world_size, report_error
from guie.errors import FileError, ProcessError
from guie.files import printable, progress_bar, state_hash, user_path, whole_file
from guie.images import ImageDataset, loader, read_pixels
from guie.model import Ensemble
from guie.scores import selection_mp5
from guie.splits import SELECTION, Splits

WORTH_LAUNCHING = 20_000  # images: for fewer, starting processes takes longer than it saves


def embed(model, frame, *, batch_size=64, workers=None, cache=None, known=(), desc='embedding', max_unreadable=None,
          unreadable=None, pixels=None):
    """Vectors of images: float32 (n, dim), rows as in the table (columns path, label).
    Launched processes embed a part each, and all return the whole. cache: an .npz file of vectors, paths and a hash of
    weights and normalisation; it is used again if paths and hash agree, so an image replaced under its name keeps its old
    vector, unless it was unreadable and no longer is. known: more such files, only read. Unreadable images count as black
    ones, and are printed, or go into the list `unreadable` instead; more than max_unreadable (as in ImageDataset) raise
    OSError. pixels: a dict that keeps the images for the next model that embeds them, as far as memory allows. Each member
    of an Ensemble reads the images at its own size, and has a cache of its own. ProcessError: a data-loading process was
    killed."""
    if isinstance(model, Ensemble):
        options = {'batch_size': batch_size, 'workers': workers, 'desc': desc, 'max_unreadable': max_unreadable,
                   'unreadable': unreadable, 'pixels': pixels}
        below = lambda file, number: file and of_member(Path(file).parent, number) / Path(file).name
        parts = [embed(member, frame, cache=below(cache, number), known=[below(file, number) for file in known], **options)
                 for number, member in enumerate(model.members, start=1)]
        return joined(model, parts)
    rank, processes = rank_and_world_size()
    caches = [*filter(None, [cache, *known])]
    dataset = ImageDataset(frame, model.spec.image_size, max_unreadable=max_unreadable)
    paths, key = absolute(dataset.paths), vectors_hash(model) if caches else ''
    for file in caches:
        if (kept := cached_vectors(file, paths, key, dataset.size)) is not None:
            name_unreadable(kept[1], unreadable)
            return kept[0]
    if not len(dataset):
        return np.zeros((0, width_of(model)), np.float32)
    home, device = next(model.parameters()).device, best_device()
    model.to(device).eval()
    reading = loader(dataset, batch_size, rank=rank, processes=processes, workers=workers)
    batches = progress_bar(batches_of(dataset, reading, pixels), desc, total=len(reading), leave=False,
                           disable=rank > 0 or len(dataset) == 1)
    half = torch.autocast('cuda', enabled=device.type == 'cuda', dtype=torch.float16)
    try:
        with torch.inference_mode(), half, readable_loading(desc):
            vectors = torch.cat([model(images.to(device)).float() for images in batches])
    finally:
        model.to(home)
        if home.type == 'cpu':
            torch.cuda.empty_cache()  # frees the GPU for processes that the notebook launches
    bad = dataset.unreadable
    if processes > 1:  # (processes · each, dim) by rank -> by row
        vectors = gather(vectors).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[:len(dataset)]
        bad = sorted(set(gather_object(bad)))
    vectors = vectors.cpu().numpy()
    name_unreadable(bad, unreadable)
    if cache and rank == 0:
        save_vectors(cache, vectors, paths, key, bad)
    if processes > 1:
        PartialState().wait_for_everyone()
    return vectors


def name_unreadable(bad, unreadable=None):
    """Adds paths of unreadable images to a list, or else prints how many there are, once for all processes."""
    if unreadable is not None:
        unreadable += [path for path in bad if path not in unreadable]
    elif bad and rank_and_world_size()[0] == 0:
        print(f'{len(bad)} images could not be read, first {printable(bad[0])}; they count as a black square.')


def width_of(model):
    """How many numbers the vectors of an Embedder have."""
    head, projection = getattr(model, 'head', None), getattr(model, 'projection', None)
    if projection is not None:
        return projection.out_features
    return model.spec.width if head is None else head.embedding.out_features


@contextmanager
def readable_loading(name, kind=ProcessError, advice='free some and run it again'):
    """Turns errors of data loading into one sentence; that of a killed process is of `kind` and ends with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r'DataLoader worker \(pid|a data-loading process', str(error)):  # the latter: of embed, within fit
            raise
        raise kind(f'{name}: a data-loading process was killed, most likely because memory ran out: {advice}.') from None
    except OSError as error:  # a worker's comes with its traceback inside
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise FileError(re.sub(r'^[\w.]+: ', '', last)) from error


def batches_of(dataset, reading, pixels=None):
    """Yields the images of a loader's batches, uint8 (n, 3, size, size), or those that the dict `pixels` keeps of an earlier
    pass over the same files. In all it keeps at most a quarter of the memory that is free without it."""
    if pixels is None:
        yield from (batch['image'] for batch in reading)
        return
    key, kept = (dataset.size, *dataset.paths), []
    if key in pixels:
        batches, bad = pixels[key]
        dataset.bad |= bad
        yield from batches
        return
    before = sum(images.nbytes for batches, _ in pixels.values() for images in batches)
    fits = before + 3 * dataset.size ** 2 * len(dataset) <= (psutil.virtual_memory().available + before) / 4
    for batch in reading:
        if fits:
            kept.append(batch['image'].clone())  # of its own: a worker's would keep a file open
        yield batch['image']
    if fits:
        pixels[key] = kept, dataset.bad.clone()


def of_member(folder, number):
    """The folder below that keeps the vectors of an ensemble's member; None stays None."""
    return folder and Path(folder) / f'member-{number}'


def joined(model, parts):
    """The vectors of an Ensemble, float32 (n, dim), from those of its members, arrays (n, d)."""
    with torch.inference_mode():
        device = next(model.parameters()).device
        return model.join([torch.from_numpy(part).to(device) for part in parts]).cpu().numpy()


def vectors_hash(model):
    """16 hex digits of SHA-256 over everything that the vectors of an Embedder or Ensemble depend on."""
    numbers = dict(model.named_parameters()) | dict(model.named_buffers())  # mean and std among them
    specs = [{name: value for name, value in asdict(part.spec).items() if name != 'pretrained'}
             for part in (model.members if isinstance(model, Ensemble) else [model])]
    spec = json.dumps(specs if isinstance(model, Ensemble) else specs[0]).encode()
    return state_hash(numbers | {'spec': torch.frombuffer(bytearray(spec), dtype=torch.uint8)})


def absolute(paths):
    """Paths as caches keep them: array of str (n,), the same from any current folder."""
    return np.array([*map(os.path.abspath, paths)], str)


def cached_vectors(file, paths, key, size):
    """(vectors, list of unreadable paths) in an .npz file for these images and this model, or None; None too if one of the
    unreadable images can be read now, at `size` pixels."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(user_path(file)) as kept:
        if str(kept['hash' if 'hash' in kept else 'digest']) == key and np.array_equal(kept['paths'], paths):
            vectors, bad = kept['vectors'], kept['unreadable'].tolist() if 'unreadable' in kept else []
            return None if any_readable(bad, size) else (vectors, bad)


def any_readable(paths, size):
    """Whether one of these images can be read now; of launched processes all say the same, since all embed or none."""
    found = any(is_readable(path, size) for path in paths)
    return any(gather_object([found])) if paths and rank_and_world_size()[1] > 1 else found


def is_readable(path, size):
    """Whether an image can be read at that size."""
    with suppress(OSError):
        read_pixels(path, size)
        return True
    return False


def save_vectors(file, vectors, paths, key, unreadable=()):
    """Saves an .npz file for cached_vectors. If the disk refuses, it prints that; only time is lost."""
    try:
        with whole_file(file) as beside, beside.open('wb') as opened:  # to a path numpy would add .npz
            np.savez(opened, vectors=vectors, paths=paths, hash=key, unreadable=np.array(unreadable, str))
    except OSError as error:
        print(f'{error} These vectors will be computed again the next time.')


def embed_all(model, splits, folder=None, names=('pca', 'query', 'index'), known=None, unreadable=None,
              pixels=None, **limits):
    """Vectors of several splits, on all GPUs, cached in `folder` if given: {name: float32 (n, dim)}.
    known: a folder that may hold them already, such as an attached run's; it is only read. unreadable, pixels and limits
    (workers, max_unreadable) as in embed."""
    if isinstance(model, Ensemble):
        parts = [embed_all(member, splits, of_member(folder, number), names, of_member(known, number), unreadable,
                           pixels, **limits)
                 for number, member in enumerate(model.members, start=1)]
        return {name: joined(model, [part[name] for part in parts]) for name in names}
    processes, images = processes_here(), {name: splits[name] for name in names if len(splits[name])}
    launched = processes > 1 and sum(map(len, images.values())) >= WORTH_LAUNCHING and 'library' in model.spec.architecture
    with tempfile.TemporaryDirectory() as job:
        home = folder or (job if launched else None)
        files = {name: {'cache': home and str(Path(home, f'{name}.npz')),
                        'known': [str(Path(known, f'{name}.npz'))] if known else [], **limits} for name in names}
        if launched:
            key = vectors_hash(model)
            images = {name: frame for name, frame in images.items() if all(
                cached_vectors(file, absolute(frame['path']), key, model.spec.image_size) is None
                for file in (files[name]['cache'], *files[name]['known']))}
        if launched and images:
            save_run(job, model, Config(subcenters=getattr(model.head, 'subcenters', 3)))
            Splits(images).save(Path(job) / 'splits.csv')
            Path(job, 'files.json').write_text(json.dumps({name: files[name] for name in images}))
            launch('guie.embedding', job, processes, stops=False)
        return {name: embed(model, splits[name], desc=f'embedding {name}', unreadable=unreadable, pixels=pixels,
                            **files[name]) for name in names}


def selection_score(model, splits, **options):
    """mP@5 of a model at its own width on the selection split. options: pixels and workers, as in embed."""
    return selection_mp5({name: embed(model, splits[name], desc=f'embedding {name}', **options) for name in SELECTION},
                         splits)


def main(folder):
    """In a launched process: embeds what embed_all wrote into the folder, together with the others."""
    end_with_notebook()
    projected = open_checkpoint(folder).projection is not None
    model, splits = load_run(folder, dim=64 if projected else None), Splits.load(Path(folder) / 'splits.csv')
    for name, files in json.loads(Path(folder, 'files.json').read_text()).items():
        embed(model, splits[name], desc=f'embedding {name}', unreadable=[], **files)  # embed_all names them


if __name__ == '__main__':
    report_error(sys.argv[1], lambda: main(sys.argv[1]))
