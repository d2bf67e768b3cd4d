"""Files: written whole or not at all, found in attached inputs, hashed; progress bars."""
import ast
import difflib
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from guie.errors import FileError, OneSentence

ATTACHED = ('/kaggle/input',)  # where Kaggle, and kagglehub in Colab, mount attached inputs
KAGGLE = '/kaggle/working'  # is there on Kaggle alone


def user_path(path):
    """A path as people write it, as Path: resolves '~', '$HOME' and blanks around names, unless that very name exists."""
    text = os.fsdecode(path)
    if text.lstrip().startswith('~') or not os.path.lexists(text):
        text = os.path.expanduser(text.lstrip())
    if not text or os.path.lexists(text):
        return Path(text)
    folder, name = os.path.split(text)
    return user_path(folder) / os.path.expandvars(name.strip())


def literal(value, *kinds):
    """The value in a text that is JSON or a Python literal of one of these kinds; any other value as it is.
    papermill passes dicts, lists and tuples as text."""
    for read in (json.loads, ast.literal_eval) if isinstance(value, str) else ():
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            held = read(value.strip())
            return held if isinstance(held, kinds) else value
    return value


@contextmanager
def whole_file(path):
    """Yields a path to write a file to; the file then replaces `path`, so that a reader never sees half a file. Processes
    that write one file at a time do not meet; what a killed one left is deleted.
    OSError, in one sentence, if the block cannot write; the old file stays."""
    path = user_path(path)
    beside = path.with_name(f'.part-{os.getpid()}-{end_of(path.name)}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(path)
        yield beside
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise FileError(f'{path} could not be written ({reason_of(error)}): free some space or choose another folder; what '
                        f'was there is unchanged.') from error
    finally:
        with suppress(OSError):  # as when the parent is a file
            beside.unlink()


def end_of(name):
    """A file's name, or the end of one that leaves no space for what comes before: file systems refuse 256 bytes."""
    return os.fsdecode(os.fsencode(name)[-230:])


def delete_leftovers(path):
    """Deletes what processes that are gone left beside a file that they were writing."""
    for left in path.parent.glob(f'.part-*-{glob.escape(end_of(path.name))}'):
        _, pid, name = left.name.split('-', 2)
        if name == end_of(path.name) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):
                left.unlink()


@contextmanager
def folder_beside(path):
    """Yields a temporary folder next to `path`, to write files in that whole_file then moves to their places.
    OSError, in one sentence, if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.part-', dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        if isinstance(error, OneSentence):
            raise
        raise FileError(f'{path} could not be written ({reason_of(error)}): free some space or choose another folder.'
                        ) from error


def reason_of(error):
    """Why something failed, in one line: the system's words, or else the error's first line."""
    return getattr(error, 'strerror', None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_text(path, text):
    """Writes a text file in UTF-8, whole or not at all; paths that are not UTF-8 keep their bytes."""
    with whole_file(path) as beside:
        beside.write_text(text, 'utf-8', 'surrogateescape')


def printable(text):
    """A text that print and figures can show: bytes of a path that are not UTF-8 become '\\udcff'."""
    return text.encode(errors='backslashreplace').decode()


def short_name(name, most):
    """A file's name cut to so many bytes, at a character's end: file systems refuse more than 255."""
    content = os.fsencode(name)
    return name if len(content) <= most else content[:most].decode(errors='ignore')


def attached_folders(places=ATTACHED, depth=6):
    """Yields the places and the folders up to `depth` levels below them as str, level by level, each sorted. Of a level only
    2,000 folders are opened: images may lie in millions of them."""
    level = [os.path.abspath(user_path(place)) for place in places]
    for _ in range(depth + 1):
        yield from level
        level = [os.path.join(folder, name) for folder in level[:2000]  # os.walk skips what cannot be read
                 for name in sorted(next(os.walk(folder), ((), ()))[1])]


def session_start(working=KAGGLE):
    """The time from which a run's hours count, in seconds: on Kaggle, which ends the whole session, that of the notebook's
    beginning; elsewhere now."""
    return psutil.Process().create_time() if Path(working).is_dir() else time.time()


def scratch_folder(out_dir, working=KAGGLE, scratch='/tmp'):
    """The folder for what a notebook compares but does not keep -> Path. On Kaggle it is /tmp/<name of out_dir>, since all
    of /kaggle/working (about 20 GB) becomes the version's output; elsewhere it is out_dir."""
    out_dir = user_path(out_dir)
    on_kaggle = Path(working).is_dir() and Path(scratch).is_dir()
    return Path(scratch, out_dir.absolute().name) if on_kaggle else out_dir


