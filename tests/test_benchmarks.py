"""Every benchmark of speed still runs and still holds its result against the reference's; ratios are not judged here."""
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import timing

MAKEFILE = Path(__file__).resolve().parents[1] / 'Makefile'
NAMES = next(line for line in MAKEFILE.read_text().splitlines() if line.startswith('BENCHMARKS =')).split()[2:]


@pytest.mark.parametrize('name', NAMES)
def test_a_benchmark_runs_checks_its_result_and_prints_its_table(name):
    if name == 'neighbours':
        pytest.importorskip('faiss', reason='without faiss (benchmarks/requirements.txt) its benchmark is untested')
    run = subprocess.run([sys.executable, f'benchmarks/{name}.py', '--quick', '--threads', '1'], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    header = '| | ours | reference | unit | ratio | aim | reached | bound |'
    assert header in run.stdout and run.stdout.rstrip().endswith('|')


@pytest.mark.parametrize(('ours', 'aim', 'reached'), [
    (.8, '≤ 0.80', 'yes'), (.81, '≤ 0.80', 'no'), (4, '≥ 4.0', 'yes'), (3.9, '≥ 4.0', 'no'), (1, '', '')])
def test_an_aim_is_reached_from_the_right_side(ours, aim, reached):
    assert timing.Row('work', ours, 1, 's', aim).reached == reached


@pytest.mark.parametrize('found', [1.2, float('nan')])
def test_another_result_ends_a_benchmark(found):
    assert timing.close([1.05], [1], .1, 'Length') == pytest.approx(.05)
    with pytest.raises(SystemExit, match='Length: results differ'):
        timing.close([found], [1], .1, 'Length')


def test_peak_memory_sees_what_is_gone_by_the_end():
    def work():
        held = bytearray(b'x' * 200_000_000)
        time.sleep(.1)  # as a kernel at work does, this lets the watching thread run
        return len(held)
    before = timing.anonymous_memory()
    assert timing.measured(work)[0]['bytes'] - before > 150e6


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
