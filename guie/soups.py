"""Soups: averages of checkpoints, greedy soups, WiSE-FT, and whether ingredients share a basin of the loss."""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from guie.checkpoints import Checkpoint, base_state, load_run, open_checkpoint, save_state
from guie.config import Config
from guie.embedding import absolute, embed_all, name_unreadable, save_vectors, vectors_hash
from guie.errors import InputError
from guie.files import file_hash, state_hash
from guie.retrieval import mean_precision_at_5
from guie.scores import score_table, selection_mp5
from guie.sources import named
from guie.splits import SELECTION, Splits, describe, load_data, other_images, sample_classes
from guie.weights import load_strictly

OF_DATA = ('data_seed', 'n_classes', 'min_images', 'max_images', 'pca_images')  # fields of Config that decide the splits
SPEC_FIELDS = ('model_name', 'image_size', 'mean', 'std', 'activation')  # what a soup's ingredients must share


def data_of(ingredients, sources):
    """(ingredients, splits): the data that ingredients (of find_ingredients) were trained on.
    sources: load_data's arguments {name: source}. Those of other images are printed and left out; ValueError if all are."""
    runs, made = sum(ingredients.values(), []), {}
    told = [json.loads(run.metadata.get('data', '""')) for run in runs]  # '': unknown
    for run, one in zip(runs, told):
        config = Config(**{name: getattr(run.config, name) for name in OF_DATA})
        splits = made[config] = made.get(config) or load_data(**sources, config=config)
        if not other_images(one, here := describe(splits['train'])):
            break
    else:
        raise InputError(f'{named(run.name for run in runs)} were not trained on the images of {sources["train"]} ({here}), '
                         f'but {run.name} on {one}: give their data as DATA, or train on these.')
    others = [id(run) for run, one in zip(runs, told) if other_images(one, here)]
    for run, one in zip(runs, told):
        if id(run) in others:
            print(f'{run.name} was trained on other images ({one}) and is left out')
    kept = {tower: [run for run in some if id(run) not in others] for tower, some in ingredients.items()}
    return {tower: some for tower, some in kept.items() if some}, splits


def average_states(paths, weights=None):
    """Average of checkpoint files -> {name: tensor}; uniform, or by non-negative `weights` of any sum.
    Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482. Memory holds the result alone: files are mapped.
    Summed in float64 and rounded once to the first file's dtype (half precision to float32). Integer buffers must be equal;
    in BatchNorm, statistics are averaged and the largest step counter is taken. ValueError names the first differences of
    each kind: tensors, shapes, integer buffers, and SPEC_FIELDS if metadata holds them."""
    ingredients = open_ingredients(paths)
    weights = np.ones(len(ingredients)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(ingredients),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise InputError(f'{len(ingredients)} checkpoints need as many weights, none negative and not all 0, '
                         f'unlike {weights.tolist()}.')
    return average(ingredients, weights)


def open_ingredients(paths):
    """Checkpoints that can be averaged; ValueError that says why not."""
    ingredients = [open_checkpoint(path) for path in paths]
    if not ingredients:
        raise InputError('A soup needs ingredients: give the path of at least one checkpoint.')
    refuse_differences(ingredients)
    if len({ingredient.path.resolve() for ingredient in ingredients}) < len(ingredients):
        print('One checkpoint is given more than once and counts as often.')
    seeds = {json.loads(ingredient.metadata['config']).get('head_seed') for ingredient in ingredients
             if 'config' in ingredient.metadata and 'head.embedding.weight' in ingredient}
    if len(seeds) > 1:
        print(f'These ingredients began with different heads (head_seed {", ".join(map(str, seeds))}): their average is '
              f'hardly a model. Average runs of one head_seed.')
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in ingredients[0].values()):
        print(f'{ingredients[0].path} is in half precision: the average comes out in float32.')
    return ingredients


def refuse_differences(ingredients):
    """ValueError if Checkpoints cannot be averaged."""
    for other in ingredients[1:]:
        if differences := differences_of(ingredients[0], other):
            raise InputError(f'{other.path} cannot be averaged with {ingredients[0].path}: {differences}. Ingredients share '
                             f'one architecture, classes and preprocessing: leave one of them out, by moving its folder or '
                             f'by naming the folders of the others as INGREDIENTS.')


