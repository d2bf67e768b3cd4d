"""All steps of one ingredient at its real size, on a CPU: the towers of the recipe with random weights.

    python benchmarks/full_scale.py                       # ViT-H/14 at 224 px, then ViT-L/14 at 336
    python benchmarks/full_scale.py --towers ViT-L-14     # one of them

Took 48 minutes on 2 busy cores. Needs 12 GB of memory, and 22 GB of disk in the temporary folder (TMPDIR), which are
deleted at the end. Each stage is a process of its own, like a Kaggle session that is stopped and started again. fit itself
trains, with the head of the published run (17,642 classes) and emoji images. Prints a markdown table: seconds without
imports, and the peak of RssAnon, libraries included (mapped files do not count: the system can drop them at any time).
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import PILToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import timing  # noqa: E402

import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402
from guie.errors import Stopped  # noqa: E402

TOWERS = {'ViT-H-14': (224, ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5))),
          'ViT-L-14': (336, ((8, 1.25e-6), (16, 2.5e-6), (20, 5e-6), (24, 1e-5)))}
CLASSES = 17_642  # of the published H run
IMAGES, DIM = 17, 16  # a PCA to 64 would need 65 images, at half a minute each on a busy CPU, and show no more
GOAL = 20e9


def configuration(tower):
    """The recipe at batch 2. max_hours=0: fit stops after every step, all saved."""
    size, layer_lrs = TOWERS[tower]
    return utilities.Config(model_name=tower, pretrained='random', image_size=size, layer_lrs=layer_lrs,
                            batch_size=2, effective_batch=2, checkpoint_activations=True, max_hours=0, workers=0)


def images(folder, size):
    """Emoji images, one a row: DataFrame path, label."""
    rows = demo.objects().query("split == 'training'").head(IMAGES).itertuples(name=None)
    names = [demo.write_object(row, folder / 'images', 1, size, .8, 5)[0] for row in rows]
    return pd.DataFrame({'path': [str(folder / 'images' / name) for name in names], 'label': names})


def step(folder, config, kept):
    """One optimiser step by fit, from the newest state; its weights are kept as the run `kept`."""
    frame = images(folder, config.image_size)
    train = frame.iloc[np.arange(CLASSES) % len(frame)].assign(label=[f'{i:05d}' for i in range(CLASSES)])
    tower = utilities.load_image_tower(config.model_name, config.pretrained, config.image_size)
    model = utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, CLASSES))
    with suppress(Stopped):
        utilities.fit(config, model, train, folder / 'run', search=())
    log = pd.read_csv(folder / 'run' / 'log.csv')
    if not np.isfinite(log['loss']).all():
        raise SystemExit(f'The loss is not finite: {log}')
    utilities.save_run(folder / kept, model, config)
    config.save(folder / kept / 'config.json')


def first_step(folder, config):
    step(folder, config, 'first')


def second_step(folder, config):
    step(folder, config, 'second')
    if len(pd.read_csv(folder / 'run' / 'log.csv')) != 2:
        raise SystemExit('The second process did not resume from the state of the first.')


def soup(folder, config):
    runs = [folder / 'first', folder / 'second']
    utilities.save_soup(utilities.average_states(runs), folder / 'soup', runs, 'uniform')


def pca(folder, config):
    frame = images(folder, config.image_size)
    vectors = utilities.embed(utilities.load_run(folder / 'soup'), frame, batch_size=2)
    torch.save(utilities.fit_pca(vectors, DIM).linear().state_dict(), folder / 'projection.pt')


def export(folder, config):
    projection = torch.nn.Linear(config.embedding_dim, DIM)
    projection.load_state_dict(torch.load(folder / 'projection.pt', weights_only=True))
    submission = utilities.Submission([folder / 'soup'], projection)
    one = images(folder, config.image_size).head(1)
    utilities.export_submission(submission, folder / 'submission.zip', reference=one)


def host(folder, config):
    with zipfile.ZipFile(folder / 'submission.zip') as archive:
        model = torch.jit.load(archive.extract('saved_model.pt', folder)).eval()
    with np.load(folder / 'reference.npz') as reference, torch.no_grad():
        difference = np.abs(model(torch.from_numpy(reference['images'])).numpy() - reference['vectors']).max()
        image = PILToTensor()(Image.open(images(folder, config.image_size)['path'][0]).convert('RGB'))
        vector = model(image.unsqueeze(0)).flatten()
    if not difference <= 1e-5 or vector.shape != (DIM,):
        raise SystemExit(f'The exported file differs from the model by {difference:.1g}, shape {tuple(vector.shape)}.')


STAGES = {first_step: 'first step of fit, stopped: state and weights saved',
          second_step: 'new process: resumed, second step, saved again', soup: 'soup of two',
          pca: f'PCA of {IMAGES} images', export: 'export, compared with the model',
          host: 'the exported file, two images one by one'}


def run_tower(tower):
    """Rows (stage, measurement) of one tower, each stage in a process of its own."""
    with tempfile.TemporaryDirectory(prefix=f'{tower}-') as folder:
        for work, words in STAGES.items():
            subprocess.run([sys.executable, __file__, '--towers', tower, '--stage', work.__name__, '--folder', folder],
                           cwd=ROOT, env=os.environ | {'MPLBACKEND': 'Agg'}, stdout=sys.stderr, check=True)
            yield words, json.loads(Path(folder, 'measured.json').read_text())
            if work is second_step:
                shutil.rmtree(Path(folder, 'run', 'state'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--towers', nargs='+', choices=TOWERS, default=list(TOWERS))
    parser.add_argument('--stage', choices=[work.__name__ for work in STAGES], help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        work, config = globals()[options.stage], configuration(options.towers[0])
        measured, _ = timing.measured(lambda: work(options.folder, config))
        (options.folder / 'measured.json').write_text(json.dumps(measured))
        return
    print(f'{torch.get_num_threads()} threads, batch 2, {CLASSES:,} classes\n\n| tower | stage | seconds | peak memory, GB '
          f'|\n| --- | --- | --- | --- |')
    most = 0
    for tower in options.towers:
        for words, measured in run_tower(tower):
            most = max(most, measured['bytes'])
            row = [f'{tower}, {TOWERS[tower][0]} px', words, f'{measured["seconds"]:.0f}', f'{measured["bytes"] / 1e9:.1f}']
            print(f'| {" | ".join(row)} |', flush=True)
    print(f'| all | most | | {most / 1e9:.1f} (goal: below {GOAL / 1e9:.0f}) |')


if __name__ == '__main__':
    main()
