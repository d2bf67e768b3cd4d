"""Weights: reads files of any origin without running them, and gives their tensors our names."""
import argparse
import pickle
import re
import zipfile
from collections import Counter
from math import isqrt
from pathlib import Path

import open_clip
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed

from guie.errors import FileError, InputError, MissingError
from guie.files import user_path

SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.ckpt')
OF_A_FOLDER = ('model.safetensors', 'open_clip_model.safetensors', 'open_clip_pytorch_model.safetensors',
               'open_clip_pytorch_model.bin', 'pytorch_model.bin')  # of a run or save_pretrained; the first counts
STATES = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'model_state_dict')  # in a checkpoint; the first counts
CAUSES = (  # how a file begins, what it is and what to do
    (rb'\Z', 'is empty: copy or download it again.'),
    (rb'version https://git-lfs', 'is a Git LFS pointer in place of the weights: run git lfs pull, or download the file.'),
    (rb'\s*<', 'is a web page, saved in place of the weights: download the file itself.'),
    (rb'\s*[{\[]', 'is text (JSON), not weights: give the file of weights beside it.'),
    (rb'[\t\r\n -~]{16}', 'is text, not weights: give a file of weights.'),
    (rb'\x89PNG|\xff\xd8|GIF8|RIFF|BM|%PDF|\x89HDF|\x93NUMPY', 'is no file of PyTorch weights: give one.'),
    (rb'\x1f\x8b|7z\xbc|Rar!|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd', 'is packed: unpack it and give the file of weights in it.'))
TRUNCATED = 'is truncated, or neither safetensors nor a PyTorch state dict: copy or download it again.'
TORCH = {'Half': torch.float16, 'BFloat16': torch.bfloat16, 'Float': torch.float32, 'Double': torch.float64,
         'Byte': torch.uint8, 'Char': torch.int8, 'Short': torch.int16, 'Int': torch.int32, 'Long': torch.int64,
         'Bool': torch.bool}  # storages by the names of their types

INNER = re.compile(r'\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')  # anywhere in a name
ROOTS = [re.compile(root) for root in (  # what comes before the image tower's own names
    r'(.*?\btower\.)', r'(.*?\bvisual\.)',
    r'((?:[^.]+\.)*?)(?:conv1\.weight$|class_embedding$|cls_token$|pos_embed$|trunk\.|patch_embed\.|conv_stem\.|stem\.)')]
TEXT = re.compile(r'\b(?:text|text_decoder|transformer|token_embedding|positional_embedding|ln_final|text_projection'
                  r'|logit_scale|logit_bias|input_resolution|context_length|vocab_size)(?:\.|$)')
HEAD = re.compile(r'(?:^|.*\.)(head\.(?:emb\.weight|arc\.weight|embedding\.weight|centers|norm\..+)|projection\.\w+)$')
AUTHORS = {'head.emb.weight': 'head.embedding.weight', 'head.arc.weight': 'head.centers'}  # their names, and ours
CLASSIFIER = re.compile(r'(?:aux_)?(?:heads?|fc|classif(?:ier)?|last_linear)(?:_dist)?\.')  # of timm's models
WORDS = 'token_embedding.weight'
STEM = re.compile(r'((?:tower\.)?(?:trunk\.)?)(?:conv1|patch_embed\.proj)\.weight$')
BLOCK = re.compile(r'(?:transformer\.resblocks|blocks|layer(\d))\.(\d+)\.')
POSITIONS = re.compile(r'(?:^|\.)(?:positional_embedding|pos_embed)$')


# Files

def weights_file(path):
    """The file of weights of a path: itself, or that in the folder of a run, of save_pretrained, or with one such file."""
    path = user_path(path)
    found = [path]
    if path.is_dir():
        found = [path / name for name in OF_A_FOLDER if (path / name).exists()]
        others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found and len(others) > 1:
            raise InputError(f'{path} holds several files of weights ({listed([file.name for file in others])}): give one.')
        found += [*others, path / OF_A_FOLDER[0]]
    if not found[0].is_file():
        others = f' or other file of weights ({", ".join(SUFFIXES)})' if path.is_dir() else ''
        raise MissingError(f'There is no checkpoint {found[0]}{others}: check the path, or make this file first.')
    return found[0]