def differences_of(first, other):
    """What forbids averaging, with the first three of each kind by name; '' if nothing does."""
    shared = [name for name in first if name in other]
    shapes = {name: (tuple(first[name].shape), tuple(other[name].shape)) for name in shared}
    specs = [json.loads(state.metadata.get('spec', '{}')) for state in (first, other)]
    settings = {field: [spec.get(field) for spec in specs] for field in SPEC_FIELDS if all(specs)}
    found = {
        'tensors missing': [name for name in first if name not in other],
        'tensors too many': [name for name in other if name not in first],
        'shapes': [f'{name} {b} against {a}' for name, (a, b) in shapes.items() if a != b],
        'number types or integer buffers': [name for name, (a, b) in shapes.items()
                                            if a == b and not same_numbers(name, first[name], other[name])],
        'settings': [f'{field} {b} against {a}' for field, (a, b) in settings.items() if a != b],
    }
    return '; '.join(f'{kind}: {", ".join(names[:3])}' + (f' and {len(names) - 3} more' if names[3:] else '')
                     for kind, names in found.items() if names)


def same_numbers(name, one, other):
    """Whether two tensors can be averaged: both of floats, or equal integers."""
    if one.is_floating_point() or other.is_floating_point():
        return one.is_floating_point() and other.is_floating_point()
    return name.endswith('num_batches_tracked') or torch.equal(one, other)


def average(states, weights):
    """Weighted average of states that agree -> {name: tensor}; a state of weight 0 is not read."""
    terms = [(state, weight) for state, weight in zip(states, weights, strict=True) if weight]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(states[0], pool.map(lambda name: mean_tensor(name, terms), states[0]), strict=True))


