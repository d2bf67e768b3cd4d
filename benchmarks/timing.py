"""What the speed benchmarks share: interleaved repeats, peak memory, child processes, one form of table."""
import argparse
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.perf_counter()


def arguments(doc, repeats, **more):
    """Options that every benchmark has, and more={name: (type, default, help)}; sets the number of threads everywhere."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument('--repeats', type=int, default=repeats, help='interleaved runs, of which the median counts')
    parser.add_argument('--quick', action='store_true', help='tiny inputs: only shows that the benchmark works')
    parser.add_argument('--work', help=argparse.SUPPRESS)  # what a child process does
    for name, (kind, default, words) in more.items():
        parser.add_argument(f'--{name}', type=kind, default=default, help=words)
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    threadpool_limits(options.threads)
    return options


def interleaved(works, repeats):
    """(median seconds by name, last result by name) of works={name: function}, called in turn; a first turn warms up."""
    seconds, results = {name: [] for name in works}, {}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            results[name] = work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}, results


def anonymous_memory():
    """Bytes of RssAnon of this process: mapped files, which the system can drop at any time, do not count."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith('RssAnon'))


@contextmanager
def peak_memory():
    """A list whose last entry, after the block, is the largest RssAnon within it."""
    peak, done = [anonymous_memory()], threading.Event()

    def watch():
        while not done.wait(.005):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], anonymous_memory())
        done.set()
        watcher.join()


def measured(work):
    """{'seconds', 'bytes'} of one call, and its result."""
    with peak_memory() as peak:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
    return {'seconds': seconds, 'bytes': peak[0]}, result


class Child:
    """This script again in a process of its own (--work `work`), which answers each line on its input by a line of JSON."""

    def __init__(self, options, work, *, environment=None):
        command = [sys.executable, sys.argv[0], '--work', work, '--threads', str(options.threads)]
        self.process = subprocess.Popen(command + ['--quick'] * options.quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | (environment or {}))

    def ask(self, question=''):
        print(question, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{'):
                return json.loads(line)
        raise RuntimeError(f'{" ".join(self.process.args)} ended without an answer.')

    def close(self):  # at once: unloading torch would take two seconds
        self.process.kill()
        self.process.wait()


def answer(function):
    """In a child: function(question) -> dict for every line on the input."""
    for line in sys.stdin:
        print(json.dumps(function(line.strip())), flush=True)


@dataclass
class Row:
    """One comparison. With a ≤ in `aim` the unit is a cost, with a ≥ a speed."""
    work: str
    ours: float
    reference: float
    unit: str
    aim: str = ''    # of ours / reference: '≤ 0.80', '≥ 4.0', or '' where there is none
    bound: str = ''  # what limits it, and the ratio that the limit would give

    @property
    def ratio(self):
        return self.ours / self.reference

    @property
    def reached(self):
        if not self.aim:
            return ''
        sign, value = self.aim.split()
        return 'yes' if (self.ratio <= float(value) if sign == '≤' else self.ratio >= float(value)) else 'no'


def print_table(title, rows):
    print(f'\n{title}; {time.perf_counter() - STARTED:.0f} s in all\n')
    print(f'| | ours | reference | unit | ratio | aim | reached | bound |\n{"| --- " * 8}|')
    for row in rows:
        print(f'| {row.work} | {row.ours:.4g} | {row.reference:.4g} | {row.unit} | {row.ratio:.2f} | {row.aim} | '
              f'{row.reached} | {row.bound} |')
    sys.stdout.flush()


def matrix_speed(size=1024):
    """FLOP/s of float32 matrix products here, with the threads that are set."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    seconds, _ = interleaved({'product': lambda: a @ b}, 5)
    return 2 * size ** 3 / seconds['product']


def close(found, expected, tolerance, what):
    """Ends the benchmark where results differ: speed does not count if the result is another."""
    apart = float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())
    if not apart <= tolerance:
        raise SystemExit(f'{what}: results differ by {apart:.3g}, more than {tolerance:g}.')
    return apart
