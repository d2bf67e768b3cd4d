"""Submission: the file that the competition's host runs with PyTorch 1.11, and its replay as the host does it."""
import copy
import json
import math
import os
import re
import tempfile
import time
import warnings
import zipfile
import zlib
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import PILToTensor

from guie.checkpoints import load_run
from guie.errors import FileError, InputError, MissingError
from guie.files import copy_to_kaggle_output, printable, progress_bar, reason_of, user_path, whole_file
from guie.images import ImageDataset
from guie.model import Embedder, Ensemble, resized, whole_patches
from guie.projection import MAX_DIM, project
from guie.retrieval import mean_precision_at_5
from guie.splits import sample_objects
from guie.towers import resize_tower

HOST_HOURS, HOST_IMAGES = 9, 205_000  # the limit, for 5,000 queries and 200,000 index images one by one
HOST_ARCHIVE = 9                      # newest file version that PyTorch 1.11 reads


def plain_attention(query, key, value, attn_mask=None, *, scale=None, **unused):
    """F.scaled_dot_product_attention in eval mode: softmax(q·kᵀ / √d + mask)·v, the mask float or None."""
    scores = (query * (scale or int(query.shape[-1]) ** -.5)) @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def plain_gelu(x, approximate='none'):
    """x·Φ(x) through erf, or its tanh approximation (arXiv 1606.08415, sec. 2)."""
    half = x * .5
    if approximate == 'tanh':
        return half * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x ** 3)))
    return torch.addcmul(half, half, torch.erf(x * math.sqrt(.5)))


class PlainOperators(TorchFunctionMode):
    """While active, fused operators run as ones that PyTorch 1.11 has too, whichever module calls them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # asked for its weights, it multiplies the matrices itself
            kwargs = kwargs | {'need_weights': True, 'average_attn_weights': False}
        if func is F.pad and kwargs['mode'] == 'constant':
            return torch.constant_pad_nd(*args, kwargs['value'] or 0)
        if func is torch.Tensor.to and args[0].dtype in args[1:]:  # a trace would freeze it to float32
            return args[0]
        plain = {F.scaled_dot_product_attention: plain_attention, F.gelu: plain_gelu}
        return plain.get(func, func)(*args, **kwargs)


def on_cpu(module):
    """A copy of the module, in eval mode on the CPU, that shares the tensors that are there already."""
    memo = {id(buffer): buffer.cpu() for buffer in module.buffers()} | {
        id(parameter): parameter if parameter.device.type == 'cpu' else nn.Parameter(parameter.detach().cpu(), False)
        for parameter in module.parameters()}
    return copy.deepcopy(module, memo).eval()


def at_size(embedder, factor):
    """A copy of the Embedder for inputs `factor` times as large, in whole patches, that shares all other weights."""
    if factor == 1:
        return embedder
    embedder = on_cpu(embedder)
    side = round(whole_patches(embedder.tower, embedder.spec.image_size * factor))
    resize_tower(embedder.tower, side)
    embedder.spec = replace(embedder.spec, image_size=side)
    return embedder


class Submission(nn.Module):
    """What the host runs: an image of any size -> one unit vector of at most 64 numbers.
    members: Embedders, or paths of runs, each fed at its own spec.image_size; their unit vectors are concatenated.
    projection: nn.Linear to at most 64 columns, or None. At test time flip averages over the image and its mirror image,
    sizes over multiples of the input size, e.g. (1, 1.25), with position embeddings resized."""

    def __init__(self, members, projection=None, *, flip=False, sizes=(1,)):
        super().__init__()
        dim = 64 if projection is None else None
        members = [member if isinstance(member, nn.Module) else load_run(member, dim=dim) for member in members]
        self.members = nn.ModuleList(nn.ModuleList(at_size(member, factor) for factor in sizes) for member in members)
        self.projection, self.flip = projection, flip

    def forward(self, image):
        """uint8 (1, 3, H, W) -> float32 (1, dim) of length 1; also several images of one size."""
        vector = torch.cat([self.look(image, scales) for scales in self.members], 1)
        return F.normalize(vector if self.projection is None else self.projection(vector))

    def look(self, image, scales):
        """One member's unit vector: the mean over sizes and flips."""
        vectors = []
        for embedder in scales:
            pixels = resized(image.type_as(embedder.mean), embedder.spec.image_size)
            vectors += [embedder(pixels), embedder(pixels.flip(3))] if self.flip else [embedder(pixels)]
        return F.normalize(sum(vectors))


