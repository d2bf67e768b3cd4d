"""Listing: which files are images, by one rule for folders and label files; what is skipped is counted."""
import os
from collections import Counter
from functools import cache

import numpy as np

from guie.errors import InputError
from guie.files import printable
from guie.images import NEEDED, image_suffixes

COMPANIONS = ('__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')


def hidden(name):
    """Whether a file or folder of this name belongs to a system or a program, such as macOS's companions '._1.jpg'."""
    return name[0] == '.' or name in COMPANIONS


def is_image(name, suffixes):
    """Whether a file's name is that of an image. suffixes: from image_suffixes."""
    _, dot, suffix = name.rpartition('.')
    return bool(dot) and suffix.lower() in suffixes and name[0] != '.'


def walk_images(root):
    """(sorted names of all image files below root, as '/cat/1.jpg'; a Counter of the other files, by suffix).
    A file's suffix decides. Hidden files and folders do not count. No folder is listed twice: links to folders are followed
    last, unless their target was listed already or holds the link itself."""
    found, passed, suffixes, starts, seen = [], Counter(), image_suffixes(), [root], set()

    def count(error):
        passed.update(['unreadable folders'] * (error.filename != root))

    for start in starts:
        for folder, subfolders, files in os.walk(start, onerror=count):
            status = os.stat(folder)
            place = status.st_dev, status.st_ino
            if place in seen or folder == start != root and leads_up(start):
                passed['links to folders listed already'] += 1
                subfolders.clear()
                continue
            seen.add(place)
            subfolders[:] = sorted(name for name in subfolders if not hidden(name))
            starts += filter(os.path.islink, [os.path.join(folder, name) for name in subfolders])
            below = folder[len(root):].replace(os.sep, '/') + '/'
            for name in files:
                if is_image(name, suffixes):
                    found.append(below + name)
                elif name[0] != '.':
                    passed[suffix_of(name)] += 1
    return sorted(found), passed


def leads_up(link):
    """Whether a link leads to a folder that it lies in."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(link))]) == target


def only_images(frame, file):
    """The rows of a label file that walk_images would list, and those without a suffix; prints what the others were.
    Folders that all paths share may be hidden: whoever lists them means them."""
    paths, suffixes = frame['path'].tolist(), image_suffixes()
    strange = {end for end in {path[path.rfind('.') + 1:] for path in paths}
               if end.lower() not in suffixes and '/' not in end}
    if not strange and not holds(frame['path'], '/.', *COMPANIONS):
        return frame
    shared = len(os.path.dirname(os.path.commonprefix([min(paths), max(paths)])))
    within = cache(lambda folder: any(map(hidden, filter(None, folder.split('/')))))  # many rows have few folders
    kinds = ['hidden' if within(os.path.dirname(path)[shared:]) or hidden(os.path.basename(path))
             else suffix_of(path) if path[path.rfind('.') + 1:] in strange else '' for path in paths]
    passed = Counter(filter(None, kinds))
    if passed.total() == len(frame):
        raise InputError(f'{file}: none of its {len(frame):,} rows names an image that can be read here: {tally(passed)}.')
    say_passed(file, passed)
    return frame[np.array(kinds) == '']


def holds(paths, *marks):
    """Whether one of the paths contains one of the marks; a newline in a mark stands for the beginning of a path."""
    text = '\n' + '\n'.join(paths.tolist())  # one search in C: ten million rows take seconds
    return any(mark in text for mark in marks)


def suffix_of(path):
    """'.jpg' of 'a/b.JPG', 'without suffix' of 'a/b', to be counted."""
    return os.path.splitext(path)[1].lower() or 'without suffix'


def tally(passed):
    """A Counter of skipped files, as words."""
    words = [f'{kind} {count:,}' + (f' (needs {NEEDED[kind[1:]]})' if kind[1:] in NEEDED else '')
             for kind, count in passed.most_common(8)]
    rest = passed.total() - sum(count for _, count in passed.most_common(8))
    return ', '.join(words + [f'others {rest:,}'] * (rest > 0))


def say_passed(source, passed):
    """Prints what was skipped, if anything was."""
    if passed:
        print(printable(f'{source}: skipped {tally(passed)}'))


def contents_of(folder, passed=()):
    """A folder, the first names in it and what walk_images skipped, for an error sentence."""
    _, folders, files = next(os.walk(folder), ('', [], ['unreadable' if os.path.isdir(folder) else 'no such folder']))
    words = f', skipped {tally(passed)}' if passed else ''
    return f'{folder} ({", ".join(sorted([*folders, *files])[:8]) or "empty"}){words}'