def mean_tensor(name, terms, chunk=1 << 18):
    """Weighted mean of one tensor, terms [(state, weight)], in float64 by chunks, rounded once; the largest of integers."""
    first = terms[0][0][name]
    if not first.is_floating_point():
        return torch.stack([state[name] for state, _ in terms]).amax(0)
    mean = torch.empty(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    flats = [(state[name].detach().reshape(-1), weight) for state, weight in terms]
    buffers, finite = torch.empty(2, min(chunk, first.numel()), dtype=torch.float64), True  # they stay in the cache
    for start in range(0, first.numel(), chunk):
        total, term = buffers[:, :first.numel() - start]
        # The first term begins the sum: added to 0, it would lose the sign of -0.
        total.copy_(flats[0][0][start:start + chunk]).mul_(flats[0][1])
        for flat, weight in flats[1:]:
            total.add_(term.copy_(flat[start:start + chunk]), alpha=weight)
        mean.view(-1)[start:start + chunk] = total.div_(sum(weight for _, weight in terms))
        finite = finite and bool(total.sum().isfinite())
    if not finite:
        sick = [str(state.path) for state, _ in terms if not torch.isfinite(state[name]).all()]
        raise InputError(f'{name} is not finite in {", ".join(sick)}: training diverged, leave it out.')
    return mean


def interpolate_states(zero_shot, fine_tuned, alpha):
    """WiSE-FT: (1 - alpha)·zero_shot + alpha·fine_tuned -> {name: tensor}; alpha 0 and 1 give them exactly.
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903. Each is a file or
    {name: tensor}. What fine_tuned alone has (the head) is taken from it. ValueError for alpha outside 0..1, and where
    fine_tuned lacks or contradicts what zero_shot has."""
    if not 0 <= alpha <= 1:
        raise InputError(f'alpha goes from 0 (zero-shot) to 1 (fine-tuned): {alpha} is outside.')
    zero_shot, fine_tuned = as_state(zero_shot), as_state(fine_tuned)
    tower = part_like(zero_shot, fine_tuned)
    head = {name: tensor for name, tensor in fine_tuned.items() if name not in tower}
    mixed = average([zero_shot, tower], [1 - alpha, alpha]) | average([head], [1])
    return {name: mixed[name] for name in fine_tuned}


def as_state(state):
    """A Checkpoint from a file or from {name: tensor}."""
    if not isinstance(state, dict):
        return open_checkpoint(state)
    return state if isinstance(state, Checkpoint) else Checkpoint(state, {}, 'the given state')


def part_like(base, state):
    """The tensors of a fine-tuned state that its base has too; ValueError unless all of the base are there."""
    part = Checkpoint({name: state[name] for name in base if name in state}, state.metadata, state.path, state.name)
    if differences := differences_of(base, part):
        raise InputError(f'{state.path} was not fine-tuned from {base.path}: {differences}. '
                         "Give the pretrained tower of this run, with 'tower.' before its names.")
    return part


def greedy_soup(paths, score, *, tolerance=0.):
    """Greedy soup -> ({name: tensor}, DataFrame path, alone, with_it, kept), the best ingredient first.
    Wortsman et al. 2022, "Model soups", Recipe 1, https://arxiv.org/abs/2203.05482. `score({name: tensor})` -> float, the
    higher the better, on data for SELECTION: report on other data. From the best ingredient down, each is kept if the
    average with it scores no less (within `tolerance`) than the soup without it. ValueError for a score of NaN."""
    ingredients = open_ingredients(paths)
    alone = [score_of(score, [ingredient], [1]) for ingredient in ingredients]
    kept, best, rows = [], -np.inf, []
    for i in sorted(range(len(alone)), key=lambda i: -alone[i]):
        soup, path = [*kept, ingredients[i]], ingredients[i].path
        with_it = score_of(score, soup, [1] * len(soup)) if kept else alone[i]
        accepted = with_it >= best - tolerance
        print(f'{"kept" if accepted else "left out"}: {ingredients[i].name}, alone {alone[i]:.4f}, '
              f'soup with it {with_it:.4f}' + (f', without it {best:.4f}' if kept else ''))
        rows.append((str(path), alone[i], with_it, accepted))
        kept, best = (soup, with_it) if accepted else (kept, best)
    return average(kept, [1] * len(kept)), pd.DataFrame(rows, columns=['path', 'alone', 'with_it', 'kept'])


def score_of(score, states, weights):
    """Score of a weighted average; ValueError if it is NaN."""
    value = float(score(average(states, weights)))
    if np.isnan(value):
        raise InputError(f'The score of {" + ".join(str(state.path) for state in states)} is NaN: '
                         'evaluate each by itself to see whether it or the data is broken.')
    return value


def interpolation_scores(first, second, score, points=5):
    """Score along the line from one file (alpha 0) to another (alpha 1) -> DataFrame alpha, score.
    A dip between the ends is a barrier: the two do not share a basin and average badly. The usual cause is a different
    initial head. Errors as in average_states and greedy_soup."""
    states, alphas = open_ingredients([first, second]), np.linspace(0, 1, points)
    scores = [score_of(score, states, [1 - alpha, alpha]) for alpha in alphas]
    return pd.DataFrame({'alpha': alphas, 'score': scores})


def task_vector_cosines(paths, base):
    """Cosine between the changes (ingredient - base) of each two ingredients -> square DataFrame by run.
    `base`: the pretrained tower, a file or {name: tensor} with names 'tower.…'; it has no head, so heads do not count. NaN
    for an ingredient that equals it. ValueError where base and ingredients do not fit."""
    ingredients, base = open_ingredients(paths), as_state(base)
    towers = [part_like(base, ingredient) for ingredient in ingredients]
    products = np.zeros((len(towers), len(towers)))
    for name in (name for name in base if base[name].is_floating_point()):
        changes = torch.stack([tower[name].double().flatten() - base[name].double().flatten() for tower in towers])
        products += (changes @ changes.T).numpy()
    lengths, runs = np.sqrt(products.diagonal()), [tower.name for tower in towers]
    with np.errstate(invalid='ignore'):
        return pd.DataFrame(products / np.outer(lengths, lengths), index=runs, columns=runs)


def save_soup(state, run_dir, ingredients, method, **facts):
    """Writes averaged weights as a run of its own: model.safetensors with its ingredients' hashes, and config.json."""
    checkpoints = [open_checkpoint(ingredient) for ingredient in ingredients]
    if 'config' not in checkpoints[0].metadata:
        raise InputError(f'{checkpoints[0].path} does not say how it is built: give the checkpoint that find_ingredients '
                         f'made of it.')
    config = checkpoints[0].config
    metadata = soup_metadata(checkpoints, method, config=asdict(config), **facts)
    save_state(state, Path(run_dir) / 'model.safetensors', metadata, overwrite=True)
    config.save(Path(run_dir) / 'config.json')


def soup_metadata(paths, method, **extra):
    """Metadata for save_state -> {str: str}: method, ingredients (run, SHA-256, score), their spec.
    `extra` (alpha, weights, config, …) is stored as JSON unless it is text."""
    checkpoints = [open_checkpoint(path) for path in paths]
    fields = {'method': method, **extra, 'ingredients': [
        {'run': checkpoint.name, 'sha256': file_hash(checkpoint.path), 'score': checkpoint.score}
        for checkpoint in checkpoints]}
    if 'subcenters' in checkpoints[0].metadata:
        fields['subcenters'] = checkpoints[0].metadata['subcenters']
    if specs := [checkpoint.metadata['spec'] for checkpoint in checkpoints if 'spec' in checkpoint.metadata]:
        fields['spec'] = specs[0]  # the original authors' files have none
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}


