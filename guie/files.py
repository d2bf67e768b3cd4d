"""Files: written whole or not at all, read as weights, found in attached inputs, hashed; progress bars."""
import difflib
import hashlib
import os
import pickle
import shutil
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from guie.errors import FileError, InputError

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
    """Writes a text file, whole or not at all; in UTF-8, but for paths that are not, which keep their bytes."""
    with whole_file(path) as beside:
        beside.write_text(text, 'utf-8', 'surrogateescape')


def printable(text):
    """A text that print and figures can show: bytes of a path that are no UTF-8 as '\\udcff'."""
    return text.encode(errors='backslashreplace').decode()


def read_weights(path):
    """({name: tensor}, metadata) of a file of weights, tensors mapped and not yet read; nothing in the file is executed.
    The content decides: safetensors, or torch.save of a state dict, also nested under 'state_dict' or 'model'. ValueError
    for a file that is truncated, of another kind, or holds Python objects."""
    path = Path(path).resolve()  # the name of what a link leads to
    with open(path, 'rb') as file:
        start = file.read(9)
    try:
        if start[8:] == b'{':  # safetensors: 8 bytes of length, then JSON
            with safe_open(path, framework='pt') as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        mapped = zipfile.is_zipfile(path) and path.suffix != '.safetensors'  # torch.load would trust the name
        with open(path, 'rb') as file:
            held = torch.load(path if mapped else file, map_location='cpu', mmap=mapped, weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        if isinstance(error, pickle.UnpicklingError) and 'GLOBAL' in str(error):
            raise InputError(f'{path} holds Python objects, which could run code when loaded: '
                             'ask for its state dict alone, or for safetensors.') from error
        raise InputError(f'{path} is truncated, or neither safetensors nor a PyTorch state dict: '
                         'copy or download it again.') from error
    for nest in ('state_dict', 'model'):
        if isinstance(held, dict) and isinstance(held.get(nest), dict):
            held = held[nest]
    named = held.items() if isinstance(held, dict) else ()
    return {str(name): value.detach() for name, value in named if isinstance(value, torch.Tensor)}, {}


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
