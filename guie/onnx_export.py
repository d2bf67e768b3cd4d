"""ONNX: a run or a submission as one file for onnxruntime, other languages and other hardware."""
import os
import warnings
from importlib.util import find_spec

import torch

from guie.errors import InputError, ProcessError
from guie.files import folder_beside, reason_of, user_path, whole_file
from guie.submission import on_cpu, submission_of

PACKAGES = 'onnx', 'onnxscript', 'onnxruntime'
ONE_FILE = 2**31 - 2**26  # bytes of weights; an ONNX file can hold no 2 GiB


def export_onnx(model, path, *, tolerance=1e-4):
    """Saves a model as ONNX, uint8 (1, 3, height, width) of any size -> float32 (1, dim) of length 1, resizing included.
    model: the path of a run, soup or ensemble, an Embedder, an Ensemble or a Submission. The file's input is `image`, its
    output `vector`. Before it is kept, onnxruntime's vectors are compared with the model's on images of several sizes.
    Weights of 2 GiB and more lie in a second file, <path>.data. ValueError: torch cannot export the model, or the vectors
    differ by more than the tolerance. RuntimeError: a package is missing. OSError: it cannot be written."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ProcessError(f'ONNX needs {", ".join(missing)}: run `pip install {" ".join(missing)}`.')
    path, model = user_path(path), on_cpu(submission_of(model))
    with folder_beside(path) as folder, torch.no_grad():
        file = folder / path.name  # which names its weights
        save_onnx(model, file)
        dim, worst = onnx_difference(model, file)
        if not worst <= tolerance:
            raise InputError(f'The ONNX file differs from the model by {worst:.1g}, more than {tolerance:g}: its forward '
                             f'decides by values or sizes, which an export freezes.')
        size = sum(part.stat().st_size for part in folder.iterdir())
        for part in sorted(folder.iterdir(), reverse=True):  # the weights first
            with whole_file(path.with_name(part.name)) as beside:
                part.replace(beside)
    print(f'{path}: {size / 2**20:.1f} MB, {dim} dimensions, within {worst:.1g} of the model in onnxruntime.')


def save_onnx(model, file):
    """Writes the model by torch's exporter; height and width stay free. ValueError for one that it cannot export."""
    example = torch.randint(256, (1, 3, 37, 53), dtype=torch.uint8)
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch's own making
            torch.onnx.export(model, (example,), os.fspath(file), dynamo=True, dynamic_shapes=(free,), verbose=False,
                              input_names=['image'], output_names=['vector'], external_data=weights > ONE_FILE)
    except OSError:
        raise
    except Exception as error:  # the exporter raises almost anything
        raise InputError(f'torch {torch.__version__} cannot export this model as ONNX ({reason_of(error)}): build that '
                         f'layer from plain operators, or choose another tower.') from error


def onnx_difference(model, file):
    """(dimensions, largest difference of onnxruntime's vectors from the model's) over images of odd sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=['CPUExecutionProvider'])
    generator, worst = torch.Generator().manual_seed(0), 0
    for size in ((1, 1), (1, 300), (200, 3), (64, 64), (333, 517)):
        image = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)
        expected, (vector,) = model(image), session.run(['vector'], {'image': image.numpy()})
        worst = max(worst, (expected - torch.from_numpy(vector)).abs().max().item())
    return vector.shape[1], worst
