"""The whole way of one ingredient at its real size, on a CPU: the towers of the recipe with random weights.

    python benchmarks/full_scale.py                       # ViT-H/14 at 224 px, then ViT-L/14 at 336
    python benchmarks/full_scale.py --towers ViT-L-14     # one of them

Took 48 minutes on 2 cores that had much other work. Needs 12 GB of memory, and in the temporary folder (TMPDIR) 22 GB of
disk, all of it deleted in the end. Each stage is a process of its own, as in a Kaggle session that is stopped and started
again; fit itself trains, with the head of the published run (17,642 classes) and emoji photographs. Prints a markdown table:
seconds with imports left out, and the peak of RssAnon, libraries included (mapped files do not count: the system can drop
them at any time).
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import PILToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import demo  # noqa: E402  (the repository's root is not a package)
import utilities  # noqa: E402

TOWERS = {'ViT-H-14': (224, ((10, 1.25e-6), (20, 2.5e-6), (26, 5e-6), (32, 1e-5))),
          'ViT-L-14': (336, ((8, 1.25e-6), (16, 2.5e-6), (20, 5e-6), (24, 1e-5)))}
CLASSES = 17_642  # of the published H run
PHOTOGRAPHS, DIM = 17, 16  # a PCA to 64 would need 65 photographs, at half a minute each on a busy CPU, and show no more
GOAL = 20e9


def configuration(tower):
    """The recipe at batch 2. max_hours=0: fit stops after every step, all saved."""
    size, bands = TOWERS[tower]
    return utilities.Config(model_name=tower, pretrained='random', image_size=size, bands=bands, batch_size=2,
                            effective_batch=2, checkpoint_activations=True, max_hours=0, workers=0)


def photographs(folder, size):
    """Emoji photographs, one a row: DataFrame path, label."""
    rows = demo.objects().query("split == 'training'").head(PHOTOGRAPHS).itertuples(name=None)
    names = [demo.write_object(row, folder / 'photographs', 1, size, .8, 5)[0] for row in rows]
    return pd.DataFrame({'path': [str(folder / 'photographs' / name) for name in names], 'label': names})


def step(folder, config, kept):
    """One optimiser step by fit, from the newest state on; its weights are kept as the run `kept`."""
    frame = photographs(folder, config.image_size)
    train = frame.iloc[np.arange(CLASSES) % len(frame)].assign(label=[f'{i:05d}' for i in range(CLASSES)])
    tower = utilities.load_image_tower(config.model_name, config.pretrained, config.image_size)
    model = utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, CLASSES))
    with suppress(utilities.Stopped):
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
        raise SystemExit('The second process did not go on from the state of the first.')


def soup(folder, config):
    runs = [folder / 'first', folder / 'second']
    utilities.save_soup(utilities.average_states(runs), folder / 'soup', runs, 'uniform')


def pca(folder, config):
    frame = photographs(folder, config.image_size)
    vectors = utilities.embed(utilities.load_run(folder / 'soup'), frame, batch_size=2)
    torch.save(utilities.fit_pca(vectors, DIM).linear().state_dict(), folder / 'projection.pt')


def export(folder, config):
    projection = torch.nn.Linear(config.embedding_dim, DIM)
    projection.load_state_dict(torch.load(folder / 'projection.pt', weights_only=True))
    submission = utilities.Submission([utilities.load_run(folder / 'soup')], projection)
    utilities.export_submission(submission, folder / 'submission.zip')
    utilities.save_reference(submission, photographs(folder, config.image_size), folder / 'reference.npz', count=1)


def host(folder, config):
    with zipfile.ZipFile(folder / 'submission.zip') as archive:
        model = torch.jit.load(archive.extract('saved_model.pt', folder)).eval()
    with np.load(folder / 'reference.npz') as reference, torch.no_grad():
        difference = np.abs(model(torch.from_numpy(reference['images'])).numpy() - reference['vectors']).max()
        photograph = PILToTensor()(Image.open(photographs(folder, config.image_size)['path'][0]).convert('RGB'))
        vector = model(photograph.unsqueeze(0)).flatten()
    if not difference <= 1e-5 or vector.shape != (DIM,):
        raise SystemExit(f'The exported file differs from the model by {difference:.1g}, shape {tuple(vector.shape)}.')


STAGES = {first_step: 'first step of fit, stopped: state and weights saved',
          second_step: 'new process: resumed, second step, saved again', soup: 'soup of two',
          pca: f'PCA of {PHOTOGRAPHS} photographs', export: 'export, compared with the model',
          host: 'the exported file, two photographs one by one'}


def measure(work, folder, config):
    """Seconds, and peak RssAnon in bytes, of work(folder, config)."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(.01):
            with open('/proc/self/status') as status:
                line = next(line for line in status if line.startswith('RssAnon'))
            peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        work(folder, config)
    finally:
        done.set()
        watcher.join()
    return {'seconds': time.perf_counter() - started, 'bytes': peak[0]}


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
        measured = measure(globals()[options.stage], options.folder, configuration(options.towers[0]))
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
