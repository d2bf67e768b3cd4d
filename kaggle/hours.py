"""How long the notebooks take on Kaggle's GPUs: an estimate from floating point operations and the GPU's published rate.

    python kaggle/hours.py

Prints a markdown table. It counts the towers' operations (torch's own counter, on tensors without memory): one forward pass
for an embedding; for a training image forward, twice that backward, and forward again where activations are recomputed, as
a T4 needs for ViT-H/14. Reading images, the head and saving are not counted. SHARE is the part of the published rate that a
run reaches, by assumption, not by measurement.
"""
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from guie.config import Config  # noqa: E402  (the repository's root is not a package)
from guie.estimate import forward_cost  # noqa: E402

RATES = {'T4': 65e12}  # floating point operations a second in fp16, NVIDIA's data sheet
SHARE = .3
IMAGES = 285_752  # of the published H run, in one epoch
TOWERS = {'train_vit_h_224': ('ViT-H-14', 224), 'train_vit_l_336': ('ViT-L-14', 336)}
PASSES = {'ViT-H-14': 4, 'ViT-L-14': 3}
GPUS = {'hours on one T4': RATES['T4'], 'on two': 2 * RATES['T4']}


@lru_cache
def cost(model_name, image_size):
    """(floating point operations for one image, parameters) of an image tower."""
    return forward_cost(Config(model_name=model_name, pretrained='random', image_size=image_size))


def training_hours(model_name, image_size, rate):
    """Hours of one epoch, one ingredient."""
    return IMAGES * PASSES[model_name] * cost(model_name, image_size)[0] / (SHARE * rate) / 3600


def embedding_hours(model_name, image_size, rate, images=100_000):
    return images * cost(model_name, image_size)[0] / (SHARE * rate) / 3600


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
