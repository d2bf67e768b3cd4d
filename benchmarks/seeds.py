"""The demo under several seeds: what differs by more than chance.

    python benchmarks/seeds.py                     # three seeds, 6 minutes each on 2 cores
    python benchmarks/seeds.py --seeds 1 2 3 4 5 --out runs/seeds
    python benchmarks/seeds.py --one-order --out runs/one_order    # all ingredients see the images in one order

A seed decides the initial head, the data order and the augmentation; the images and the pretrained miniature stay.
Prints a markdown table of mP@5 on never-seen objects at 64 dimensions, mean ± standard deviation over the seeds, then each
step from the zero-shot PCA to the ensemble, with the number of seeds in which it does not go down. A finished seed
is not run again.
"""
import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import demo  # noqa: E402  (the repository's root is not a package)


def results_of(seed, out, one_order):
    """DataFrame stage, model, mp5, seed at 64 dimensions."""
    file = out / str(seed) / 'results.csv'
    table = pd.read_csv(file) if file.exists() else demo.run(file.parent, seed, one_order)
    return table[table['dim'] == 64].assign(seed=seed)[['stage', 'model', 'mp5', 'seed']]


def with_means(table):
    """The table with a row for the mean and the best of each tower's ingredients, seed by seed."""
    runs = table[table['stage'] == 'ingredient']
    tower = runs['model'].str.rsplit('_', n=1).str[0]
    grouped = runs.groupby([tower, 'seed'])['mp5']
    summaries = {how: grouped.agg(how).reset_index().assign(stage='ingredient') for how in ('mean', 'max')}
    return pd.concat([table, *(rows.assign(model=f'{how} of ' + rows['model']) for how, rows in summaries.items())])


def steps(table):
    """The order that the demo should show, as (earlier, later) rows of the pivoted table, with their differences."""
    by_model = table.pivot_table(index='seed', columns='model', values='mp5')
    pairs = [('text PCA', name) for name in by_model if name.startswith('mean of')]
    for name in [name for name in by_model if name.startswith('mean of')]:
        tower = name.removeprefix('mean of ')
        pairs += [(name, f'soup_{tower}'), (f'max of {tower}', f'soup_{tower}'), (f'soup_{tower}', 'ensemble')]
    return {(earlier, later): by_model[later] - by_model[earlier] for earlier, later in pairs}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[5, 6, 7])
    parser.add_argument('--out', type=Path, default=Path('runs/seeds'))
    parser.add_argument('--one-order', action='store_true')
    arguments = parser.parse_args()
    table = with_means(pd.concat([results_of(seed, arguments.out, arguments.one_order) for seed in arguments.seeds]))
    rows = table.groupby(['stage', 'model'])['mp5'].agg(['mean', 'std']).reset_index()
    rows = rows.sort_values('stage', key=lambda stage: stage.map(demo.STAGES.index), kind='stable')
    print(f'\n{len(arguments.seeds)} seeds\n\n| stage | model | mP@5 at 64-d |\n| --- | --- | --- |')
    for row in rows.itertuples():
        print(f'| {row.stage} | {row.model} | {row.mean:.3f} ± {row.std:.3f} |')
    print('\n| from | to | difference | seeds without a fall |\n| --- | --- | --- | --- |')
    for (earlier, later), difference in steps(table).items():
        print(f'| {earlier} | {later} | {difference.mean():+.3f} ± {difference.std():.3f} '
              f'| {(difference >= 0).sum()} of {len(difference)} |')
