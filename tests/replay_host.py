"""What the competition's host does with a submission, for the Python of a PyTorch 1.11 environment.

    python replay_host.py submission.zip vectors.npy images.npz
    python replay_host.py submission.zip vectors.npy image.jpg another.png …

An .npz holds uint8 arrays (3, H, W), or (n, 3, H, W) for several of one size; one called `vectors` is skipped.
Writes float32 (n, dim) to vectors.npy. It imports nothing of the project: the host has none of it.
"""
import sys
import tempfile
import zipfile

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import PILToTensor


def read(path):
    """Yield uint8 tensors (3, H, W)."""
    if not path.endswith('.npz'):
        yield PILToTensor()(Image.open(path).convert('RGB'))
        return
    with np.load(path) as arrays:
        for name in arrays.files:
            if name != 'vectors':
                array = arrays[name]
                yield from torch.from_numpy(array.reshape(-1, *array.shape[-3:]))


def main(submission, output, *paths):
    with zipfile.ZipFile(submission) as archive, tempfile.TemporaryDirectory() as folder:
        model = torch.jit.load(archive.extract('saved_model.pt', folder))
    model.eval()
    with torch.no_grad():
        vectors = [model(image.unsqueeze(0))[0].flatten().numpy() for path in paths for image in read(path)]
    np.save(output, np.stack(vectors))
    print('PyTorch', torch.__version__, '·', len(vectors), 'images ->', vectors[0].size, 'dimensions')


if __name__ == '__main__':
    main(*sys.argv[1:])
