"""Listing: which files are images, one rule for folders and label files; what is passed over is counted."""
import os
from collections import Counter
from functools import cache

import numpy as np

from guie.errors import InputError
from guie.files import printable
from guie.images import NEEDED, image_suffixes

COMPANIONS = ('__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')


def hidden(name):
    """Whether a file or folder of this name belongs to a system or a program, as macOS' companions '._1.jpg'."""
    return name[0] == '.' or name in COMPANIONS


def is_image(name, suffixes):
    """Whether a file of this name is an image, as far as the name says. suffixes: of image_suffixes."""
    _, dot, suffix = name.rpartition('.')
    return bool(dot) and suffix.lower() in suffixes and name[0] != '.'


def walk_images(root):
    """(sorted names below root of all image files, as '/cat/1.jpg'; a Counter of what else there is, by suffix).
    A file's suffix decides. Hidden files and folders do not count. No folder is listed twice: links to folders are followed
    after all others, unless they lead to one that was listed or that they lie in."""
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
    """The rows of a label file that walk_images would list, and those without suffix; prints what the others were.
    Folders that all paths share may be hidden: who lists them means them."""
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
    """Whether one of the marks is in one of the paths, each of which begins after a newline."""
    text = '\n' + '\n'.join(paths.tolist())  # one search in C: ten million rows take seconds
    return any(mark in text for mark in marks)


def suffix_of(path):
    """'.jpg' of 'a/b.JPG', 'without suffix' of 'a/b', to be counted."""
    return os.path.splitext(path)[1].lower() or 'without suffix'


def tally(passed):
    """A Counter of what is no image here, as words."""
    words = [f'{kind} {count:,}' + (f' (needs {NEEDED[kind[1:]]})' if kind[1:] in NEEDED else '')
             for kind, count in passed.most_common(8)]
    rest = passed.total() - sum(count for _, count in passed.most_common(8))
    return ', '.join(words + [f'others {rest:,}'] * (rest > 0))


def say_passed(source, passed):
    """Prints what was passed over, if anything was."""
    if passed:
        print(printable(f'{source}: passed over {tally(passed)}'))


def contents_of(folder, passed=()):
    """A folder and the first names in it, for an error sentence, and what walk_images passed over."""
    _, folders, files = next(os.walk(folder), ('', [], ['unreadable' if os.path.isdir(folder) else 'no such folder']))
    words = f', passed over {tally(passed)}' if passed else ''
    return f'{folder} ({", ".join(sorted([*folders, *files])[:8]) or "empty"}){words}'
