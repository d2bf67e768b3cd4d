"""Every benchmark of speed still runs and still holds its result against the reference's; ratios are not judged here."""
import importlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import demo
from benchmarks import all as together
from benchmarks import timing
from guie.config import Config

CONFIG = Config(**demo.settings({'image_size': 32})).override(
    batch_size=8, effective_batch=16, epochs=2, warmup_steps=1, embedding_dim=64, save_minutes=1000)


@pytest.mark.parametrize('name', [*together.NAMES, 'listing'])
def test_a_benchmark_runs_checks_its_result_and_prints_its_table(name):
    if name == 'neighbours':
        pytest.importorskip('faiss', reason='without faiss (benchmarks/requirements.txt) its benchmark is untested')
    run = subprocess.run([sys.executable, f'benchmarks/{name}.py', '--quick', '--threads', '1'], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    header = '| | ours | reference | unit | ratio | aim | reached | bound |'
    assert header in run.stdout and run.stdout.rstrip().endswith('|')


SCRIPT = """
import sys
from benchmarks.timing import Row, print_table
print('a line before')
print_table(f'Kept {sys.argv[1:]}', [Row('one', 2, 4, 's', '≤ 0.6', 'half'), Row('two', 2, 1, 's', '≤ 0.9')])
"""


def test_all_tables_become_one_and_a_script_that_fails_ends_in_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / 'kept.py').write_text(SCRIPT)
    (tmp_path / 'broken.py').write_text('print("| not a row |"); raise SystemExit(3)')
    monkeypatch.setattr(together, 'FOLDER', tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).resolve().parents[1]))
    monkeypatch.setattr(sys, 'argv', ['all.py', '--quick', '--threads', '1', 'broken', 'kept'])
    with pytest.raises(SystemExit, match=r'^Failed: broken\.$'):
        together.main()
    printed = capsys.readouterr()
    assert printed.out.strip().splitlines()[:4] == [
        '| | ours | reference | unit | ratio | aim | reached | bound |', '| --- ' * 8 + '|',
        '| kept: one | 2 | 4 | s | 0.50 | ≤ 0.6 | yes | half |', '| kept: two | 2 | 1 | s | 2.00 | ≤ 0.9 | no |  |']
    assert printed.out.endswith('s in all. Aims not reached: kept: two.\n')
    assert "s; Kept ['--quick', '--threads', '1']\n" in printed.err and ' s, failed\n' in printed.err


def test_growth_measures_every_part_at_sizes_ten_times_apart_and_draws_them(tmp_path):
    command = [sys.executable, 'benchmarks/growth.py', '--quick', '--picture', str(tmp_path / 'growth.png')]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.strip('| ').split(' | ') for line in run.stdout.splitlines() if line.startswith('|')][2:]
    assert len(rows) == 12
    for part, measured, exponent in rows:
        sizes, seconds = zip(*[(int(size.replace(',', '')), float(found.split()[0])) for size, found in (
            cell.split(': ') for cell in measured.split('; '))])
        assert sizes[1] == 10 * sizes[0] and min(seconds) > 0, part
        assert float(exponent) == pytest.approx(np.log10(seconds[1] / seconds[0]), abs=.02), part
    assert (tmp_path / 'growth.png').stat().st_size > 10_000


def test_an_approximate_search_is_compared_with_the_exact_one():
    pytest.importorskip('faiss', reason='without faiss (benchmarks/requirements.txt) its benchmark is untested')
    command = [sys.executable, 'benchmarks/approximate.py', '--quick', '--threads', '1']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.strip('| ').split(' | ') for line in run.stdout.splitlines() if line.startswith('|')][2:]
    recalls = {words: float(recall) for words, recall, *_ in rows}
    assert len(rows) == 5 and recalls['all, exactly'] == 1
    few, many = (recalls[f'IVF63,Flat, 1 of {share} groups'] for share in (32, 8))
    assert .3 < few < many < 1