def check_vector(vector):
    """ValueError unless the host can use what the model returned for one image."""
    shape = list(getattr(vector, 'shape', ()))
    if len(shape) != 2 or shape[0] != 1:
        wrong = f'has shape {shape}, not (1, dim)'
    elif shape[1] > MAX_DIM:
        wrong = f'has {shape[1]} dimensions, more than {MAX_DIM} (fit_pca makes a projection)'
    elif vector.dtype != torch.float32 or not abs(vector.norm() - 1) < 1e-3:
        wrong = f'is {vector.dtype} of length {vector.norm():.3g}, not float32 of length 1'
    else:
        return
    raise InputError(f'The host cannot use this model: its output for one random image {wrong}.')


def check_operators(block, host):
    """ValueError that names the layer of the first operator that PyTorch 1.11 does not have.
    A traced graph is torch's own format, and only the graph says which operators a file needs. host: {operator: [argument
    lists]} of 1.11, written by tools/host_operators.py from its own schemas."""
    for node in block.nodes():
        syntax = node.schema() == '(no schema)' and node.kind().startswith('prim::')  # such as a constant or a list
        if not syntax and not any(accepts(arguments, node) for arguments in host.get(node.kind(), ())):
            layer = node.scopeName().rpartition('/')[2].removeprefix('__module.') or 'the model itself'
            raise InputError(f'PyTorch 1.11 has no operator {node.kind().partition("::")[2]}, which {layer} uses: build '
                             f'that layer from plain operators, or choose another tower.')
        for inner in node.blocks():
            check_operators(inner, host)


def accepts(arguments, node):
    """Whether these arguments of 1.11 take a node's inputs: equal names and types, and defaults for all others."""
    theirs, ours = split_arguments(arguments), split_arguments(node.schema().partition('(')[2].rpartition(' ->')[0])
    for (name, (kind, default)), value in zip(ours.items(), node.inputs()):
        known, optional = theirs.get(name, ('', None))[0], str(value.type()) == 'NoneType'
        same = known.strip('?') == kind.strip('?') and (known.endswith('?') or not optional)
        if not same and (name in theirs or value.node().kind() != 'prim::Constant' or str(value.toIValue()) != default):
            return False
    return all(name in ours or default is not None for name, (_, default) in theirs.items())


@cache
def split_arguments(text):
    """{name: (type, default or None)} of a schema's arguments, types in 1.11's words and without sizes and aliases."""
    text = re.sub(r'\([a-z!|> *-]*\)|(?<=\[)\d+(?=\])', '', text.strip('()'))
    text = re.sub('SymInt|ScalarType|Layout|MemoryFormat', 'int', text)
    parts = (part.partition('=') for part in re.split(r', (?![^\[]*\])', text) if part not in ('*', ''))
    return {named.rpartition(' ')[2]: (named.rpartition(' ')[0], default if equals else None)
            for named, equals, default in parts}


def check_difference(model, file, tolerance=1e-5):
    """Largest difference of the file from the model over images of odd sizes; ValueError if it is above the tolerance."""
    loaded, generator, worst = torch.jit.load(file).eval(), torch.Generator().manual_seed(0), 0
    for size in ((1, 1), (1, 300), (200, 3), (333, 517)):
        image = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)
        worst = max(worst, (loaded(image) - model(image)).abs().max().item())
    if not worst <= tolerance:
        raise InputError(f'The exported file differs from the model by {worst:.1g}, more than {tolerance:g}: '
                         'its forward decides by values or sizes, which a trace freezes.')
    return worst


def save_traced(model, file):
    """Saves a checked trace of the model; returns (dimensions, difference from the model)."""
    example = torch.randint(256, (1, 3, 37, 53), dtype=torch.uint8)
    try:
        vector = model(example)
    except RuntimeError as error:
        raise InputError(f'The host cannot use this model: a uint8 image {tuple(example.shape)} stops it with '
                         f'"{str(error).strip().splitlines()[-1]}".') from error
    check_vector(vector)
    with PlainOperators():
        traced = torch.jit.trace(model, example, check_trace=False)
    check_operators(traced.inlined_graph, json.loads(Path(__file__).with_name('host_operators.json').read_text()))
    try:
        torch.jit.save(traced, file)
    except RuntimeError as error:  # how torch says that a disk is full
        raise FileError(str(error).splitlines()[0]) from error
    with zipfile.ZipFile(file) as archive:
        version = int(next(archive.read(name) for name in archive.namelist() if name.endswith('/version')))
    if version > HOST_ARCHIVE:
        raise InputError(f'The file has version {version} and PyTorch 1.11 reads up to {HOST_ARCHIVE}: an '
                         'operator of the model has changed since.')
    return vector.shape[1], check_difference(model, file)


