"""Files: written whole or not at all, found in attached inputs, hashed; progress bars."""
import difflib
import hashlib
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from guie.errors import FileError

ATTACHED = ('/kaggle/input',)  # where Kaggle, and kagglehub in Colab, mount attached inputs


@contextmanager
def whole_file(path):
    """A path beside `path` for the block to write a file to, which then replaces `path`: a reader never sees half a file.
    OSError, in one sentence, if the block cannot write; what was there is unchanged."""
    path = Path(path)
    beside = path.with_name(f'.part-{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise FileError(f'{path} could not be written ({reason}): free some space or choose another folder; what was there '
                        f'is unchanged.') from error
    finally:
        with suppress(OSError):  # as when the parent is a file
            beside.unlink()


def write_text(path, text):
    """Writes a text file, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text)


def attached_folders(places=ATTACHED, depth=6):
    """Yields the places and the folders up to `depth` levels below them as str, the least deep first, each level sorted."""
    level = [os.path.abspath(place) for place in places]
    for _ in range(depth + 1):
        yield from level
        level = [os.path.join(folder, name) for folder in level[:2000]  # os.walk passes over what cannot be read
                 for name in sorted(next(os.walk(folder), ((), ()))[1])]


def copy_to_kaggle_output(path, folder='/kaggle/working'):
    """On Kaggle, copies a submission to <folder>/submission.zip, where the competition looks for it; elsewhere nothing."""
    target = Path(folder, 'submission.zip')
    if not target.parent.is_dir() or target.exists() and target.samefile(path):
        return
    with whole_file(target) as beside:
        beside.unlink(missing_ok=True)  # else a killed copy's link would be written through
        try:
            os.link(path, beside)
        except OSError:  # another file system
            shutil.copyfile(path, beside)
    print(f'{target}: the same file')


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def state_hash(tensors):
    """16 hexadecimal digits that identify {name: tensor}: names, dtypes, shapes and bytes, in any order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f'{name} {tensor.dtype} {tuple(tensor.shape)};'.encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def did_you_mean(name, names):
    """' Did you mean …?' for an error sentence, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f' Did you mean {" or ".join(near)}?' if near else ''


def progress_bar(iterable=None, desc=None, **options):
    """tqdm on stdout: a notebook then keeps one plain line of it instead of a red block or an empty widget."""
    return tqdm(iterable, desc, file=sys.stdout, mininterval=.5, **options)
