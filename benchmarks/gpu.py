"""What a GPU does with the real towers, random weights: speed, memory, precision, a killed run.

    python benchmarks/gpu.py [--towers ViT-H-14,ViT-L-14,SO400M] [--file gpu.json]

Each part is a process of its own, and its rows are in the file before the next one starts: a stopped run resumes with the
part that it was in. Prints a markdown table. Without a GPU only --quick runs: every line, with the miniature.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import frozen_head  # noqa: E402
import timing  # noqa: E402

import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie import training  # noqa: E402
from guie.distributed import autocast_dtype, best_device  # noqa: E402
from guie.images import ImageDataset, loader  # noqa: E402
from guie.memory import fitted, memory_plan, on_meta  # noqa: E402
from guie.resume import Progress  # noqa: E402
from guie.splits import Splits  # noqa: E402
from guie.towers import checkpoint_activations  # noqa: E402

MINIATURE = 'local-dir:media/miniature'
TOWERS = {'ViT-H-14': ('ViT-H-14', 'random', 224, ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5))),
          'ViT-L-14': ('ViT-L-14', 'random', 336, ((8, 1.25e-6), (16, 2.5e-6), (20, 5e-6), (24, 1e-5))),
          'SO400M': ('ViT-SO400M-14-SigLIP-384', 'random', 384, ((27, 1e-5),)),
          'miniature': (MINIATURE, 'miniature', 64, ((6, 1e-4),))}
PEAKS = {'P100': 19, 'T4': 65, 'L4': 121, 'V100': 125, 'A100': 312, 'H100': 989, 'H200': 989}  # TFLOP/s, half, datasheets
CLASSES = 17_642  # of the published H run
WHOLE = 'whole'  # nothing is recomputed unless it must be
ON_GPU = torch.cuda.is_available()


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def memory():
    """(GB that tensors took at most on the GPU, GB that PyTorch held for them) since the last reset."""
    if not ON_GPU:
        return float('nan'), float('nan')
    return torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9


def rate(work, images, repeats=3):
    """Images a second of work(), which handles so many in a call; one call warms up."""
    work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return images * repeats / (time.perf_counter() - start)


def configuration(tower, **choices):
    model_name, pretrained, size, layer_lrs = TOWERS[tower]
    return utilities.Config(model_name=model_name, pretrained=pretrained, image_size=size, layer_lrs=layer_lrs, **choices)


def operations(model, config):
    """Floating-point operations of one image's forward and backward pass through the tower."""
    tower = on_meta(model).tower.eval()
    with FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, config.image_size, config.image_size, device='meta'))
    return 3 * counter.get_total_flops()


def train_tower(tower, quick):
    """A step by fit's own parts: with the largest batch that the plan allows, then recomputed, 8 images and twice as
    many until they do not fit."""
    classes, most = (20, 32) if quick else (CLASSES, 4096)
    config = configuration(tower, effective_batch=most)
    model = utilities.new_model(config, classes)
    config, plain = fitted(config, model, 1), on_meta(model)
    run = training.prepare(Accelerator(cpu=not ON_GPU), config, model, Path(), Progress(), 1000)
    flops, margins = operations(model, config), torch.full((classes,), .3, device=best_device())
    peak = next((peak for name, peak in PEAKS.items() if ON_GPU and name in torch.cuda.get_device_name()), float('nan'))

    def row(batch, words):
        some = {'image': torch.randint(256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8),
                'target': torch.arange(batch) % classes}
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        speed = rate(lambda: training.optimiser_step(run, [some], margins), batch, 3 if batch <= 64 else 1)
        choice = config.override(batch_size=batch, effective_batch=batch, checkpoint_activations=words != WHOLE or
                                 config.checkpoint_activations)
        plan, (taken, held) = sum(memory_plan(plain, choice, half=run.half).values()), memory()
        return {'work': f'{tower}, step of {batch:,} images, {words}', 'measured': f'{speed:.0f} images/s; {taken:.1f} GB, '
                f'{held:.1f} with what PyTorch keeps free', 'against': f'{speed * flops / 1e12:.0f} TFLOP/s, '
                f'{speed * flops / 1e12 / peak:.0%} of the published peak; planned {plan / 1e9:.1f} GB'}

    rows, batch = [row(config.batch_size, WHOLE)], 8
    checkpoint_activations(model.tower)
    while batch <= most:
        try:
            rows.append(row(batch, 'recomputed'))
        except torch.OutOfMemoryError:
            run.optimiser.zero_grad()
            break
        batch *= 2
    return rows