def export_submission(model, path, *, reference=None, submit=False):
    """Saves submission.zip for the host: `model` as saved_model.pt, TorchScript that PyTorch 1.11 runs.
    model: the path of a run, soup or ensemble, an Embedder, an Ensemble, a Submission, or any module uint8 (1, 3, H, W) ->
    float32 (1, dim <= 64) of length 1. Operators and file version are checked against 1.11's, and the reloaded file against
    the model (1e-5). reference: a table of images; the first few that can be read are saved with their vectors as
    reference.npz in the same folder (images uint8 (n, 3, 96, 96), vectors). submit: on Kaggle, also saves it where the
    competition looks for it. ValueError: a model the host cannot use. OSError: it cannot be written; the old file at `path`
    stays until the new one is whole."""
    is_folder, path = str(path).endswith(('/', os.sep)), user_path(path)
    path = path / 'submission.zip' if is_folder or path.is_dir() else path
    model = on_cpu(submission_of(model))
    with whole_file(path) as beside, tempfile.TemporaryDirectory(prefix='.submission-', dir=path.parent) as folder, \
            torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated, and the host knows nothing newer
        file = os.path.join(folder, 'saved_model.pt')
        dim, worst = save_traced(model, file)
        with zipfile.ZipFile(beside, 'w', zipfile.ZIP_STORED) as archive:
            archive.write(file, 'saved_model.pt')
    print(f'{path}: {path.stat().st_size / 2**20:.1f} MB, {dim} dimensions, within {worst:.1g} of the model.')
    if reference is not None:
        images = reference_images(reference)
        with torch.inference_mode():
            vectors = np.concatenate([model(torch.from_numpy(image)[None]) for image in images])
        with whole_file(path.with_name('reference.npz')) as beside:
            np.savez(beside, images=images, vectors=vectors)
    if submit:
        copy_to_kaggle_output(path)


def submission_of(model):
    """The module to export: a Submission of a run's path, an Embedder or an Ensemble; any other module is itself."""
    model = model if isinstance(model, nn.Module) else load_run(model)
    if isinstance(model, Ensemble):
        return Submission(model.members, model.projection)
    return Submission([model]) if isinstance(model, Embedder) else model


def reference_images(frame, count=16, size=96):
    """The first images of a table that can be read: uint8 (count, 3, size, size). OSError if none can."""
    dataset = ImageDataset(frame.assign(label=''), size)
    items = ((dataset[i]['image'].numpy(), dataset.paths[i]) for i in range(len(dataset)))
    images = [*islice((image for image, path in items if path not in dataset.unreadable), count)]
    note_left_out(dataset.unreadable, frame['path'])
    return np.stack(images)


def note_left_out(unreadable, *tables):
    """Prints how many images could not be read, and the first; OSError if a table has no other."""
    for paths in tables:
        if {*paths} <= {*unreadable}:
            first = f', first {min(paths)}' if len(paths) else ''
            raise FileError(f'None of {len({*paths})} images can be read{first}: check the data folder.')
    if unreadable:
        print(printable(f'{len(unreadable)} images could not be read and were left out, first {unreadable[0]}'))


def load_submission(zip_path):
    """The module in a submission. FileNotFoundError; ValueError for another file."""
    if not Path(zip_path).is_file():
        raise MissingError(f'There is no submission {zip_path}: check the path, or write it with export_submission.')
    try:
        with zipfile.ZipFile(zip_path) as archive, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # as in export_submission
            return torch.jit.load(archive.extract('saved_model.pt', folder)).eval()
    except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(f'{zip_path} is not a submission: it must be a zip with a TorchScript file '
                         'saved_model.pt at its root, as export_submission writes it.') from error
    except OSError as error:
        raise FileError(f'{zip_path} could not be unpacked into {tempfile.gettempdir()} ({reason_of(error)}): free some '
                        f'space there, or check the file.') from error