def read_weights(path):
    """({name: tensor}, metadata) of a file of weights. Tensors are mapped, not yet read; nothing in the file is executed.
    Its content decides, not its name: safetensors, a state dict of torch.save, also within a checkpoint, or TorchScript.
    ValueError for a file that is truncated, of another kind, or holds Python objects."""
    path = Path(path).resolve()  # the name of what a link leads to
    try:
        with open(path, 'rb') as file:
            start = file.read(64)
    except OSError as error:
        raise FileError(f'{path} cannot be read ({error.strerror}): give a file of weights that can.') from error
    try:
        if start[8:9] == b'{':  # safetensors: 8 bytes of length, then JSON
            with safe_open(path, framework='pt') as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        inside = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = archive.namelist()
        if inside and any(name.endswith('/constants.pkl') for name in inside):
            return script_tensors(path), {}
        if inside is not None and not any(name.endswith('data.pkl') for name in inside):
            raise InputError(f'{path} is a zip archive without a state dict: unpack it and give the file of weights in it.')
        return saved_tensors(path, mapped=inside is not None), {}
    except InputError:
        raise
    except Exception as error:  # a damaged file makes the readers raise almost anything
        if isinstance(error, pickle.UnpicklingError) and 'GLOBAL' in str(error):
            raise InputError(f'{path} holds Python objects, which could run code when loaded: '
                             'ask for its state dict alone, or for safetensors.') from error
        causes = [cause for begins, cause in CAUSES if re.match(begins, start) and start[8:9] != b'{']
        raise InputError(f'{path} {[*causes, TRUNCATED][0]}') from error


def saved_tensors(path, mapped):
    """{name: tensor} of what torch.save wrote: a state dict or, in a checkpoint, the first of STATES, else the largest."""
    with open(path, 'rb') as file, torch.serialization.safe_globals([argparse.Namespace]):  # timm's options; plain values
        by_name = mapped and path.suffix != '.safetensors'  # torch.load would trust the name
        held = torch.load(path if by_name else file, map_location='cpu', mmap=by_name, weights_only=True)
    while isinstance(held, dict):
        states = {str(name): inner for name, inner in held.items() if isinstance(inner, dict) and tensors_of(inner)}
        names = [name for name in STATES if name in states] or sorted(states, key=lambda name: -len(states[name]))
        if len(states) > 1:
            print(f'{path} holds {", ".join(states)}: {names[0]} is taken')
        below = [held[name] for name in ([*names[:1]] if states else STATES) if isinstance(held.get(name), dict)]
        if not below:
            return tensors_of(held)
        held = below[0]
    return {}


def tensors_of(held):
    """{name: tensor} of a dict's own tensors."""
    return {str(name): value.detach() for name, value in held.items() if isinstance(value, torch.Tensor)}


class Recorded:
    """Replaces every class that a TorchScript archive names: keeps attributes, does nothing."""

    def __init__(self, *arguments):
        """Ignores its arguments."""

    def __setstate__(self, attributes):
        vars(self).update(attributes if isinstance(attributes, dict) else {})


class ScriptUnpickler(pickle.Unpickler):
    """Reads the tensors of an opened TorchScript archive; it imports nothing that the file names, so that nothing runs."""

    def __init__(self, archive, pickled):
        super().__init__(archive.open(pickled))
        self.archive, self.folder = archive, pickled.removesuffix('data.pkl')

    def find_class(self, module, name):
        """A tensor's constructor, a storage's type, or Recorded."""
        if name == '_rebuild_tensor_v2':
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        return TORCH.get(name.removesuffix('Storage'), Recorded) if module == 'torch' else Recorded

    def persistent_load(self, storage):
        """The numbers of a storage, as a flat tensor."""
        _, dtype, key, _, count = storage
        return torch.frombuffer(bytearray(self.archive.read(f'{self.folder}data/{key}')), dtype=dtype, count=count)


