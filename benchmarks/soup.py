"""Soup of 5 checkpoints of ViT-L size: average_states against torch.load of all, torch.stack, mean.

    python benchmarks/soup.py               # 6 GB of temporary files, about 8 GB of memory
    python benchmarks/soup.py --scale 0.1   # a tenth of the blocks

Prints one table. Each measurement is a process of its own, the three kinds in turn, the files in the page cache.
Memory is the peak of RssAnon while it works, libraries included: mapped files do not count, the system can drop
them at any time. Reading is a plain read() of every file into one small buffer.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

GOALS = {'memory': .35, 'time': .8, 'reading': 1.5}


def vit_l_state(seed, blocks, width=1024, patch=14, tokens=577, out=768, classes=0):
    """Random tensors with the names and shapes of an image tower ViT-L/14 at 336 px: 304M numbers in 24 blocks."""
    shapes = {'tower.class_embedding': (width,), 'tower.positional_embedding': (tokens, width),
              'tower.conv1.weight': (width, 3, patch, patch), 'tower.proj': (width, out)}
    block = {'attn.in_proj_weight': (3 * width, width), 'attn.in_proj_bias': (3 * width,),
             'attn.out_proj.weight': (width, width), 'attn.out_proj.bias': (width,),
             'mlp.c_fc.weight': (4 * width, width), 'mlp.c_fc.bias': (4 * width,),
             'mlp.c_proj.weight': (width, 4 * width), 'mlp.c_proj.bias': (width,),
             'ln_1.weight': (width,), 'ln_1.bias': (width,), 'ln_2.weight': (width,), 'ln_2.bias': (width,)}
    for i in range(blocks):
        shapes |= {f'tower.transformer.resblocks.{i}.{name}': shape for name, shape in block.items()}
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.empty(shape).normal_(std=.02, generator=draw) for name, shape in shapes.items()}


def soup(paths):
    import utilities
    return utilities.average_states(paths)


def plain(paths):
    states = [torch.load(path, map_location='cpu', weights_only=True) for path in paths]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def reading(paths):
    buffer = bytearray(1 << 22)
    for path in paths:
        with open(path, 'rb', buffering=0) as file:
            while file.readinto(buffer):
                pass


def anonymous_bytes():
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith('RssAnon'))


def measure(work, paths):
    """Seconds and peak RssAnon of work(paths)."""
    import utilities  # noqa: F401  (its imports are not part of the work)
    peaks, done = [anonymous_bytes()], threading.Event()

    def watch():
        while not done.wait(.005):
            peaks.append(anonymous_bytes())
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work(paths)
    seconds = time.perf_counter() - start
    peaks.append(anonymous_bytes())
    done.set()
    watcher.join()
    del result
    return {'seconds': seconds, 'bytes': max(peaks)}


def errors(paths):
    """Largest distance of the soup to the plain mean, and to the float64 mean rounded once."""
    averaged, far_plain, far_exact = soup(paths), 0., 0.
    states = [torch.load(path, mmap=True, map_location='cpu', weights_only=True) for path in paths]
    assert averaged.keys() == states[0].keys()
    for name, tensor in averaged.items():
        stack = torch.stack([state[name] for state in states])
        far_plain = max(far_plain, (tensor - stack.mean(0)).abs().max().item())
        far_exact = max(far_exact, (tensor - stack.double().mean(0).float()).abs().max().item())
    return {'plain': far_plain, 'exact': far_exact}


def in_process(kind, paths):
    """Run one kind of work in a fresh process that finds utilities.py in this folder or the one above."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, __file__, '--work', kind, *paths]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def print_table(runs, check, count, gigabytes):
    print(f'{count} checkpoints, {gigabytes:.2f} GB together, {torch.get_num_threads()} threads, '
          f'medians of {len(runs["soup"])} runs in turn\n')
    middle = {kind: {key: statistics.median(run[key] for run in of_kind) for key in ('seconds', 'bytes')}
              for kind, of_kind in runs.items()}
    ours, theirs, read = middle['soup'], middle['plain'], middle['reading']
    ratios = {'memory': ours['bytes'] / theirs['bytes'], 'time': ours['seconds'] / theirs['seconds'],
              'reading': ours['seconds'] / read['seconds']}
    print('| soup | seconds (all runs) | peak memory, GB | ratio | goal |\n| --- | --- | --- | --- | --- |')
    for kind, label in (('reading', 'reading the files once'), ('plain', 'torch.load all, stack, mean'),
                        ('soup', 'average_states')):
        seconds = ', '.join(f'{run["seconds"]:.2f}' for run in runs[kind])
        print(f'| {label} | {middle[kind]["seconds"]:.2f} ({seconds}) | {middle[kind]["bytes"] / 1e9:.2f} | | |')
    for name, label in (('memory', 'memory against torch.load all'), ('time', 'time against torch.load all'),
                        ('reading', 'time against reading')):
        print(f'| {label} | | | {ratios[name]:.2f} | ≤ {GOALS[name]} |')
    print(f'| largest difference to the plain mean | | | {check["plain"]:.1e} | ≤ 1e-8 |')
    print(f'| largest difference to the float64 mean, rounded | | | {check["exact"]:.1e} | 0 |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scale', type=float, default=1., help='share of the 24 blocks')
    parser.add_argument('--count', type=int, default=5, help='checkpoints in the soup')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--work', choices=('soup', 'plain', 'reading', 'errors'), help=argparse.SUPPRESS)
    parser.add_argument('paths', nargs='*', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work = globals()[options.work]
        print(json.dumps(work(options.paths) if options.work == 'errors' else measure(work, options.paths)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [f'{folder}/{i}.pt' for i in range(options.count)]
        for i, path in enumerate(paths):
            torch.save(vit_l_state(i, max(1, round(24 * options.scale))), path)
        in_process('reading', paths)  # into the page cache
        runs = {'reading': [], 'plain': [], 'soup': []}
        for _ in range(options.repeats):
            for kind, of_kind in runs.items():
                of_kind.append(in_process(kind, paths))
        print_table(runs, in_process('errors', paths), options.count, sum(map(os.path.getsize, paths)) / 1e9)


if __name__ == '__main__':
    main()