def options(quick):
    """What each switch brings to the tower's forward and backward pass."""
    tower, batch = ('miniature', 8) if quick else ('ViT-L-14', 32)
    config = configuration(tower)
    model = utilities.load_image_tower(config.model_name, config.pretrained, config.image_size).to(best_device()).train()
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=best_device())
    half = autocast_dtype('auto')

    def speed(module=model, dtype=half, given=images, kernels=nullcontext):
        def step():
            with torch.autocast(best_device().type, dtype=dtype, enabled=dtype is not None), kernels():
                module(given).sum().backward()
            model.zero_grad()
        return rate(step, batch)

    math = partial(sdpa_kernel, SDPBackend.MATH)
    found = {'as it is': speed(), 'bfloat16': speed(dtype=torch.bfloat16), 'float16': speed(dtype=torch.float16),
             'float32': speed(dtype=None), 'attention not fused': speed(kernels=math),
             'channels last': speed(given=images.to(memory_format=torch.channels_last)),
             'torch.compile': speed(torch.compile(model, backend='eager' if quick else 'inductor'))}
    checkpoint_activations(model)
    found['activations recomputed'] = speed()
    return [{'work': f'{tower}, tower forward and backward, {name}', 'measured': f'{value:.0f} images/s',
             'against': f'{value / found["as it is"]:.2f} × as it is'} for name, value in found.items()]


def embedding(quick):
    """embed on JPEG files of 1600×1200: the whole, reading alone, the tower alone."""
    tower, count, size = ('miniature', 8, (160, 120)) if quick else ('ViT-L-14', 1500, (1600, 1200))
    config = configuration(tower)
    model = utilities.Embedder(utilities.load_image_tower(config.model_name, config.pretrained, config.image_size))
    with tempfile.TemporaryDirectory() as folder:
        big = demo.Image.fromarray(demo.draw_view('1F41D', np.random.default_rng(0), 96, .8)).resize(size)
        big.save(f'{folder}/0.jpg', quality=90)
        for number in range(1, count):
            shutil.copyfile(f'{folder}/0.jpg', f'{folder}/{number}.jpg')
        frame = pd.DataFrame({'path': [f'{folder}/{number}.jpg' for number in range(count)], 'label': 'bee'})
        utilities.embed(model, frame.head(64))
        whole = rate(lambda: utilities.embed(model, frame), count, 1)
        reading = rate(lambda: list(loader(ImageDataset(frame, config.image_size), 64)), count, 1)
    model.to(best_device()).eval()
    images = torch.zeros(min(64, count), 3, config.image_size, config.image_size, dtype=torch.uint8, device=best_device())
    with torch.inference_mode(), torch.autocast('cuda', enabled=ON_GPU, dtype=torch.float16):
        alone = rate(lambda: model(images), len(images))
    name = f'{tower}, embedding {size[0]} × {size[1]} JPEG, {os.cpu_count()} cores'
    return [{'work': name, 'measured': f'{whole:.0f} images/s',
             'against': f'reading alone {reading:.0f}, the tower alone {alone:.0f}'}]