def test_the_head_of_the_competitions_size_is_measured_by_an_epoch():
    run = subprocess.run([sys.executable, 'benchmarks/frozen_head.py', '--quick'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    work, measured, against = run.stdout.splitlines()[-1].strip('| ').split(' | ')
    step, minutes = float(measured.split()[2]), float(against.split(': ')[1].split()[0])
    assert '1,000 × 32' in work and minutes == pytest.approx(20 * 2578 * step / 60_000, rel=.05, abs=.06)


@pytest.mark.parametrize(('ours', 'aim', 'reached'), [
    (.8, '≤ 0.80', 'yes'), (.81, '≤ 0.80', 'no'), (4, '≥ 4.0', 'yes'), (3.9, '≥ 4.0', 'no'), (1, '', '')])
def test_an_aim_is_reached_from_the_right_side(ours, aim, reached):
    assert timing.Row('work', ours, 1, 's', aim).reached == reached


@pytest.mark.parametrize('found', [1.2, float('nan')])
def test_another_result_ends_a_benchmark(found):
    assert timing.close([1.05], [1], .1, 'Length') == pytest.approx(.05)
    with pytest.raises(SystemExit, match='Length: results differ'):
        timing.close([found], [1], .1, 'Length')


HELD = """
import time

from benchmarks import timing

def work():
    held = bytearray(300_000_000)
    held[::4096] = b'x' * len(range(0, len(held), 4096))  # touched, page by page
    time.sleep(.5)  # as a kernel at work does, this lets the watching thread run
    return len(held)

before = timing.anonymous_memory()
print(timing.measured(work)[0]['bytes'] - before)
"""


def test_peak_memory_sees_what_is_gone_by_the_end():
    # a process of its own: what other tests left may be freed meanwhile, and hide what this one holds
    run = subprocess.run([sys.executable, '-c', HELD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 250e6 < int(run.stdout) < 450e6


def test_the_demos_clock_counts_calls_of_an_exported_file(monkeypatch):
    monkeypatch.syspath_prepend('benchmarks')
    demo_share = importlib.import_module('demo_share')
    clock, images = demo_share.Clock(), torch.rand(2, 3)
    module = torch.jit.script(torch.nn.Linear(3, 4))
    watched = demo_share.WatchedFile(module, clock).eval()
    assert torch.equal(watched(images), module(images)) and clock.seconds['towers'] > 0


def test_the_demos_clock_counts_a_moment_once(monkeypatch):
    monkeypatch.syspath_prepend('benchmarks')
    demo_share = importlib.import_module('demo_share')
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(demo_share.time, 'perf_counter', lambda: next(now))
    clock = demo_share.Clock()
    tower = torch.nn.Linear(3, 3)
    clock.watch_tower(tower)
    clock.watch_tower(tower)  # as a tower in two Embedders is

    def step():
        tower(torch.ones(1, 3)).sum().backward()
        clock.after_backward()
    clock.watched(step, 'head')()
    clock.turn()
    assert clock.within == ['rest'] and clock.seconds.total() == clock.since
    assert clock.seconds['towers'] > clock.seconds['head'] > 0


@pytest.fixture
def recipes(monkeypatch):
    """benchmarks/recipes.py as a module."""
    monkeypatch.syspath_prepend('benchmarks')
    return importlib.import_module('recipes')


def test_the_bench_runs_a_recipe_once_and_compares_it_seed_by_seed(recipes, train, tmp_path):
    splits = {'train': train, 'pca': train, 'query': train[::6], 'index': train.drop(train.index[::6])}
    splits |= {'selection_query': train[1::6], 'selection_index': train.drop(train.index[1::6])}
    file, made = tmp_path / 'results.csv', []

    def make(line):
        made.append(line['recipe'])
        return recipes.run(CONFIG, line['recipe'], line['seed'], splits, recipes.run_folder(tmp_path, line),
                           line['recipe'] == 'place4')

    asked = [('untrained', 5), ('place4', 5), ('best,scale=20', 5), ('untrained', 6), ('place4', 5)]
    for recipe, seed in asked:
        line = dict(zip(recipes.SETTING, ['tiny', 'miniature', 32, 2, 50])) | {'recipe': recipe, 'seed': seed}
        recipes.once(line, file, partial(make, line))
    results = pd.read_csv(file).fillna({'after': ''})
    assert made == ['untrained', 'place4', 'best,scale=20']
    assert results[['recipe', 'after']].agg(' '.join, axis=1).tolist() == [
        'untrained ', 'untrained overlap', 'untrained 3/2 side', 'untrained 3/2 side, overlap', 'place4 ', 'place4 overlap',
        'place4 3/2 side', 'place4 3/2 side, overlap', 'place4 test-time', 'best,scale=20 ', 'best,scale=20 overlap']
    assert results['images'].tolist() == [0] * 4 + [2 * 72] * 7
    assert results[recipes.SCORES].notna().all(axis=None)
    for line in results.to_dict('records'):
        kept = np.load(recipes.run_folder(tmp_path, line) / 'precisions.npz')
        assert np.nanmean(kept[f'd64 {line["after"]}']) == pytest.approx(line['d64'])
        assert kept['label'].tolist() == splits['query']['label'].tolist()

    trained = results.query("recipe != 'untrained'").copy()
    for line in (trained.iloc[0].to_dict(), trained.iloc[-1].to_dict()):
        assert Config.load(recipes.run_folder(tmp_path, line) / 'config.json').seed == 5
        shutil.copytree(recipes.run_folder(tmp_path, line), recipes.run_folder(tmp_path, line | {'seed': 6}))
    trained.loc[trained['recipe'] == 'best,scale=20', 'd64'] = trained['d64'].iloc[0] + .1
    lines = list(recipes.table(pd.concat([trained, trained.assign(seed=6)]), tmp_path))
    assert '144 images' in lines[1] and lines[4].startswith('| place4 ') and '| – | – | 2 |' in lines[4]
    assert lines[-1].startswith('| best,scale=20, then overlap ') and '| +0.100 ± 0.000 | ' in lines[-1]


def test_two_worlds_are_two_domains(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'sources', lambda: {'train': 'emoji'})
    monkeypatch.setattr(recipes.utilities, 'load_data', lambda train, query=None, index=None, config=None: {
        part: pd.DataFrame({'path': [train], 'label': part, 'domain': ''}) for part in ('train', 'query')})
    splits = recipes.load_world('emoji and own images', tmp_path, CONFIG)
    for part in ('train', 'query'):
        assert splits[part].to_dict('list') == {
            'path': ['emoji', str(tmp_path / 'train.csv')], 'label': [part] * 2, 'domain': ['emoji', 'own images']}
