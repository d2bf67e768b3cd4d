"""Splits: the classes that a run trains on, the sample for its PCA, and objects to choose by and to report on."""
import csv
import hashlib
import os

import numpy as np
import pandas as pd

from guie.datasets import any_names, check_one_each, read_dataset
from guie.errors import InputError
from guie.files import literal, printable, user_path, whole_file


def select_classes(frame, min_images=4, max_images=50, n_classes=None, seed=5):
    """The images of one run, sorted by domain, label and path; the same whatever the order of the rows.
    As the 4th place did: of each domain `n_classes` classes are drawn first (None: all), then those with fewer than
    `min_images` dropped, then at most `max_images` a class sampled. Prints what came out. Raises ValueError when nothing is
    left or when one label stands in two domains."""
    check_one_each(frame, 'label', 'domain', 'select_classes')
    chosen = []
    for domain, part in frame.groupby('domain', sort=True):
        rng, counts = np.random.default_rng(seed), part['label'].value_counts().sort_index()
        if n_classes is not None and n_classes > len(counts):
            print(printable(f'{domain}: {n_classes:,} classes asked for, all {len(counts):,} taken'))
        counts = counts.iloc[rng.permutation(len(counts))[:n_classes]]
        part = part[part['label'].isin(counts.index[counts >= min_images])].sort_values('path', kind='stable')
        part = part.sort_values('label', kind='stable', key=lambda labels: pd.factorize(labels, sort=True)[0],
                                ignore_index=True)  # by number: ten times as fast as by text
        chosen.append(part.iloc[rng.permutation(len(part))].groupby('label').head(max_images).sort_index())
    selection = pd.concat(chosen or [frame], ignore_index=True)
    if selection.empty:
        raise InputError(f'No class has {min_images} images; lower min_images or draw more classes.')
    classes = selection.groupby('domain')['label'].nunique()
    parts = printable(', '.join(f'{count:,} {domain}' for domain, count in classes.items()))
    print(f'{len(selection):,} images of {classes.sum():,} classes ({parts}), hash {selection_hash(selection)}')
    return selection


def split_by_class(frame, fraction, seed=5):
    """Two tables without a common label: (the rest, about `fraction` of the labels), neither empty."""
    labels = np.sort(frame['label'].unique())
    if len(labels) < 2 or not 0 < fraction < 1:
        raise InputError(f'A split needs 2 labels and a fraction in 0…1, got {len(labels)} and {fraction}.')
    count = min(max(round(len(labels) * fraction), 1), len(labels) - 1)
    held = frame['label'].isin(labels[np.random.default_rng(seed).permutation(len(labels))[:count]])
    return frame[~held].reset_index(drop=True), frame[held].reset_index(drop=True)


def selection_hash(frame):
    """12 hex digits of SHA-256 over the sorted (label, file name) pairs: the same wherever the data lies."""
    pairs = sorted(f'{row.label}\n{os.path.basename(row.path)}' for row in frame.itertuples())
    return hashlib.sha256('\n'.join(pairs).encode(errors='surrogateescape')).hexdigest()[:12]


SELECTION = ('selection_query', 'selection_index')  # of the splits of a run: objects to make choices on


class Splits(dict):
    """{name: DataFrame path, label, domain} of a run; a notebook shows it as a table."""

    def table(self):
        """DataFrame split, images, classes, domains, hash."""
        return pd.DataFrame([{'split': name, 'images': len(frame), 'classes': frame['label'].nunique(),
                              'domains': printable(', '.join(sorted(frame['domain'].unique()))),
                              'hash': selection_hash(frame)}
                             for name, frame in self.items()]).set_index('split')

    def __repr__(self):
        return self.table().to_string()

    def _repr_html_(self):
        return self.table().to_html()

    def save(self, path):
        """Writes all splits as one CSV split, path, label, domain; paths that are not UTF-8 keep their bytes."""
        with whole_file(path) as beside:
            pd.concat([frame.assign(split=name) for name, frame in self.items()]).to_csv(
                beside, index=False, quoting=csv.QUOTE_ALL, errors='surrogateescape')  # some names hold a bare \r

    @classmethod
    @any_names
    def load(cls, path):
        """The splits that `save` wrote."""
        table = pd.read_csv(user_path(path), dtype=str, keep_default_na=False, encoding_errors='surrogateescape')
        return cls({name: part.drop(columns='split').reset_index(drop=True)
                    for name, part in table.groupby('split', sort=False)})


def load_data(train, query=None, index=None, selection=None, *, config, root=None, held_out=0.1, most_held_out=500):
    """The splits of a run: dict train, pca (a sample of train), query, index, selection_query, selection_index.
    train: what read_dataset takes, or a list of such. query, index: never-seen objects to report on; selection: a pair
    (query, index) to make choices on. What is not given is made of classes held out of the training data (`held_out` of them
    each, at most `most_held_out`): their images are dealt out in turn, one to the query, two to the index. A class that is
    both trained and searched is named: it is no never-seen object. root: as in read_dataset, for all."""
    train, selection = literal(train, list, tuple), literal(selection, list, tuple)
    given = [train] if isinstance(train, (str, os.PathLike)) else train
    frame = pd.concat([read_dataset(source, root) for source in given], ignore_index=True)
    splits = Splits()
    for names, pair in ((('query', 'index'), (query, index)),
                        (('selection_query', 'selection_index'), selection or (None, None))):
        if (pair[0] is None) != (pair[1] is None):
            raise InputError(f'{names[0]} and {names[1]} belong together: give both, or neither to hold classes out.')
        if pair[0] is None:
            share = min(held_out, most_held_out / max(1, frame['label'].nunique()))
            frame, held = split_by_class(frame, share, seed=config.data_seed)
            turn = held.groupby('label').cumcount() % 3
            splits |= {names[0]: held[turn == 0].reset_index(drop=True), names[1]: held[turn > 0].reset_index(drop=True)}
        else:
            splits |= dict(zip(names, (read_dataset(source, root) for source in pair), strict=True))
    splits['train'] = select_classes(frame, config.min_images, config.max_images, config.n_classes, config.data_seed)
    splits['pca'] = splits['train'].sample(min(len(splits['train']), config.pca_images), random_state=config.data_seed)
    for name in ('query', 'selection_query'):
        seen = set(splits[name]['label']) & set(splits['train']['label'])
        if seen:
            print(f'{len(seen)} of the classes in {name} are trained on too, so its score is not one of never-seen '
                  f'objects; first {min(seen)}')
    return splits


def sample_objects(splits, n):
    """{'query', 'index'}: positions of the images of the query's first n objects; n None: of all, the index's others too."""
    few = splits['query']['label'].drop_duplicates().head(n)
    return {part: np.arange(len(splits[part])) if n is None else np.flatnonzero(splits[part]['label'].isin(few))
            for part in ('query', 'index')}


def sample_classes(train, classes=200, each=5):
    """Some images of some trained classes, of all domains alike: what is to be found again among the others."""
    some = pd.Series(train['label'].unique()).sample(frac=1, random_state=5).head(classes)
    return train[train['label'].isin(some)].groupby('label').head(each)
