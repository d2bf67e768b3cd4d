"""Soup of 5 checkpoints of ViT-L size: average_states against torch.load of all, torch.stack, mean.

    python benchmarks/soup.py               # 6 GB of temporary files, about 8 GB of memory
    python benchmarks/soup.py --scale 0.1   # a tenth of the blocks

Each measurement is a process of its own, the kinds in turn, with the files in the page cache. torch.load of all has one
turn only, since it takes ten times as long as the others. Memory is the peak of RssAnon while it works, libraries included;
mapped files do not count, since the system can drop them at any time. Reading is a plain read() of every file into one
small buffer.
"""
import math
import mmap
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402


def vit_l_state(seed, blocks, width=1024, patch=14, tokens=577, out=768, classes=0):
    """Random tensors with the names and shapes of an image tower ViT-L/14 at 336 px: 304M numbers in 24 blocks. Each tensor
    is a random stretch of the same few million random numbers, since drawing all would take a minute."""
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
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    noise = torch.empty(2 * max(sizes.values())).normal_(std=.02, generator=draw)
    starts = {name: int(torch.randint(len(noise) - size, (), generator=draw)) for name, size in sizes.items()}
    return {name: noise[starts[name]:starts[name] + sizes[name]].view(shape).clone() for name, shape in shapes.items()}


def average_states():
    """Ours, imported only where it is measured: the other processes then start in a third of the time."""
    from utilities import average_states
    return average_states


def plain(paths):
    states = [torch.load(path, map_location='cpu', weights_only=True) for path in paths]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def reading(paths):
    buffer = mmap.mmap(-1, 1 << 22)  # page-aligned: elsewhere some processors copy at a quarter of the speed
    for path in paths:
        with open(path, 'rb', buffering=0) as file:
            while file.readinto(buffer):
                pass


def moving(paths):
    """What no average can do without: reading, and a result in fresh memory."""
    reading(paths)
    first = torch.load(paths[0], mmap=True, map_location='cpu', weights_only=True)
    return [torch.empty(tensor.shape).fill_(1) for tensor in first.values()]


def errors(paths):
    """Largest distance of the soup to the plain mean, and to the float64 mean rounded once."""
    averaged, far_plain, far_exact = average_states()(paths), 0., 0.
    states = [torch.load(path, mmap=True, map_location='cpu', weights_only=True) for path in paths]
    assert averaged.keys() == states[0].keys()
    for name, tensor in averaged.items():
        stack = torch.stack([state[name] for state in states])
        exact = stack.sum(0, dtype=torch.float64).div_(len(stack)).float()
        far_plain = max(far_plain, stack.mean(0).sub_(tensor).abs_().max().item())
        far_exact = max(far_exact, exact.sub_(tensor).abs_().max().item())
    return {'plain': far_plain, 'exact': far_exact}


def in_process(options, kinds, paths):
    """The answers to some kinds of work, one after the other in a fresh process."""
    child = timing.Child(options, 'any')
    answers = [child.ask(' '.join([kind, *paths])) for kind in kinds]
    child.close()
    return answers


def work(kind, *paths):
    """In a child process: seconds and peak memory, or the errors of the result."""
    if kind == 'errors':
        return errors(paths)
    function = average_states() if kind == 'soup' else WORKS[kind]
    return timing.measured(lambda: function(paths))[0]


WORKS = {'reading': reading, 'moving': moving, 'plain': plain}


def rows_of(runs):
    middle = {kind: {key: median(run[key] for run in of_kind) for key in ('seconds', 'bytes')}
              for kind, of_kind in runs.items()}
    ours, theirs, read = middle['soup'], middle['plain'], middle['reading']
    return [timing.Row('peak memory, against torch.load all', ours['bytes'] / 1e9, theirs['bytes'] / 1e9, 'GB', '≤ 0.35'),
            timing.Row('time, against torch.load all', ours['seconds'], theirs['seconds'], 's', '≤ 0.80',
                       f'reading once: {read["seconds"] / theirs["seconds"]:.2f}'),
            timing.Row('time, against reading the files once', ours['seconds'], read['seconds'], 's', '≤ 4.0',
                       f'reading and fresh memory: {middle["moving"]["seconds"] / read["seconds"]:.2f}')]


def main():
    options = timing.arguments(__doc__, repeats=2, scale=(float, 1., 'share of the 24 blocks'),
                               count=(int, 5, 'checkpoints in the soup'))
    if options.work:
        return timing.answer(lambda question: work(*question.split()))
    blocks = 1 if options.quick else max(1, round(24 * options.scale))
    with tempfile.TemporaryDirectory() as folder:
        paths = [f'{folder}/{i}.pt' for i in range(options.count)]
        for i, path in enumerate(paths):
            torch.save(vit_l_state(i, blocks, width=64 if options.quick else 1024), path)
        runs = {kind: [] for kind in (*WORKS, 'soup')}
        for turn in range(options.repeats):
            for kind in WORKS if turn == 0 else ('reading', 'moving'):
                runs[kind] += in_process(options, [kind], paths)
            if turn < options.repeats - 1:
                runs['soup'] += in_process(options, ['soup'], paths)
        *last, apart = in_process(options, ['soup', 'errors'], paths)
        runs['soup'] += last
        gigabytes = sum(map(os.path.getsize, paths)) / 1e9
    timing.close(apart['plain'], 0, 1e-8, 'Soup against the plain mean')
    timing.close(apart['exact'], 0, 0, 'Soup against the float64 mean, rounded')
    timing.print_table(
        f'Soup of {options.count} checkpoints of {"a tiny" if options.quick else "ViT-L"} size, {gigabytes:.2f} GB in all, '
        f'{options.threads} threads, medians of {options.repeats} runs in turn; equal to the float64 mean, rounded',
        rows_of(runs))


if __name__ == '__main__':
    main()
