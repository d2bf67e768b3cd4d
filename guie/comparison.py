"""Comparison: two runs side by side - what differs in their settings, in their scores, and which queries changed most."""
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from guie.cells import Cell, draw_cells, name_of
from guie.checkpoints import open_checkpoint
from guie.errors import InputError
from guie.pictures import MEANING, NO_MORE, RIGHT, WRONG, with_header
from guie.results import NEAREST, read_queries, settings_of, shared_queries
from guie.scores import intervals, paired_bootstrap
from guie.tables import table


@dataclass(frozen=True)
class Comparison:
    """What compare found: tables of settings (setting and its value in each run), of scores (run, mp5, low, high and the
    difference b - a), and of queries (path, label, domain, precision in each run, change; the most improved first)."""
    settings: pd.DataFrame
    scores: pd.DataFrame
    queries: pd.DataFrame

    def counts(self):
        """One line: how many queries got better, worse, or stayed."""
        change = self.queries['change'].dropna()
        return (f'{(change > 0).sum():,} queries better, {(change < 0).sum():,} worse, {(change == 0).sum():,} the same'
                + f'; {self.queries["change"].isna().sum():,} are not judged' * bool(self.queries['change'].isna().any()))

    def __repr__(self):
        return '\n\n'.join([repr(self.shown_scores()), self.counts(), repr(table(self.settings, longest=30))])

    def _repr_html_(self):
        return (f'{self.shown_scores()._repr_html_()}<p>{html.escape(self.counts())}</p>'
                f'{table(self.settings, longest=40)._repr_html_()}')

    def shown_scores(self):
        """The scores as a table to read, the difference with its sign."""
        signs = self.scores['run'].str.startswith('difference')
        return table(self.scores.assign(**{name: [f'{value:+.3f}' if sign else f'{value:.3f}' for value, sign in zip(
            self.scores[name], signs)] for name in ('mp5', 'low', 'high')}))


def compare(a, b, *, queries=4, size=96):
    """Runs a and b side by side -> Comparison, which a notebook shows as tables; draws the queries that changed most.
    a, b: folders of runs with queries.csv, such as soups or an ensemble. A score's low and high are the ends of its 95 %
    interval; that of the difference is paired (see paired_bootstrap). Only queries that both have count, which is printed if
    there are others. The picture shows at most `queries` of them, half of those that got better and half of those that got
    worse as far as there are both, each with its five nearest images in a, then in b. MissingError for a run without
    queries.csv; InputError for runs that share no query."""
    runs = [open_checkpoint(run) for run in (a, b)]
    tables = [read_queries(run.path.parent) for run in runs]
    names = distinct_names(runs)
    rows = shared_queries(*tables)
    if not len(rows[0]):
        raise InputError(f'{names[0]} and {names[1]} share no query: compare runs that were scored on the same data.')
    for name, each, row in zip(names, tables, rows):
        if others := len(each) - len(row):
            print(f'{others:,} of the {len(each):,} queries of {name} are not among those of the other run: left out')
    first, second = (each.iloc[row].reset_index(drop=True) for each, row in zip(tables, rows))
    changes = first[['path', 'label', 'domain']].assign(**{names[0]: first['precision'], names[1]: second['precision']},
                                                        change=second['precision'] - first['precision'])
    ordered = changes.sort_values('change', ascending=False, kind='stable')
    draw_changes(most_changed(ordered, queries), dict(zip(names, (first, second))), size)
    return Comparison(different_settings(names, runs), score_rows(names, first, second), ordered.reset_index(drop=True))


def distinct_names(runs):
    """The names of two runs; if they are the same, each with as many folders before it as tell them apart."""
    names, above = [run.name for run in runs], [run.path.absolute().parent.parent.parts[::-1] for run in runs]
    if names[0] == names[1]:
        depth = next((depth for depth, (one, other) in enumerate(zip(*above), 1) if one != other), 0)
        names = [Path(*parts[:depth][::-1], name).as_posix() for parts, name in zip(above, names)]
    return names if names[0] != names[1] else [f'{name} ({letter})' for name, letter in zip(names, 'ab')]


def different_settings(names, runs):
    """DataFrame setting and its value in each run, of the settings that differ; '' where a run has none."""
    told = [settings_of(run) for run in runs]
    return pd.DataFrame([(field, *(str(each.get(field, '')) for each in told)) for field in told[0] | told[1]
                         if told[0].get(field, '') != told[1].get(field, '')], columns=['setting', *names])


def score_rows(names, first, second):
    """DataFrame run, mp5, low, high of both runs, and of their difference."""
    labels, precisions = first['label'], [first['precision'], second['precision']]
    rows = [(name, np.nanmean(one), *ends) for name, one, ends in zip(names, precisions, intervals(precisions, labels))]
    rows.append((f'difference over {first["precision"].count():,} queries', *paired_bootstrap(*precisions, labels)))
    return pd.DataFrame(rows, columns=['run', 'mp5', 'low', 'high'])


def most_changed(ordered, most):
    """Positions of at most `most` queries of a table in the order of change: half of the better, half of the worse ones."""
    better, worse = ordered.index[ordered['change'] > 0].tolist(), ordered.index[ordered['change'] < 0].tolist()[::-1]
    half = max(most - len(worse), most - most // 2)
    kept = better[:half]
    return kept + worse[:most - len(kept)]


def draw_changes(chosen, found, size):
    """Draws queries, each with a row of its five nearest images in each run. found: {run's name: rows of queries.csv}."""
    if not chosen:
        return print('No query changed, so there are none to show.')
    rows = []
    for query in chosen:
        several = [neighbour_cells(each.loc[query], name) for name, each in found.items()]
        path, label = next(iter(found.values())).loc[query, ['path', 'label']]
        rows += [[Cell(0, path, name_of(label), colour='black'), *several[0]], *several[1:]]
    draw_cells(with_header(rows), size, MEANING, together=len(found))


def neighbour_cells(row, title):
    """The Cells of a row of queries.csv, from column 1.3 on. title: of the row."""
    near = [rank for rank in range(1, NEAREST + 1) if row[f'path_{rank}'] != '']
    colours = [RIGHT if row[f'label_{rank}'] == row['label'] else WRONG if rank <= row['relevant'] else NO_MORE
               for rank in near]
    return [Cell(rank + .3, row[f'path_{rank}'], name_of(row[f'label_{rank}']), f'{row[f"distance_{rank}"]:.2f}', colour,
                 left=title * (rank == 1)) for rank, colour in zip(near, colours)]