def script_tensors(path):
    """{name: tensor} of a TorchScript archive, as OpenAI's CLIPs are."""
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        modules, found = [('', ScriptUnpickler(archive, pickled).load())], {}
    for prefix, module in modules:
        modules += [(f'{prefix}{name}.', part) for name, part in vars(module).items() if isinstance(part, Recorded)]
        found |= {prefix + name: tensor for name, tensor in tensors_of(vars(module)).items()}
    return found


# Names

def our_names(tensors, source, own=()):
    """The tensors of a file of any origin under our names: tower.…, head.embedding.weight, head.centers, projection.….
    Wrappers' prefixes and text towers are left out; whatever else is left out is printed. own: names of the tower to load,
    which then decide; without them the file's do. ValueError for a file with nothing of ours, or transformers' names."""
    named = {INNER.sub('', name): tensor for name, tensor in tensors.items()}
    if any('embeddings.patch_embedding' in name for name in named):
        raise InputError(f"{source} has the names of the transformers library, not open_clip's or timm's: give the model's "
                         f'open_clip_model.safetensors or open_clip_pytorch_model.bin, or its tag.')
    root, ours, others = tower_root(named, own), {}, []
    for name, tensor in named.items():
        rest, head = name.removeprefix(root or ''), HEAD.match(name)
        if root is not None and name.startswith(root):
            if rest in own or not (own and CLASSIFIER.match(rest)):
                ours[f'tower.{rest}'] = tensor
        elif head:
            ours[AUTHORS.get(head[1], head[1])] = tensor
        elif root is None or root.endswith('tower.'):
            ours |= {} if TEXT.search(name) else {name: tensor}
        elif not TEXT.search(name):
            others.append(name)
    if not ours:
        raise InputError(f'{source} holds no tensors of a tower or head: save model.state_dict() into it.')
    if others:
        print(f'{source}: left out {listed(others)}, of neither image tower nor head')
    if 'head.embedding.weight' in ours and any(name.endswith('head.emb.weight') for name in named):
        ours.setdefault('head.centers', ours['head.embedding.weight'].new_zeros(0, len(ours['head.embedding.weight'])))
    return ours  # the authors' own soup has no classes


def tower_root(names, own=()):
    """What precedes the image tower's names in a file; None where there is none."""
    ours, theirs, first = [[match[1] for match in map(root.match, names) if match and not TEXT.search(match[1])]
                           for root in ROOTS]
    known = None if ours else prefix_of(own, names)
    return known if known is not None else min(ours or theirs or first, key=len, default=None)


def prefix_of(own, names):
    """The prefix under which a file has most names of a tower, at least half of them; None if there is none.
    Text and image towers name their blocks alike: the word embedding of a text tower tells them apart."""
    starts = {name: [0, *(dot.end() for dot in re.finditer(r'\.', name))] for name in names}
    counts = Counter(name[:start] for name in names for start in starts[name] if name[start:] in own)
    counts = {prefix: count for prefix, count in counts.items() if 2 * count >= len(own)
              and (prefix + WORDS in names) == (WORDS in own)}
    return max(counts, key=counts.get, default=None)


def tower_state(tensors, source, own):
    """The image tower among a file's tensors, under the names of the tower to be loaded."""
    ours = our_names(tensors, source, own)
    return {name.removeprefix('tower.'): tensor for name, tensor in ours.items()
            if name.startswith('tower.') or not HEAD.match(name)}


def text_state(tensors, own):
    """The text half of any CLIP under the names of open_clip's in `own`, with or without 'text.' before them."""
    named = {INNER.sub('', name): tensor for name, tensor in tensors.items()}
    for short in ({name: name for name in own}, {name.removeprefix('text.'): name for name in own}):
        root = prefix_of(short, named)
        if root is not None:
            found = {short[name[len(root):]]: tensor for name, tensor in named.items()
                     if name.startswith(root) and name[len(root):] in short}
            return {name: tensor.reshape(own[name].shape) if tensor.numel() == own[name].numel() == 1 else tensor
                    for name, tensor in found.items()}  # the scale of some files has a dimension more
    return {}