def vectors(quick):
    """Vectors of the emoji world by the miniature in each precision, against float32 on the CPU."""
    world = demo.make_world(demo.RUNS / 'world')
    splits = {name: utilities.read_dataset(world / f'{name}.csv').head(40 if quick else None) for name in ('query', 'index')}
    model = utilities.Embedder(utilities.load_image_tower(MINIATURE, 'miniature', 64)).eval()
    images = {name: torch.cat([batch['image'] for batch in loader(ImageDataset(frame, 64), 256)])
              for name, frame in splits.items()}

    def embed(device, dtype):
        model.to(device)
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return {name: torch.cat([model(part.to(device)).float().cpu() for part in whole.split(256)]).numpy()
                    for name, whole in images.items()}

    exact, rows = embed(torch.device('cpu'), None), []
    for dtype in (None, torch.float16, torch.bfloat16):
        found = embed(best_device(), dtype)
        scores = [utilities.mean_precision_at_5(each['query'], splits['query']['label'], each['index'],
                                                splits['index']['label']) for each in (found, exact)]
        cosine = min(float((found[name] * exact[name]).sum(1).min()) for name in exact)
        rows.append({'work': f'miniature, vectors in {dtype or "float32"}', 'measured': f'mP@5 {scores[0]:.4f}',
                     'against': f'float32 on the CPU {scores[1]:.4f}; smallest cosine {cosine:.6f}'})
    return rows


def submission(quick):
    """The exported file on the GPU against itself on the CPU, and its speed one image at a time."""
    tower = 'miniature' if quick or not ON_GPU else 'ViT-L-14'
    config = configuration(tower, embedding_dim=64)
    with tempfile.TemporaryDirectory() as folder:
        utilities.save_run(Path(folder, 'run'), utilities.new_model(config, 2), config)
        utilities.export_submission(utilities.Submission([Path(folder, 'run')]), Path(folder, 'submission.zip'))
        subprocess.run([sys.executable, '-m', 'zipfile', '-e', 'submission.zip', '.'], cwd=folder, check=True)
        file = torch.jit.load(Path(folder, 'saved_model.pt')).eval()
    image = torch.randint(256, (1, 3, 500, 400), dtype=torch.uint8)
    rows = []
    with torch.inference_mode():
        exact = file(image)
        file, image = file.to(best_device()), image.to(best_device())
        for words, dtype in {'float32': None, 'half precision': torch.float16 if ON_GPU else torch.bfloat16}.items():
            with torch.autocast(best_device().type, dtype=dtype, enabled=dtype is not None):
                speed, apart = rate(lambda: file(image), 1, 20), float((file(image).float().cpu() - exact).abs().max())
            rows.append({'work': f'{tower}, submission in {words}, image by image', 'measured': f'{speed:.0f} images/s',
                         'against': f'largest difference from the CPU {apart:.1e}'})
    return rows


def cached_head(quick):
    """An epoch of a head on cached vectors, as many as the competition has."""
    sizes = (1_000, 32, 100) if quick else (frozen_head.IMAGES, frozen_head.WIDTH, frozen_head.CLASSES)
    return [frozen_head.row(*sizes)]


