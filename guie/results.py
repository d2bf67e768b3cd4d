"""Results: what a run leaves beside its weights - scores, queries with their neighbours, vectors - and tables of runs."""
import csv
import json
import math
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from guie.checkpoints import PROJECTION, open_checkpoint, save_projection, save_state, sound_checkpoints
from guie.config import present_names
from guie.datasets import any_names
from guie.errors import InputError, MissingError
from guie.files import state_hash, user_path, whole_file
from guie.projection import dims_of, fit_pca, project
from guie.retrieval import nearest_neighbours, precision_at_5
from guie.scores import intervals, save_scores

NEAREST = 5  # index images of each query that are kept
NUMBERS = ['precision', 'relevant', *(f'distance_{rank + 1}' for rank in range(NEAREST))]  # of queries.csv
COLUMNS = ['path', 'label', 'domain', 'precision', 'relevant', *(
    f'{name}_{rank + 1}' for rank in range(NEAREST) for name in ('path', 'label', 'distance'))]


def save_results(run_dir, scores, vectors, splits, projection=None):
    """Completes a run, a soup or an ensemble: writes scores.csv, queries.csv and vectors.npz into its folder, and the
    projection to at most 64 numbers into its model.safetensors.
    scores: a score_table. vectors: of embed_all, at the model's full width. splits: their images. projection: a Projection
    (None: the PCA of vectors['pca'] that score_table takes). queries.csv has a row a never-seen query: path, label, domain,
    precision (empty where the index shows none of its object), relevant (index images of its object), and path, label and
    distance of its five nearest index images. vectors.npz holds what explore maps: query and index, float16 (n, dim).
    OSError if the disk refuses."""
    run_dir = user_path(run_dir)
    save_scores(scores, run_dir / 'scores.csv')
    projection = projection or fit_pca(vectors['pca'], dims_of(vectors['pca']))
    query, index = project(vectors, projection=projection)
    with whole_file(run_dir / 'queries.csv') as beside:
        query_table(query, index, splits).to_csv(beside, index=False, quoting=csv.QUOTE_ALL, errors='surrogateescape')
    with whole_file(run_dir / 'vectors.npz') as beside, open(beside, 'wb') as file:
        np.savez_compressed(file, query=query.astype(np.float16), index=index.astype(np.float16), **{
            f'index_{column}s': np.array(splits['index'][column].tolist(), str) for column in ('path', 'label')})
    save_projection(run_dir, projection.linear())


def query_table(query, index, splits):
    """queries.csv of vectors (q, d) and (n, d) of the query and index images: see save_results."""
    table = splits['query'][['path', 'label', 'domain']].reset_index(drop=True)
    table['precision'] = precision_at_5(query, table['label'], index, splits['index']['label'])
    table['relevant'] = table['label'].map(splits['index']['label'].value_counts()).fillna(0).astype(int)
    near = min(NEAREST, len(index))
    distances, places = nearest_neighbours(query, index, near)
    for rank in range(NEAREST):
        images = splits['index'].iloc[places[:, rank]] if rank < near else splits['index'].head(0)
        for column in ('path', 'label'):
            table[f'{column}_{rank + 1}'] = pd.Series(images[column].tolist(), dtype=object)
        table[f'distance_{rank + 1}'] = pd.Series(distances[:, rank] if rank < near else [], dtype=float).round(4)
    return table


@any_names
def read_queries(run):
    """queries.csv of a run's folder: DataFrame as in save_results. MissingError without one; InputError for another file."""
    file = user_path(run) / 'queries.csv'
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding_errors='surrogateescape')[COLUMNS]
        return table.assign(**{name: pd.to_numeric(table[name]) for name in NUMBERS})
    except FileNotFoundError:
        raise MissingError(f'{file.parent} has no queries.csv: run its notebook again, or call save_results for it.'
                           ) from None
    except (ValueError, LookupError) as error:
        raise InputError(f'{file} is not a table of save_results ({str(error).splitlines()[0]}): write it again.') from error


