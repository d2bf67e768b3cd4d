"""The share of `make demo` that is not tower arithmetic, and what it is instead.

    python benchmarks/demo_share.py [--whole 1]

Runs the demo's notebooks into a temporary folder. A clock in each kernel counts the seconds of the image towers and of each
of PARTS. A tower's are its forward pass and what follows the head's part of every backward pass; an exported file counts as
a tower, its resizing included. Without --whole 1 it runs one ingredient of each training notebook instead of four in all.
"""
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from io import StringIO
from pathlib import Path

import pandas as pd
import torch
from IPython.core import pylabtools
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import demo  # noqa: E402
import utilities  # noqa: E402
from guie import checkpoints, embedding, files, images, resume, splits, training  # noqa: E402

STARTUP = '''
import sys
sys.path[:0] = [{root!r}, {here!r}]
import demo_share
demo_share.demo.RUNS = demo_share.Path({runs!r})
clock = demo_share.start_clock()
get_ipython().events.register('post_run_cell', lambda result: clock.write({file!r}))
'''


PARTS = {  # functions that are timed by name, without the towers that they call
    'images': [images.read_pixels, utilities.ImageDataset.__getitem__, splits.Splits.table, utilities.load_data],
    'head, loss, optimiser': [training.optimiser_step],
    'files': [files.state_hash, checkpoints.save_state, utilities.load_run, embedding.save_vectors, resume.save_checkpoint,
              training.save_weights, utilities.average_states],
    'PCA and neighbours': [utilities.fit_pca, utilities.nearest_neighbours, utilities.paired_bootstrap],
    'figures': [Figure.savefig, pylabtools.print_figure,
                *(function for name, function in vars(utilities).items() if name.startswith(('plot_', 'show_')))],
    'export': [utilities.export_submission]}


class Clock:
    """Seconds by part; within a part, those of an inner part count for the inner one alone."""

    def __init__(self):
        self.seconds, self.within, self.since = Counter(), ['rest'], time.perf_counter()

    def turn(self):
        now = time.perf_counter()
        self.seconds[self.within[-1]] += now - self.since
        self.since = now

    def enter(self, part):
        self.turn()
        self.within.append(part)

    def leave(self):
        self.turn()
        self.within.pop()

    def write(self, file):
        self.turn()
        Path(file).write_text(json.dumps(self.seconds))

    def __deepcopy__(self, memo):  # copied towers are watched by the same clock
        return self

    def watched(self, function, part):
        @wraps(function)
        def timed(*arguments, **options):
            self.enter(part)
            try:
                return function(*arguments, **options)
            finally:
                self.leave()
        return timed

    def watch_tower(self, tower):
        tower.register_forward_pre_hook(self.before)
        tower.register_forward_hook(self.after)

    def before(self, module, inputs):
        self.enter('towers')

    def after(self, module, inputs, output):
        self.leave()
        if output.requires_grad:
            output.register_hook(self.at_backward)

    def at_backward(self, gradient):
        if self.within[-1] != 'towers':  # a tower in two Embedders is watched twice
            self.enter('towers')

    def after_backward(self):
        if self.within[-1] == 'towers':
            self.leave()


class WatchedFile:
    """An exported file whose calls a clock counts: hooks do not work on compiled modules."""

    def __init__(self, module, clock):
        self.module, self.call = module, clock.watched(module, 'towers')

    def __call__(self, *images):
        return self.call(*images)

    def eval(self):
        self.module.eval()
        return self

    def __getattr__(self, name):
        return getattr(self.module, name)


def put_in_place(function, watched):
    """Puts the watched form wherever the function has a name: in the rooms, the front door and its class."""
    rooms = [module for name, module in sys.modules.items() if name.startswith('guie.')]
    for owner in (utilities, *rooms, pylabtools, Figure, utilities.ImageDataset, splits.Splits):
        for name in [name for name, value in vars(owner).items() if value is function]:
            setattr(owner, name, watched)


