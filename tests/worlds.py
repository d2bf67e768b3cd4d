"""What several test files share: small files, small tables, and the notebooks' settings."""
import json
import os
import shutil
from pathlib import Path

import pandas as pd

import utilities

ROOT = Path(__file__).resolve().parent.parent
NO_IMAGE = b'not decoded by any of these tests'


def write_files(root, files):
    """Files below root: a list of image paths, or a dict path -> text."""
    for path in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(files[path].encode() if isinstance(files, dict) else NO_IMAGE)


def lock_folders(monkeypatch, name):
    """Folders of this name cannot be read from now on, also by root."""
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == name:
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)


def table(counts, domain='things'):
    """DataFrame path, label, domain of {label: number of images}; there are no such files."""
    rows = [(f'/{domain}/{label}/{number:03d}.jpg', label, domain)
            for label, count in counts.items() for number in range(count)]
    return pd.DataFrame(rows, columns=['path', 'label', 'domain'])


def class_folders(train, folder, names, each):
    """A folder with so many of the images in each class folder of these names (letters)."""
    for place, path in enumerate(train['path'][:len(names) * each]):
        to = folder / names[place // each] / f'{place}.jpg'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return folder


def notebook_config(name):
    """The Config of a training notebook's configuration cell."""
    cells = json.loads((ROOT / f'{name}.ipynb').read_text())['cells']
    source, = (''.join(cell['source']) for cell in cells if 'configuration' in cell['metadata'].get('tags', []))
    names = {'utilities': utilities}
    exec(source, names)
    return names['config']
