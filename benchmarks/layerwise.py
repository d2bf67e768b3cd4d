"""Does a soup with its own mixture for every block beat one mixture for all? Run after `make demo`.

    python benchmarks/layerwise.py [--runs runs/demo] [--sweeps 2]

Starting from the uniform soup, each block in turn tries every ingredient alone and the uniform mixture, and keeps what
scores best on the selection objects. Prints mP@5 on these (full width) and on never-seen ones (64 dimensions): nothing was
chosen by the latter.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie.embedding import selection_score  # noqa: E402
from guie.towers import load_strictly  # noqa: E402


def block_of(name):
    """'3' for a tensor of the tower's fourth block, 'rest' for what lies outside the blocks."""
    found = re.search(r'blocks\.(\d+)\.', name)
    return found.group(1) if found else 'rest'


def mix(states, weights):
    """Averages tensors, each with the weights of its block: {name: tensor}."""
    return {name: sum(float(w) * state[name] for w, state in zip(weights[block_of(name)], states)) for name in states[0]}


def search(states, score, sweeps):
    """Coordinate ascent over the blocks' mixtures: the weights of each block, and the selection score."""
    uniform = np.full(len(states), 1 / len(states))
    candidates = [uniform, *np.eye(len(states))]
    weights = {block: uniform for block in map(block_of, states[0])}
    best = score(mix(states, weights))
    for _ in range(sweeps):
        for block in weights:
            scores = [score(mix(states, weights | {block: one})) for one in candidates]
            if max(scores) > best:
                best = max(scores)
                weights[block] = candidates[int(np.argmax(scores))]
    return weights, best


def scores_of(model, splits):
    """(selection at full width, never seen at 64 dimensions)."""
    table = utilities.score_table('', '', utilities.embed_all(model, splits), splits, dims=(64,))
    return selection_score(model, splits), table['mp5'].iloc[0]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=Path, default=Path('runs/demo'))
    parser.add_argument('--sweeps', type=int, default=2)
    arguments = parser.parse_args()
    found = utilities.find_ingredients(arguments.runs, ['vit_h_224', 'vit_l_336'])
    rows = []
    for tower, runs in found.items():
        splits = utilities.load_data(**demo.sources(), config=runs[0].config)
        model, score = utilities.load_run(runs[0]), utilities.StateEmbedder(runs[0], splits).score
        weights, _ = search(runs, score, arguments.sweeps)
        for name, state in (('uniform', utilities.average_states(runs)), ('layer-wise', mix(runs, weights))):
            load_strictly(model, state, name)
            rows.append((tower, name, *scores_of(model, splits)))
    print('\n| tower | soup | selection | never seen |\n| --- | --- | --- | --- |')
    for tower, name, selection, unseen in rows:
        print(f'| {tower} | {name} | {selection:.3f} | {unseen:.3f} |')
