"""How long the notebooks take on Kaggle's GPUs: an estimate from floating point operations and the GPU's published rate.

    python kaggle/hours.py

Prints a markdown table. It counts the towers' operations (torch's own counter, on tensors without memory): one forward pass
for an embedding, four for a training image. These four are forward, twice that backward, and forward again for recomputed
activations (ViT-H/14 needs that on a T4, ViT-L/14 does not). Reading images, the head and saving are not counted. SHARE is
the part of the published rate that a run reaches, by assumption, not by measurement.
"""
import sys
from functools import lru_cache
from pathlib import Path

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from guie.towers import TowerSpec, build_tower  # noqa: E402  (the repository's root is not a package)

RATES = {'T4': 65e12}  # floating point operations a second in fp16, NVIDIA's data sheet
SHARE = .3
IMAGES = 285_752  # of the published H run, in one epoch
TOWERS = {'train_vit_h_224': ('ViT-H-14', 224), 'train_vit_l_336': ('ViT-L-14', 336)}
GPUS = {'hours on one T4': RATES['T4'], 'on two': 2 * RATES['T4']}


@lru_cache
def tower_of(model_name, image_size):
    """(the image tower, its floating point operations for one image), on tensors without memory; a multiplication and an
    addition count as two operations."""
    config = open_clip.get_model_config(model_name)
    spec = TowerSpec(model_name, 'random', image_size, (.5,) * 3, (.5,) * 3, 'gelu', config['embed_dim'], {
        'library': 'open_clip', 'embed_dim': config['embed_dim'], 'quick_gelu': False,
        'vision_cfg': config['vision_cfg'] | {'image_size': image_size}})
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        tower = build_tower(spec).train()
        tower(torch.zeros(1, 3, image_size, image_size))
    return tower, counter.get_total_flops()


def forward_flops(model_name, image_size):
    """Floating point operations of the image tower for one image."""
    return tower_of(model_name, image_size)[1]


def parameters(model_name, image_size):
    """The number of an image tower's weights."""
    return sum(weight.numel() for weight in tower_of(model_name, image_size)[0].parameters())


def training_hours(model_name, image_size, rate):
    """Hours of one epoch, one ingredient."""
    return IMAGES * 4 * forward_flops(model_name, image_size) / (SHARE * rate) / 3600


def embedding_hours(model_name, image_size, rate, images=100_000):
    return images * forward_flops(model_name, image_size) / (SHARE * rate) / 3600


def main():
    print(f'Estimated hours at {SHARE:.0%} of the published rate\n\n| | {" | ".join(GPUS)} |\n| --- | --- | --- |')
    for notebook, tower in TOWERS.items():
        cells = [f'{training_hours(*tower, rate):.1f}' for rate in GPUS.values()]
        print(f'| {notebook}, one epoch of {IMAGES:,} images | {" | ".join(cells)} |')
    for tower in TOWERS.values():
        cells = [f'{embedding_hours(*tower, rate):.1f}' for rate in GPUS.values()]
        print(f'| {tower[0]} at {tower[1]} px, vectors of 100,000 images | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