def read_vectors(run):
    """vectors.npz of a run's folder: {'query', 'index': float32 (n, dim), 'index_paths', 'index_labels'}, or None."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), \
            np.load(user_path(run) / 'vectors.npz') as kept:
        return {name: kept[name].astype(np.float32) if kept[name].dtype == np.float16 else kept[name]
                for name in ('query', 'index', 'index_paths', 'index_labels')}


def save_ensemble(run_dir, members, projection):
    """Writes the folder of an ensemble: a model.safetensors that holds the projection and names the members by their folders
    and hashes.
    members: paths of runs or soups; they must stay where they are, relative to run_dir. projection: a Projection of their
    joined vectors."""
    run_dir, checkpoints = user_path(run_dir), [open_checkpoint(member) for member in members]
    if not checkpoints:
        raise InputError('An ensemble needs members: give the path of at least one run.')
    told = [{'run': os.path.relpath(place_of(one), run_dir), 'name': one.name, 'hash': state_hash(one)}
            for one in checkpoints]
    tensors = {f'{PROJECTION}{name}': tensor for name, tensor in projection.linear().state_dict().items()}
    metadata = {'method': 'ensemble', 'members': json.dumps(told)}
    save_state(tensors, run_dir / 'model.safetensors', metadata, overwrite=True)


def place_of(checkpoint):
    """The folder of a run, or another file of weights."""
    return checkpoint.path.parent if checkpoint.path.name == 'model.safetensors' else checkpoint.path


def list_runs(root):
    """The runs below a folder, or of a list of Checkpoints: DataFrame run, method, model_name, image_size, augmentation,
    seed, epochs, ingredients (the names of a soup's, or of an ensemble's members, instead of one's settings), mp5 (at 64
    dimensions, if scored), low, high (ends of its 95 % interval, if queries.csv is there) and hash of the weights."""
    if isinstance(root, (str, Path)):
        root = [file for file in sorted(user_path(root).glob('**/model.safetensors')) if file.parent.parent.name != 'state']
    table = pd.DataFrame([row_of(checkpoint) for checkpoint in sound_checkpoints(root)])
    return table.astype({name: 'Int64' for name in ('image_size', 'seed', 'epochs') if name in table})  # some have none


def row_of(checkpoint):
    """A row of list_runs."""
    told, score, (low, high) = settings_of(checkpoint), checkpoint.score, interval_of(checkpoint)
    return {'run': checkpoint.name, **{name: told.get(name) for name in (
        'method', 'model_name', 'image_size', 'augmentation', 'seed', 'epochs', 'ingredients')},
        'mp5': math.nan if score is None else score, 'low': low, 'high': high,
        'hash': state_hash(checkpoint or checkpoint.projection)}


def settings_of(run):
    """What a run was made of: {'method': how, 'ingredients': the names of a soup's, or of an ensemble's members, and each
    field of Config: value}; without what differs between ingredients, augmentation and seed, if it has some."""
    told = open_checkpoint(run).metadata
    parts = ([part['name'] for part in json.loads(told['members'])] if 'members' in told
             else [part['run'] for part in json.loads(told.get('ingredients', '[]'))])
    config = present_names(json.loads(told.get('config', '{}')))
    if parts:
        config = {name: value for name, value in config.items() if name not in ('augmentation', 'seed')}
    return {'method': told.get('method', 'training')} | ({'ingredients': ', '.join(parts)} if parts else {}) | config


def shared_queries(first, second):
    """Positions of the queries that two tables share, as two arrays int64 of one length.
    Rows are the same query if path and label agree; if none do, since data sets are mounted in different folders, if label
    and file name do. Equal rows are matched in order."""
    for by_path in (True, False):
        keys = [[(path if by_path else os.path.basename(path), label) for path, label in zip(table['path'], table['label'])]
                for table in (first, second)]
        tables = [pd.DataFrame({'key': key, 'row': range(len(key))}) for key in keys]
        tables = [table.assign(again=table.groupby('key').cumcount()) for table in tables]
        both = tables[0].merge(tables[1], on=['key', 'again'])
        if len(both):
            break
    return both['row_x'].to_numpy(int), both['row_y'].to_numpy(int)


def interval_of(checkpoint):
    """Ends of the 95 % interval of a run's mP@5 over the objects of queries.csv; NaN without that file, or if it is damaged,
    which is printed."""
    if not (place_of(checkpoint) / 'queries.csv').is_file():
        return math.nan, math.nan
    try:
        queries = read_queries(place_of(checkpoint))
    except InputError as error:
        print(error)
        return math.nan, math.nan
    return intervals([queries['precision']], queries['label'])[0]
