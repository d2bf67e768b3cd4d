"""The share of `make demo` that is not tower arithmetic.

    python benchmarks/demo_share.py [--whole 1]

Runs the demo's notebooks into a temporary folder with a clock around every call of an image tower and around the part
of every backward pass that follows the head's; the exported file counts as a tower, its resizing included. Everything
else is the rest: making the world, starting kernels, reading, augmenting, head, optimiser, soups, PCA, neighbours,
pictures. Without --whole 1 one ingredient of either training notebook is run instead of five.
"""
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import demo  # noqa: E402
import utilities  # noqa: E402

STARTUP = '''
import sys
sys.path[:0] = [{root!r}, {here!r}]
import demo_share
demo_share.start_clock({file!r})
'''


class TowerClock:
    """Seconds spent in towers, forward and backward."""

    def __init__(self):
        self.seconds, self.began, self.backward = 0., None, None

    def watch(self, tower):
        tower.register_forward_pre_hook(self.before)
        tower.register_forward_hook(self.after)

    def __deepcopy__(self, memo):  # copied towers are watched by the same clock
        return self

    def before(self, module, inputs):
        self.began = time.perf_counter()

    def after(self, module, inputs, output):
        if self.began is None:  # a tower in two Embedders is watched twice
            return
        self.seconds += time.perf_counter() - self.began
        self.began = None
        if output.requires_grad:
            output.register_hook(self.at_backward)

    def at_backward(self, gradient):
        self.backward = time.perf_counter()

    def after_backward(self):
        if self.backward is not None:
            self.seconds += time.perf_counter() - self.backward
        self.backward = None


class WatchedFile:
    """An exported file whose calls a clock counts: compiled modules take no hooks."""

    def __init__(self, module, clock):
        self.module, self.clock = module, clock

    def __call__(self, *images):
        self.clock.before(self, images)
        vectors = self.module(*images)
        self.clock.after(self, images, vectors)
        return vectors

    def eval(self):
        self.module.eval()
        return self

    def __getattr__(self, name):
        return getattr(self.module, name)


def start_clock(file):
    """In a notebook's kernel, before its first cell: watches every tower of an Embedder and every exported file."""
    import atexit

    import torch
    from accelerate import Accelerator
    clock, init, load, backward = TowerClock(), utilities.Embedder.__init__, torch.jit.load, Accelerator.backward

    def watched_init(self, tower, *arguments, **options):
        init(self, tower, *arguments, **options)
        clock.watch(tower)

    def watched_load(*arguments, **options):
        return WatchedFile(load(*arguments, **options), clock)

    def watched_backward(self, *arguments, **options):
        backward(self, *arguments, **options)
        clock.after_backward()

    utilities.Embedder.__init__, torch.jit.load, Accelerator.backward = watched_init, watched_load, watched_backward
    atexit.register(lambda: Path(file).write_text(json.dumps(clock.seconds)))


def timed_notebook(name, output, parameters, profile):
    """(seconds, seconds in towers) of one notebook."""
    file = profile / 'seconds.json'
    startup = profile / 'profile_default/startup/clock.py'
    startup.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parent
    startup.write_text(STARTUP.format(root=str(here.parent), here=str(here), file=str(file)))
    os.environ['IPYTHONDIR'] = str(profile)
    start = time.perf_counter()
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        demo.run_notebook(name, output, parameters)
    seconds, in_towers = time.perf_counter() - start, json.loads(file.read_text())
    file.unlink()
    if not 0 < in_towers < seconds:
        raise SystemExit(f'The clock of {name} says {in_towers} of {seconds} s.')
    return seconds, in_towers


def plan(options, folder):
    """[(notebook, folder of its copy, parameters)] to run, the world first."""
    if options.quick:
        world = demo.make_world(folder / 'world', training=4, query=1, index=1, size=48)
        index = pd.read_csv(world / 'index.csv')
        index.head(60).to_csv(world / 'index.csv', index=False)
        parts = {name.upper(): str(world / f'{name}.csv') for name in ('train', 'query', 'index')}
        return [('train_vit_h_224', folder / 'one', {'DEMO': True, 'OUT_DIR': str(folder), **parts, 'SELECTION': [
            str(world / f'selection_{name}.csv') for name in ('query', 'index')], 'OVERRIDES': {
                'image_size': 32, 'n_classes': 20, 'epochs': 1, 'min_images': 2}})]
    demo.make_world(folder / 'world')  # as the demo's first act; the notebooks find theirs under runs/demo
    ingredients = demo.INGREDIENTS if options.whole else [demo.INGREDIENTS[0], demo.INGREDIENTS[-1]]
    shared = {'DEMO': True, 'OUT_DIR': str(folder)}
    return [(name, folder / demo.run_name(name, augmentation), {**shared, 'AUGMENTATION': augmentation})
            for name, augmentation in ingredients] + [
        ('zero_shot_pca', folder / 'zero_shot', shared), ('soup', folder, shared)]


def main():
    options = timing.arguments(__doc__, repeats=1, whole=(int, 0, '1: all five ingredients, as `make demo` does'))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.perf_counter()
        notebooks = plan(options, folder / 'demo')
        seconds, in_towers = time.perf_counter() - start, 0.
        if not options.quick:
            demo.make_world(demo.RUNS / 'world')
        for name, output, parameters in notebooks:
            both = timed_notebook(name, output / f'{name}.ipynb', parameters, folder / 'profile')
            seconds, in_towers = seconds + both[0], in_towers + both[1]
            print(f'{name}: {both[0]:.0f} s, of which {both[1]:.0f} s in towers', flush=True)
    row = timing.Row('time that is not tower arithmetic, of all', seconds - in_towers, seconds, 's', '≤ 0.25')
    timing.print_table(f'make demo, {"all of it" if options.whole else f"{len(notebooks)} notebooks of it"}, '
                       f'{options.threads} threads, one run', [row])


if __name__ == '__main__':
    main()
