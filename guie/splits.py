"""Splits: the classes that a run trains on, the sample for its PCA, and objects to choose by and to report on."""
import csv
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from guie.datasets import any_names, check_one_each
from guie.errors import InputError
from guie.files import literal, printable, user_path, whole_file
from guie.sources import as_list, data_name, named, read_sources
from guie.tables import table
from guie.weights import read_weights


def select_classes(frame, min_images=4, max_images=50, n_classes=None, seed=5):
    """The images of one run, sorted by domain, label and path; the same whatever the order of the rows.
    As the 4th place did, it first draws `n_classes` classes of each domain (None: all), then drops those with fewer than
    `min_images`, then samples at most `max_images` a class. Prints the result. ValueError when nothing is left or when a
    label is in two domains."""
    check_one_each(frame, 'label', 'domain', 'select_classes')
    chosen = []
    for domain, part in frame.groupby('domain', sort=True):
        rng, counts = np.random.default_rng(seed), part['label'].value_counts().sort_index()
        counts = counts[counts > 0]  # a categorical may name others
        if n_classes is not None and n_classes > len(counts):
            print(printable(f'{domain}: all {len(counts):,} classes are taken (n_classes is {n_classes:,})'))
        counts = counts.iloc[rng.permutation(len(counts))[:n_classes]]
        if few := (counts < min_images).sum():
            print(f'{domain}: {few:,} classes have fewer than {min_images} images (min_images) and are left out')
        part = part[part['label'].isin(counts.index[counts >= min_images])].sort_values('path', kind='stable')
        part = part.sort_values('label', kind='stable', key=lambda labels: pd.factorize(labels, sort=True)[0],
                                ignore_index=True)  # by number: ten times as fast as by text
        chosen.append(part.iloc[rng.permutation(len(part))].groupby('label').head(max_images).sort_index())
    selection = pd.concat(chosen or [frame], ignore_index=True)
    if selection.empty:
        raise InputError(f'No class has {min_images} images; lower min_images or draw more classes.')
    print(printable(describe(selection)))
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


def describe(frame):
    """A line that says which images these are; its last word is selection_hash."""
    parts = ''
    if 'domain' in frame:
        classes = frame.groupby('domain', observed=True)['label'].nunique()
        parts = f' ({", ".join(f"{count:,} {domain}" for domain, count in classes.items())})'
    return f'{len(frame):,} images of {frame["label"].nunique():,} classes{parts}, hash {selection_hash(frame)}'


FEW = 10  # objects, on which a score says little
SELECTION = ('selection_query', 'selection_index')  # of the splits of a run: objects to make choices on


class Splits(dict):
    """{name: DataFrame path, label, domain} of a run; a notebook shows it as a table."""
    name = ''  # of the training data

    def table(self):
        """DataFrame split, images, classes, domains, hash."""
        return pd.DataFrame([{'split': name, 'images': len(frame), 'classes': frame['label'].nunique(),
                              'domains': printable(', '.join(sorted(frame['domain'].unique()))),
                              'hash': selection_hash(frame)}
                             for name, frame in self.items()]).set_index('split')

    def __repr__(self):
        return repr(table(self.table()))

    def _repr_html_(self):
        return table(self.table())._repr_html_()

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


def load_data(train, query=None, index=None, selection=None, *, config, root=None, download=False, held_out=0.1,
              most_held_out=500, name=None, run_dir=None):
    """The splits of a run: dict train, pca (a sample of train), query, index, selection_query, selection_index.
    train: what read_dataset takes, or a list of such; a folder may hold train/ and val/. query, index: never-seen objects to
    report on; selection: a pair (query, index) to make choices on. A pair that is not given is made of held-out classes: for
    each pair `held_out` of the training classes, at most `most_held_out`. Their images go in turn one to the query, two to
    the index. If these are too few, images of the trained classes are held out instead, and that is printed. A class both
    trained on and searched is printed too: it is not never-seen. root, download: as in read_dataset, for all; no download in
    a notebook that submits. name: of the data; None: taken from train. run_dir: ValueError if it holds a run of other
    images."""
    train, selection = literal(train, list, tuple), literal(selection, list, tuple)
    pairs = {('query', 'index'): (query, index), SELECTION: selection or (None, None)}
    for names, pair in pairs.items():
        if (pair[0] is None) != (pair[1] is None):
            raise InputError(f'{names[0]} and {names[1]} belong together: give both, or neither to hold classes out.')
    frame, missing = read_sources(train, root, download), [names for names, pair in pairs.items() if pair[0] is None]
    counts = frame['label'].value_counts()
    if len(counts) < 2 or missing and counts.iloc[0] < 2:
        raise InputError(f'{named(as_list(train))} holds {len(frame):,} images of {len(counts):,} classes '
                         f'({named(counts.index)}), but training tells classes apart and scores find their images again: '
                         f'give a folder of at least 2 class folders with 2 images each.')
    splits = Splits({name: read_sources(source, root, download) for names, pair in pairs.items() if names not in missing
                     for name, source in zip(names, pair)})
    held, rest = hold_out_classes(frame, missing, held_out, most_held_out, config.data_seed)
    least = min(config.min_images, int((rest if held else frame)['label'].value_counts().iloc[1]))
    if least < config.min_images:
        print(f'Fewer than 2 classes have {config.min_images} images (min_images): {least} are enough.')
    if missing and not held:
        print(f'{len(counts):,} classes are too few to hold some out: images of each are held out instead where they '
              f'suffice, and searched among those that are trained on.')
        if few := (counts < least).sum():
            print(f'{few:,} classes have fewer than {least} images (min_images) and are left out')
        held, rest = hold_out_images(frame[frame['label'].map(counts) >= least], missing, config.data_seed)
        least = 1
    splits |= held | {'train': select_classes(rest, least, config.max_images, config.n_classes, config.data_seed)}
    train_on = splits['train']
    for query, index in missing:
        splits.setdefault(index, train_on[~train_on['path'].isin(splits[query]['path'])].reset_index(drop=True))
    splits['pca'] = train_on.sample(min(len(train_on), config.pca_images), random_state=config.data_seed)
    check_splits(splits, pairs)
    if run_dir is not None:
        refuse_other_data(run_dir, describe(train_on))
    ordered = Splits({name: splits[name] for name in (*sum(pairs, ()), 'train', 'pca')})
    ordered.name = data_name(train) if name is None else name
    return ordered