def host_pixels(path):
    """An image as the host decodes it: uint8 (3, H, W). OSError, naming the file, if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return PILToTensor()(image.convert('RGB'))
    except Exception as error:  # decoders raise anything
        raise FileError(f'{path} is not a readable image ({reason_of(error)})') from error


def host_vector(model, zip_path, path, pixels):
    """The output for one image, flattened as the host does it: float32 (dim,). ValueError if the host cannot use it."""
    try:
        output, wrong = model(pixels[None]), ''
    except RuntimeError as error:
        output, wrong = None, f'stops with "{str(error).strip().splitlines()[-1]}"'
    shape = getattr(output, 'shape', ())
    if not wrong and (len(shape) < 2 or shape[0] != 1 or shape[1:].numel() > MAX_DIM):
        wrong = f'returns {f"the shape {list(shape)}" if shape else type(output).__name__}'
    elif not wrong and not output.isfinite().all():
        wrong = 'returns NaN or infinite values'
    if wrong:
        raise InputError(f'{zip_path} {wrong} for the image {path}; the host takes one row of at most {MAX_DIM} finite '
                         f'numbers for each: export the model again.')
    return output.flatten().numpy()


def host_vectors(model, zip_path, paths, max_unreadable, desc='replay'):
    """({path: vector} of the images that can be read, [paths of the others]); OSError if more than max_unreadable cannot."""
    vectors, unreadable = {}, []
    for path in progress_bar(paths, desc, unit=' images', disable=len(paths) == 1):
        try:
            pixels = host_pixels(path)
        except FileError as error:
            unreadable.append(path)
            if len(unreadable) > max_unreadable:
                raise FileError(f'More than {max_unreadable} images (max_unreadable) cannot be read; the last: {error}.'
                                ) from None
        else:
            vectors[path] = host_vector(model, zip_path, path, pixels)
    return vectors, unreadable


def evaluate_submission(zip_path, query_frame, index_frame, *, max_unreadable=None):
    """Does what the host does: every image (columns path, label) through the file one by one, Euclidean neighbours, mP@5.
    Prints images a second, reading included, and the hours that the host's 205,000 would take here. Images that cannot be
    read are left out and counted; more than max_unreadable (None: 100, or one in a hundred), or all, raise OSError. Returns
    a dict: mp5, images_per_second, hours, dim, the paths `unreadable`, and the vectors query and index of all others,
    float32 (n, dim)."""
    zip_path, frames = user_path(zip_path), (query_frame, index_frame)
    note_left_out((), *(frame['path'] for frame in frames))  # neither is empty
    model, paths = load_submission(zip_path), dict.fromkeys([*query_frame['path'], *index_frame['path']])
    most, start = max(100, len(paths) // 100) if max_unreadable is None else max_unreadable, time.perf_counter()
    with torch.no_grad():
        vectors, unreadable = host_vectors(model, zip_path, paths, most)
    rate = len(vectors) / (time.perf_counter() - start)
    note_left_out(unreadable, *(frame['path'] for frame in frames))
    if len({len(vector) for vector in vectors.values()}) > 1:
        raise InputError(f'{zip_path} gives vectors of different lengths for different images: export the model again.')
    hours, frames = HOST_IMAGES / rate / 3600, [frame[frame['path'].isin(vectors)] for frame in frames]
    print(f'{rate:.1f} images/s one by one on this machine: {hours:.1f} h for the host\'s {HOST_IMAGES:,}, of the '
          f'{HOST_HOURS} h allowed.')
    query, index = (np.stack([vectors[path] for path in frame['path']]) for frame in frames)
    mp5 = mean_precision_at_5(query, frames[0]['label'].to_numpy(), index, frames[1]['label'].to_numpy())
    return {'mp5': mp5, 'images_per_second': rate, 'hours': hours, 'dim': query.shape[1], 'unreadable': unreadable,
            'query': query, 'index': index}


def replay_submission(path, splits, vectors, projection, *, objects=None):
    """evaluate_submission on some objects (None: all); also prints the score of the notebook's own vectors (of embed_all)
    through the submission's projection (n, d) -> (n, dim). Returns (splits without images that cannot be read, the dict of
    evaluate_submission)."""
    rows = sample_objects(splits, objects)
    replay = evaluate_submission(path, *(splits[part].iloc[rows[part]] for part in ('query', 'index')))
    rows = {part: rows[part][~splits[part]['path'].iloc[rows[part]].isin(replay['unreadable'])] for part in rows}
    few = {part: splits[part].iloc[rows[part]].reset_index(drop=True) for part in rows}
    own = [part[rows[name]] for name, part in zip(('query', 'index'), project(vectors, replay['dim'], projection))]
    mp5 = mean_precision_at_5(own[0], few['query']['label'], own[1], few['index']['label'])
    judged = few['query']['label'].isin(few['index']['label']).sum()
    print(f'mP@5 of the file {replay["mp5"]:.3f}, of the notebook {mp5:.3f}, on {judged} queries')
    return few, replay