class StateEmbedder:
    """Vectors and selection scores of states {name: tensor} of one architecture; equal states are embedded once.
    splits: those of the run, to which 'seen' is added, images of trained classes."""

    def __init__(self, run, splits):
        self.run, self.model, self.known = open_checkpoint(run), load_run(run, dim=None), {}
        self.pixels = {}  # of images that were read, for the next state
        self.splits = Splits(splits, seen=sample_classes(splits['train']))

    @cached_property
    def base(self):
        """The pretrained tower that the runs started from: {'tower.…': tensor}. If it cannot be loaded that is printed, and
        it is None."""
        try:
            return base_state(self.run)
        except (ValueError, OSError) as error:
            return print(f'{self.run.name}: its pretrained weights are not here, so what compares with them is left out '
                         f'({error})')

    def load(self, state):
        """Loads a state into the model; returns its hash."""
        load_strictly(self.model, state, getattr(state, 'path', 'the state'))
        return state_hash(state)

    def vectors(self, state, names, folder=None):
        """embed_all of a state or a run's folder: {name: float32 (n, dim)}, kept under `folder` if given."""
        state = state if isinstance(state, dict) else open_checkpoint(state)
        known, bad = self.known.setdefault(self.load(state), ({}, []))
        beside = Path(state.path).parent / 'vectors' if isinstance(state, Checkpoint) else None
        if folder:
            for name in set(names) & set(known):
                save_vectors(Path(folder) / f'{name}.npz', known[name], absolute(self.splits[name]['path']),
                             vectors_hash(self.model), [path for path in bad if path in {*self.splits[name]['path']}])
        if missing := [name for name in names if name not in known]:
            found = []
            known |= embed_all(self.model, self.splits, folder, missing, beside, unreadable=found, pixels=self.pixels)
            name_unreadable(found)
            bad += found
        return {name: known[name] for name in names}

    def score(self, state):
        """mP@5 at the state's own width on the selection objects."""
        return selection_mp5(self.vectors(state, SELECTION), self.splits)


def sweep_alpha(base, soup, alphas, embedder):
    """WiSE-FT's curve: DataFrame alpha, selection, seen, never seen (each mP@5 at the head's full width), low, high (ends of
    the 95 % interval of 'never seen', as in score_table).
    base: tensors of the pretrained tower (base_state). soup: a run's folder. embedder: StateEmbedder of its architecture.
    Each 'seen' image, of a trained class, is searched among the others."""
    splits, rows = embedder.splits, []
    for alpha in alphas:
        state = interpolate_states(base, soup, alpha)
        vectors, seen = embedder.vectors(state, ('seen', 'query', 'index')), splits['seen']['label']
        among_others = mean_precision_at_5(vectors['seen'], seen, vectors['seen'], seen, exclude_self=True)
        new = score_table('', '', vectors, splits, dims=(None,)).iloc[0]
        rows.append({'alpha': alpha, 'selection': embedder.score(state), 'seen': among_others, 'never seen': new['mp5'],
                     'low': new['low'], 'high': new['high']})
    return pd.DataFrame(rows)