def hold_out_classes(frame, pairs, share, most, seed):
    """({name: table} of classes of several images held out for each pair of names, the table without them); ({}, None) if a
    pair or training would get fewer than two such classes."""
    alone = ~frame['label'].duplicated(keep=False)  # a class of one image finds nothing
    single, frame, held = frame[alone], frame[~alone], {}
    for names in pairs:
        if len(labels := frame['label'].unique()) < 2:
            return {}, None
        frame, part = split_by_class(frame, min(share, most / len(labels)), seed)
        if (part['label'].value_counts() > 1).sum() < 2 or frame['label'].nunique() < 2:
            return {}, None
        turn = part.groupby('label').cumcount() % 3
        held |= {names[0]: part[turn == 0].reset_index(drop=True), names[1]: part[turn > 0].reset_index(drop=True)}
    return held, pd.concat([frame, single], ignore_index=True)


def hold_out_images(frame, pairs, seed):
    """({query: table} of one image in six of each class for each pair of names, the table without them). At least two images
    of a class stay. If none can be spared, the query is one image a class that the other query or training uses too, and
    that is printed."""
    order = frame.sort_values('path', ignore_index=True).sample(frac=1, random_state=seed)
    place, size = order.groupby('label').cumcount(), order.groupby('label')['label'].transform('size')
    each, held, taken = (size // 6).clip(lower=1), {}, place < 0
    for number, (query, _) in enumerate(pairs):
        chosen = (place // each == number) & (size - (number + 1) * each >= 2)
        if not chosen.any():
            chosen = (place == 0) & (size > 1)
            print(f'No images can be spared for {query}: it is {chosen.sum():,} that are used otherwise too.')
        else:
            taken |= chosen
        held[query] = order[chosen].sort_values(['label', 'path'], ignore_index=True)
    return held, order[~taken]


def check_splits(splits, pairs):
    """Prints what limits the scores of a run; ValueError if it could have none."""
    for query, index in pairs:
        if not splits[query]['label'].isin(splits[index]['label']).any():
            raise InputError(f'No image of {query} has its class in {index}: give images of the same classes as both.')
        if (few := len(set(splits[query]['label']) & set(splits[index]['label']))) < FEW:
            print(f'Only {few} objects of {query} are in {index} too, so scores on them are rough.')
        if seen := set(splits[query]['label']) & set(splits['train']['label']):
            print(f'{len(seen)} of the classes in {query} are trained on too, so its score is not one of never-seen '
                  f'objects; first {min(seen)}')
    if (most := len(splits['pca']) - 1) < 64:  # the competition's limit
        print(f'A PCA of {most + 1} training images has at most {most} dimensions instead of 64.')


def sample_objects(splits, n):
    """{'query', 'index'}: positions of the images of the query's first n objects; n None: of all images."""
    few = splits['query']['label'].drop_duplicates().head(n)
    return {part: np.arange(len(splits[part])) if n is None else np.flatnonzero(splits[part]['label'].isin(few))
            for part in ('query', 'index')}


def sample_classes(train, classes=150, each=4):
    """Some images of some trained classes, of all domains alike: what is to be found again among the others."""
    some = pd.Series(train['label'].unique()).sample(frac=1, random_state=5).head(classes)
    return train[train['label'].isin(some)].groupby('label').head(each)


# The images of a run

def trained_on(run_dir):
    """The line of describe on the images that the run in a folder trains on (early versions: a hash); '' if unknown."""
    run_dir = Path(run_dir)
    for file in sorted(run_dir.glob('**/state/step-*/position.json'), reverse=True):
        with suppress(OSError, ValueError, KeyError):
            return json.loads(file.read_text())['progress']['data']
    for file in (run_dir / 'model.safetensors', run_dir / 'stage.safetensors', *sorted(run_dir.glob('*/stage.safetensors'))):
        with suppress(OSError, ValueError, KeyError):
            return json.loads(read_weights(file)[1]['data'])
    return ''


def other_images(there, here):
    """Whether two lines of describe are of different images; '' fits any."""
    return there.split()[-1:] not in ([], here.split()[-1:])


def refuse_other_data(run_dir, data):
    """ValueError if the run in a folder is of other images than `data`, a line of describe."""
    if other_images(there := trained_on(run_dir), data):
        there, here = (f'hash {code}' + f', {words}' * bool(words) for words, _, code in
                       (line.rpartition(', hash ') for line in (there, data)))
        raise InputError(f'{run_dir} holds a run on other images ({there}; now {here}): give this run another name as RUN, '
                         f'or another OUT_DIR.')
