"""The exported submission, images one by one, against the eager open_clip tower with the same preprocessing.

    python benchmarks/submission.py

Images are random pixels of 640×480, as uint8 tensors; reading files is not part of it. Towers: the miniature, and
ViT-B/16 at 224 with random weights. Checked: the vectors are the same to 1e-5 (ViT-B/16: 1e-4).
"""
import sys
import tempfile
import warnings
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import utilities  # noqa: E402
from guie.projection import random_projection  # noqa: E402
from guie.submission import load_submission  # noqa: E402

TOWERS = {'miniature': ('local-dir:media/miniature', 'miniature', 100, 1e-5), 'ViT-B/16': ('ViT-B-16', 'random', 2, 1e-4)}


def eager(clip, projection):
    """image (1, 3, H, W) -> vector, written down plainly."""
    facts, size = clip.visual.preprocess_cfg, clip.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (facts['mean'], facts['std']))

    def embed(image):
        pixels = F.interpolate(image.float(), size, mode='bicubic', antialias=True).clamp(0, 255)
        features = F.normalize(clip.encode_image((pixels / 255 - mean) / std))
        return F.normalize(projection(features))
    return embed


def row_for(name, options):
    model_name, pretrained, count, tolerance = TOWERS[name]
    torch.manual_seed(0)
    clip = open_clip.create_model(model_name).eval()  # its default blocks
    tower = utilities.load_image_tower(model_name, pretrained)
    tower.load_state_dict(clip.visual.state_dict())
    projection = random_projection(tower.spec.width).linear()
    images = torch.randint(256, (4 if options.quick else count, 1, 3, 480, 640), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated
        path = Path(folder, 'submission.zip')
        utilities.export_submission(utilities.Submission([utilities.Embedder(tower)], projection), path)
        exported, plain = load_submission(path), eager(clip, projection)
        works = {'ours': lambda: torch.cat([exported(image) for image in images]),
                 'eager': lambda: torch.cat([plain(image) for image in images])}
        seconds, vectors = timing.interleaved(works, options.repeats)
    timing.close(vectors['ours'], vectors['eager'], tolerance, f'Vectors of {name}')
    rates = {kind: len(images) / value for kind, value in seconds.items()}
    return timing.Row(f'{name}, against eager open_clip', rates['ours'], rates['eager'], 'images/s', '≥ 0.95')


def main():
    options = timing.arguments(__doc__, repeats=3)
    rows = [row_for(name, options) for name in (['miniature'] if options.quick else TOWERS)]
    timing.print_table(f'Exported submission, one image at a time, {options.threads} threads, median of '
                       f'{options.repeats} interleaved runs', rows)


if __name__ == '__main__':
    main()