# Fit

def load_strictly(module, state, source):
    """module.load_state_dict, but one sentence is raised for missing, unexpected or misshapen tensors. Position embeddings
    of another image size are interpolated to the module's."""
    own = module.state_dict()
    state = {name: resampled(tensor, own[name], source) if name in own and POSITIONS.search(name) else tensor
             for name, tensor in state.items()}
    check_fit(own, state, source)
    module.load_state_dict(state)


def resampled(position, like, source):
    """A position embedding on the grid of another, by bicubic interpolation in float32; unchanged if that is impossible."""
    if like.ndim not in (2, 3) or position.ndim != like.ndim or position.shape == like.shape:
        return position
    side = isqrt(like.shape[-2])
    extra = like.shape[-2] - side ** 2  # tokens that have no place on the grid
    old = isqrt(max(position.shape[-2] - extra, 0))
    if old ** 2 + extra != position.shape[-2] or not old or position.shape[-1] != like.shape[-1]:
        return position
    print(f'{source}: its position embeddings for {old} × {old} patches are interpolated to {side} × {side}')
    flat = position.float().reshape(1, *position.shape[-2:])
    return resample_abs_pos_embed(flat, [side, side], [old, old], extra).reshape(like.shape)


def check_fit(own, state, source):
    """ValueError that names what does not fit, and the architecture that fits better if there is one."""
    shapes = [f'{name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}' for name in own
              if name in state and state[name].shape != own[name].shape]
    missing, unknown = [name for name in own if name not in state], [name for name in state if name not in own]
    wrong = [f'{listed(names)} {"is" if len(names) == 1 else "are"} {what}'
             for names, what in ((missing, 'missing'), (unknown, 'not in the model')) if names]
    if wrong := wrong + ([listed(shapes, '; ')] if shapes else []):
        here, there = architecture_of(state), architecture_of(own)
        advice = f'it looks like {here}, the model like {there}' if here and there and here != there else (
            'give the model that it was made with')
        raise InputError(f'{source} does not fit the model in {len(shapes) + len(missing) + len(unknown)} tensors: '
                         f'{"; ".join(wrong)}: {advice}.')


def listed(names, comma=', '):
    """The first three of some names and how many more there are."""
    return comma.join(names[:3]) + (f' and {len(names) - 3} more' if names[3:] else '')


def architecture_of(state):
    """open_clip's name for an image tower with these tensors, or how it is built; '' for what has no known stem."""
    stems = [(match[1], tensor) for name, tensor in state.items() if (match := STEM.match(name)) and tensor.ndim == 4]
    if not stems:
        return ''
    prefix, stem = stems[0]
    found = {match.groups() for name in state if (match := BLOCK.match(name.removeprefix(prefix)))}
    blocks = Counter(stage for stage, _ in found)
    built = tuple(blocks[stage] for stage in sorted(blocks, key=str)), stem.shape[0], stem.shape[-1]
    width = state[f'{prefix}proj'].shape[-1] if f'{prefix}proj' in state else None
    names = [name for name in open_clip.list_models() if f'{prefix}conv1.weight' in state
             and built == plan_of(open_clip.get_model_config(name).get('vision_cfg'))]
    near = sorted(names, key=lambda name: (open_clip.get_model_config(name)['embed_dim'] != width, len(name)))
    layers = ' + '.join(map(str, built[0])) or 'no'
    return near[0] if near else f'{layers} blocks of width {built[1]} over patches of {built[2]} pixels'


def plan_of(vision_cfg):
    """(blocks of each stage, width of the first convolution, its side) of open_clip's own towers; () of others."""
    if not vision_cfg or 'timm_model_name' in vision_cfg:  # audio models have no image tower
        return ()
    layers, width = vision_cfg.get('layers', 12), vision_cfg.get('width', 768)
    if isinstance(layers, list):  # a ResNet
        return tuple(layers), width // 2, 3
    return (layers,), width, vision_cfg.get('patch_size', 16)