def start_clock():
    """Called in a notebook's kernel before its first cell -> a Clock that watches every tower of an Embedder, every exported
    file, and PARTS."""
    clock, init, load, backward = Clock(), utilities.Embedder.__init__, torch.jit.load, torch.Tensor.backward

    def watched_init(self, tower, *arguments, **options):
        init(self, tower, *arguments, **options)
        clock.watch_tower(tower)

    def watched_load(*arguments, **options):
        return WatchedFile(load(*arguments, **options), clock)

    def watched_backward(self, *arguments, **options):
        backward(self, *arguments, **options)
        clock.after_backward()

    utilities.Embedder.__init__, torch.jit.load, torch.Tensor.backward = watched_init, watched_load, watched_backward
    for part, functions in PARTS.items():
        for function in functions:
            put_in_place(function, clock.watched(function, part))
    return clock


def timed_notebook(name, output, parameters, runs, profile):
    """Seconds of one notebook by part; those before the clock starts and after the kernel ends are 'kernel, imports'."""
    file = profile / 'seconds.json'
    startup = profile / 'profile_default/startup/clock.py'
    startup.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parent
    startup.write_text(STARTUP.format(root=str(here.parent), here=str(here), runs=str(runs), file=str(file)))
    os.environ['IPYTHONDIR'] = str(profile)
    start = time.perf_counter()
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        demo.run_notebook(name, output, parameters)
    seconds, parts = time.perf_counter() - start, Counter(json.loads(file.read_text()))
    file.unlink()
    parts['kernel, imports'] = seconds - parts.total()
    if min(parts['towers'], parts['kernel, imports']) <= 0:
        raise SystemExit(f'The clock of {name} says {dict(parts)} of {seconds} s.')
    return parts


def plan(options, folder):
    """[(notebook, folder of its copy, parameters)] to run, the world first."""
    if options.quick:
        world = demo.make_world(folder / 'world', training=4, query=1, index=1, size=48)
        index = pd.read_csv(world / 'index.csv')
        index.head(60).to_csv(world / 'index.csv', index=False)
        data = {name: str(world / f'{name}.csv') for name in ('train', 'query', 'index')}
        data['selection'] = [str(world / f'selection_{name}.csv') for name in ('query', 'index')]
        return [('train_vit_h_224', folder / 'one', {'DEMO': True, 'OUT_DIR': str(folder), 'DATA': data, 'OVERRIDES': {
            'image_size': 32, 'n_classes': 20, 'epochs': 1, 'min_images': 2}})]
    demo.make_world(folder / 'world')  # as the demo's first act
    ingredients = demo.INGREDIENTS if options.whole else [demo.INGREDIENTS[0], demo.INGREDIENTS[-1]]
    shared = {'DEMO': True, 'OUT_DIR': str(folder)}
    return [(name, folder / demo.run_name(name, augmentation), {**shared, 'AUGMENTATION': augmentation, 'SEED': seed})
            for seed, (name, augmentation) in enumerate(ingredients)] + [
        ('zero_shot_pca', folder / 'zero_shot', shared), ('soup', folder, shared)]


def main():
    options = timing.arguments(__doc__, repeats=1, whole=(int, 0, '1: all four ingredients, as `make demo` does'))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.perf_counter()
        notebooks = plan(options, folder / 'demo')
        parts = Counter({'images': time.perf_counter() - start})
        for name, output, parameters in notebooks:
            of_one = timed_notebook(name, output / f'{name}.ipynb', parameters, folder / 'demo', folder / 'profile')
            parts += of_one
            print(f'{name}: {of_one.total():.0f} s; {in_words(of_one)}', flush=True)
    others = Counter({part: seconds for part, seconds in parts.items() if part != 'towers'})
    row = timing.Row('time that is not tower arithmetic, of all', others.total(), parts.total(), 's', '≤ 0.30',
                     in_words(others))
    timing.print_table(f'make demo, {"all of it" if options.whole else f"{len(notebooks)} notebooks of it"}, '
                       f'{options.threads} threads, one run', [row])


def in_words(parts):
    return ', '.join(f'{part} {seconds:.0f} s' for part, seconds in parts.most_common())


if __name__ == '__main__':
    main()