def neighbours(quick):
    """nearest_neighbours on the GPU, where TF32 is allowed, against the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = True
    queries, rows = (20, 2000) if quick else (5000, 200_000)
    points = torch.nn.functional.normalize(torch.randn(queries + rows, 64, generator=torch.Generator().manual_seed(0)))
    query, index, seconds, found = points[:queries], points[queries:], {}, {}
    for device in ('cpu', best_device()):
        start = time.perf_counter()
        found[device] = utilities.nearest_neighbours(query, index, 5, device=device)
        seconds[device] = time.perf_counter() - start
    same = bool((found['cpu'][1] == found[best_device()][1]).all())
    return [{'work': f'5 neighbours of {queries:,} in {rows:,}', 'measured': f'{seconds[best_device()]:.2f} s',
             'against': f'{seconds["cpu"]:.2f} s on the CPU, {"the same" if same else "other"} neighbours'}]


def train_miniature(folder, quick):
    """In a child process: fit as a notebook calls it, a state after every step."""
    train = utilities.read_dataset(demo.make_world(demo.RUNS / 'world') / 'train.csv').head(96 if quick else 960)
    config = configuration('miniature', save_minutes=0, batch_size=16, warmup_steps=2, epochs=2, workers=0, head_lr=3e-3)
    utilities.fit(config, utilities.new_model(config, train['label'].nunique()), train, folder, search=())


def resume(quick):
    """A run that is killed in the middle and resumed, against an uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *['--quick'] * quick, '--work']
        alone = [subprocess.Popen([*command, f'train,{folder}/{name}'], stdout=subprocess.DEVNULL)
                 for name in ('alone', 'again')]
        if any(child.wait() for child in alone):
            raise SystemExit('A training run failed.')
        child = subprocess.Popen([*command, f'train,{folder}/killed'], stdout=subprocess.DEVNULL)
        while child.poll() is None and len(list(Path(folder, 'killed').glob('state/step-*'))) < 2:
            time.sleep(.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        output = subprocess.run([*command, f'train,{folder}/killed'], check=True, stdout=subprocess.PIPE, text=True).stdout
        states = {name: utilities.open_checkpoint(Path(folder, name)) for name in ('alone', 'again', 'killed')}
    apart = {name: max(float((states[name][key] - weight).abs().max()) for key, weight in states['alone'].items())
             for name in ('again', 'killed')}
    told = next((line for line in output.splitlines() if 'resumes from' in line), 'it did not resume')
    return [{'work': 'miniature, killed and resumed', 'measured': f'weights differ by {apart["killed"]:.1e}',
             'against': f'{apart["again"]:.1e} of two runs left alone; {told}'}]


def several_gpus(quick):
    """The same run in a process a GPU (two on the CPU) and in one; each process drops out other features."""
    processes = torch.cuda.device_count() if ON_GPU else 2
    if processes < 2:
        return [{'work': 'several GPUs', 'measured': 'not measured', 'against': 'there is one'}]
    train = utilities.read_dataset(demo.make_world(demo.RUNS / 'world') / 'train.csv').head(96 if quick else 3840)
    config = configuration('miniature', batch_size=16, warmup_steps=2, workers=0, head_lr=3e-3, precision='no')
    seconds, vectors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, count in {'several': processes, 'one': 1}.items():
            start = time.perf_counter()
            model = utilities.train(config, Splits(train=train), Path(folder, name), processes=count, search=())
            seconds[name] = time.perf_counter() - start
            vectors[name] = utilities.embed(model, train)
    cosine = float((vectors['several'] * vectors['one']).sum(1).min())
    return [{'work': f'miniature, {len(train):,} images in {processes} processes', 'measured': f'{seconds["several"]:.0f} s',
             'against': f'{seconds["one"]:.0f} s in one; smallest cosine of their vectors {cosine:.6f}'}]


def parts(towers):
    """{name: function of quick that returns rows}."""
    return {**{f'training {tower}': partial(train_tower, tower) for tower in towers}, 'options': options,
            'embedding': embedding, 'vectors': vectors, 'submission': submission, 'cached head': cached_head,
            'neighbours': neighbours, 'resume': resume, 'several GPUs': several_gpus}


def main():
    options_ = timing.arguments(__doc__, repeats=1, towers=(str, 'ViT-H-14,ViT-L-14,SO400M', 'with commas'),
                                file=(Path, Path('gpu.json'), 'where rows are kept'))
    if options_.work:
        name, _, folder = options_.work.partition(',')
        if name == 'train':
            return train_miniature(folder, options_.quick)
        rows = parts(TOWERS)[name](options_.quick)
        return print('\n' + json.dumps(rows))
    if not (ON_GPU or options_.quick):
        raise SystemExit('There is no GPU here: --quick runs every part with the miniature on the CPU.')
    rows = {}
    if options_.file.exists() and not options_.quick:
        rows = json.loads(options_.file.read_text())
    for name in parts(['miniature'] if options_.quick else options_.towers.split(',')):
        if name in rows:
            continue
        if options_.quick:
            rows[name] = parts(TOWERS)[name](True)
            continue
        started = time.time()
        child = subprocess.run([sys.executable, __file__, '--work', name], stdout=subprocess.PIPE, text=True)
        rows[name] = (json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else
                      [{'work': name, 'measured': 'failed', 'against': f'exit {child.returncode}'}])
        options_.file.write_text(json.dumps(rows, indent=1))
        print(f'{name}: {time.time() - started:.0f} s', file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if ON_GPU else 'CPU'
    print(f'\n{device}, PyTorch {torch.__version__}\n\n| work | measured | against |\n| --- | --- | --- |')
    for row in sum(rows.values(), []):
        print(f'| {row["work"]} | {row["measured"]} | {row["against"]} |')


if __name__ == '__main__':
    main()