def check_writable(folder):
    """Makes a folder for results, if it is missing. OSError, in one sentence, if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FileError(f'{folder} cannot be written ({reason_of(error)}): choose another OUT_DIR.') from error


def copy_to_kaggle_output(path, folder=KAGGLE):
    """On Kaggle, copies a submission to <folder>/submission.zip, where the competition looks for it."""
    path, target = user_path(path), Path(folder, 'submission.zip')
    if not target.parent.is_dir() or target.exists() and target.samefile(path):
        return
    with whole_file(target) as beside:
        beside.unlink(missing_ok=True)  # a killed copy may have left a link, and copying would write through it
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
    by_case = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_case, n=3) if isinstance(name, str) else ()
    return f' Did you mean {" or ".join(by_case[found] for found in near)}?' if near else ''


class LiveLine:
    """One output of a notebook's cell that is rewritten in place; a saved copy keeps its last text."""

    def __init__(self):
        self.shown = None  # IPython's handle of that output

    def write(self, text):
        from IPython.display import display
        text = {'text/plain': text}
        if self.shown is None:
            self.shown = display(text, raw=True, display_id=True)
        else:
            self.shown.update(text, raw=True)


class NotebookBar(tqdm):
    """tqdm as one line of a notebook's cell, however long it ran."""
    line = None

    def display(self, msg=None, pos=None):
        """Shows the bar, or another text; tqdm calls it."""
        self.line = self.line or LiveLine()
        self.line.write(str(self) if msg is None else msg)


class PassingBar(NotebookBar):
    """One that need not stay: when it is done, the next one of the same cell takes its line, since an output cannot be taken
    back. It shows only work of two seconds or more."""
    seconds, free = 2, defaultdict(list)  # free: {number of a cell's execution: lines of its bars that are done}

    def __init__(self, *given, **options):
        super().__init__(*given, delay=self.seconds, **options)

    def display(self, msg=None, pos=None):
        """Shows the bar, or another text; tqdm calls it."""
        if self.line is None and (lines := self.free[cell_number()]):
            self.line = lines.pop()
        super().display(msg, pos)

    def close(self):
        """Ends the bar; tqdm calls it, sometimes twice."""
        super().close()
        if self.line is not None:
            self.free[cell_number()].append(self.line)
            self.line = None


class OutputOfOthers:
    """Prints what another process prints; in a notebook a line that it rewrites, such as a bar, is one LiveLine."""

    def __init__(self):
        self.rest, self.live = '', None

    def write(self, text):
        if not in_notebook():
            sys.stdout.write(text)
            return sys.stdout.flush()
        *lines, self.rest = (self.rest + text).split('\n')
        for line in lines:
            self.show(line)
            self.live = None
        if '\r' in self.rest:
            self.show(self.rest)

    def show(self, line):
        if '\r' not in line and self.live is None:
            return print(line)
        texts = [text for text in line.split('\r') if text.strip()]
        if texts:  # a bar of leave=False is wiped with blanks
            self.live = self.live or LiveLine()
            self.live.write(texts[-1].rstrip())


def in_notebook():
    """Whether this process is a notebook's kernel."""
    return 'IPython' in sys.modules and hasattr(sys.modules['IPython'].get_ipython(), 'kernel')


def cell_number():
    """The number that a notebook shows beside the cell that runs."""
    return sys.modules['IPython'].get_ipython().execution_count


def progress_bar(iterable=None, desc=None, **options):
    """tqdm; in a notebook one plain line, which stays, or with leave=False a PassingBar."""
    if in_notebook():
        kind = NotebookBar if options.pop('leave', True) else PassingBar
        return kind(iterable, desc, file=io.StringIO(), mininterval=.5, **options)
    return tqdm(iterable, desc, file=sys.stdout, mininterval=.5, **options)
