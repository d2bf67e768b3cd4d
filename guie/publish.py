"""Publish: a run, soup or ensemble as a folder that others use with open_clip or timm alone; uploaded only if asked for."""
import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from guie.card import base_of, model_card
from guie.checkpoints import PROJECTION, Checkpoint, load_run, open_checkpoint, save_state
from guie.errors import ExistsError, InputError, ProcessError
from guie.files import folder_beside, reason_of, user_path, whole_file, write_text
from guie.towers import NO_TEXT, load_open_clip, local_folder, no_warnings_logged, resize_tower

MARK = '<!-- This folder was written by publish, which may replace its files. -->'
PLACES = {  # where it can be uploaded: package, form of a name, how to log in
    'huggingface': ('huggingface_hub', 'owner/model', 'hf auth login, or the environment variable HF_TOKEN'),
    'kaggle': ('kagglehub', 'owner/model/pyTorch/variation', 'kagglehub.login()')}


def publish(run, folder, *, licence=None, text=True, to=None, repo=None):
    """Writes a folder with which others get a run's vectors, without this repository -> its Path.
    run: a run, soup or ensemble. The folder holds open_clip_config.json and open_clip_model.safetensors, which
    open_clip.create_model('local-dir:folder') loads (of a timm tower what timm.create_model loads), projection.safetensors
    (head and projection to 64 numbers) and model.safetensors (the run itself, for load_run), both in run/ with a timm tower,
    and README.md, a card of what is recorded; that of an ensemble holds such a folder for each member. Before it is kept,
    the tower that open_clip or timm makes of it is compared with the run's. licence: of the weights, by the Hub's name;
    None: unknown. text: False leaves out the pretrained text half. to: 'huggingface' or 'kaggle' uploads it as `repo`, a new
    one in private. FileExistsError: the folder holds something else. ValueError: neither library can build the tower, or
    the text half cannot be loaded. RuntimeError: a package or a login is missing."""
    checkpoint, folder = open_checkpoint(run), user_path(folder)
    check_upload(to, repo)
    there = {path for path in folder.rglob('*') if path.is_file()} if folder.is_dir() else set()
    readme = folder / 'README.md'
    if folder.exists() and (there or not folder.is_dir()) and not (
            readme.is_file() and MARK in readme.read_text('utf-8', 'replace')):
        raise ExistsError(f'{folder} holds something that publish did not write: choose another folder.')
    with folder_beside(folder) as beside:
        write = write_ensemble if checkpoint.metadata.get('method') == 'ensemble' else write_run
        write(checkpoint, beside, licence, text)
        written = moved(beside, folder)
    size = sum(path.stat().st_size for path in written)
    print(f'{folder}: {len(written)} files, {size / 2**20:.1f} MB; {"" if to else "nothing was uploaded; "}see {readme}.')
    if left := sorted(there - written):
        print(f'{folder}: {len(left)} files are there from before, first {left[0].relative_to(folder)}.')
    if to:
        upload(folder, to, repo)
    return folder


def moved(beside, folder):
    """Moves all files below a folder into another, the card first, each whole -> {their new paths}."""
    files = sorted((path for path in beside.rglob('*') if path.is_file()), key=lambda path: path != beside / 'README.md')
    for file in files:
        with whole_file(folder / file.relative_to(beside)) as part:
            file.replace(part)
    return {folder / file.relative_to(beside) for file in files}


def write_run(checkpoint, folder, licence, text):
    """Writes a published run -> (folder for load_run, Python from an image to its vector at full width, given the place)."""
    model = load_run(checkpoint)
    library = model.spec.architecture.get('library')
    if library not in ('open_clip', 'timm'):
        raise InputError(f'{checkpoint.name} has a tower of your own, which neither open_clip nor timm can build: share its '
                         f'folder together with the code of the tower.')
    half = write_open_clip(checkpoint, model, folder, text) if library == 'open_clip' else write_timm(model, folder)
    check_library(library, model, folder)
    below = 'run' if library == 'timm' else '.'  # timm reads a model.safetensors of its own, and 1.0.26 none beside others
    own = folder / below / 'model.safetensors'
    own.parent.mkdir(exist_ok=True)
    try:
        os.link(checkpoint.path.resolve(), own)
    except OSError:  # another file system
        shutil.copyfile(checkpoint.path, own)
    maps = maps_of(model)
    if maps:
        save_state(maps, own.with_name('projection.safetensors'))
    file = lambda place: os.path.normpath(f'{place}/{below}/projection.safetensors')
    code = lambda place: (tower_code(library, place) + [f'maps = load_file({file(place)!r})'] * bool(maps)
                          + HEAD_CODE[model.head is not None])
    snippet = python(library, code('.'), PROJECTION_CODE if model.projection is not None else [])
    dim = len(maps.get('projection.weight', maps.get('head.weight', range(model.spec.width))))
    write_card(checkpoint, folder, snippet, dim=dim, library=library, licence=licence, text=half)
    return own.parent, code


def write_ensemble(checkpoint, folder, licence, text):
    """Writes a published ensemble: a published run for each member, the joint projection, and the card for all."""
    load_run(checkpoint)  # its members are there, and are those that it was made of
    told, parts, code, libraries = json.loads(checkpoint.metadata['members']), [], ['vectors = []'], []
    counts = Counter(member['name'] for member in told)
    for number, member in enumerate(told, start=1):
        name = member['name'] if counts[member['name']] == 1 else f'{member["name"]}_{number}'
        parts.append(open_checkpoint(checkpoint.path.parent / member['run']))
        (folder / name).mkdir()
        own, of_member = write_run(parts[-1], folder / name, licence, text)
        member['run'] = os.path.relpath(own, folder)
        code += of_member(name) + ['vectors.append(vector)']
        libraries.append(parts[-1].spec.architecture['library'])
    metadata = checkpoint.metadata | {'members': json.dumps(told)}
    tensors = {f'{PROJECTION}{name}': tensor for name, tensor in checkpoint.projection.items()}
    save_state(tensors, folder / 'model.safetensors', metadata)
    save_state(tensors, folder / 'projection.safetensors')
    code += ["maps, vector = load_file('projection.safetensors'), torch.cat(vectors, 1)"]
    snippet = python(' and '.join(dict.fromkeys(libraries)), code, PROJECTION_CODE)
    write_card(Checkpoint(tensors, metadata, checkpoint.path, checkpoint.name), folder, snippet,
               dim=len(checkpoint.projection['weight']), library=libraries[0], licence=licence, text=None, parts=parts)


def write_card(checkpoint, folder, snippet, **facts):
    """Writes README.md."""
    write_text(folder / 'README.md', model_card(checkpoint, snippet, **facts) + f'\n{MARK}\n')


def write_open_clip(checkpoint, model, folder, text):
    """Writes the configuration and weights of open_clip's CLIP with a run's image tower -> what its text half is."""
    tower, spec = model.tower, model.spec
    if isinstance(tower, VisionTransformer) and tower.conv1.stride != tower.conv1.kernel_size:
        raise InputError(f'{checkpoint.name} has patches that overlap (stride {tower.conv1.stride[0]}, side '
                         f'{tower.conv1.kernel_size[0]}), which open_clip cannot build: share its model.safetensors with '
                         f'this repository, or export it by export_onnx.')
    clip, config = whole_clip(spec) if text else (without_text(spec), {'model_cfg': {'text_cfg': NO_TEXT}})
    clip.visual.load_state_dict(tower.state_dict())
    plan, named = spec.architecture, config['model_cfg']
    named |= {'embed_dim': plan['embed_dim'], 'vision_cfg': plan['vision_cfg'],
              'quick_gelu': plan['quick_gelu'] or named.get('quick_gelu', False)}
    config['preprocess_cfg'] = {'size': spec.image_size, 'mean': spec.mean, 'std': spec.std, 'interpolation': 'bicubic',
                                'resize_mode': 'squash'}
    save_state(clip.state_dict(), folder / 'open_clip_model.safetensors')
    write_text(folder / 'open_clip_config.json', json.dumps(config, indent=1) + '\n')
    if not text:
        return 'none, but zeros in its place, without which open_clip would not load the file'
    if spec.pretrained.endswith('random'):
        return 'random weights, as those that the run began with'
    return (f'that of {base_of(checkpoint)}, not trained further; how well it still fits the fine-tuned image tower is not '
            f'recorded')


def whole_clip(spec):
    """(open_clip's CLIP that a run started from, its configuration)."""
    try:
        clip = load_open_clip(spec.model_name, spec.pretrained, spec.image_size)
        if spec.model_name.startswith('local-dir:'):  # with the words of a small vocabulary
            return clip, json.loads((local_folder(spec.model_name) / 'open_clip_config.json').read_text())
        return clip, {'model_cfg': open_clip.get_model_config(spec.model_name)}
    except (InputError, OSError) as error:
        raise InputError(f'The text half of a whole CLIP is missing ({str(error).rstrip(".")}): turn the internet on, or '
                         f'pass text=False to publish the image tower without it.') from error


def without_text(spec):
    """open_clip's CLIP with the image tower of a TowerSpec and the smallest text half, of zeros."""
    plan = spec.architecture
    clip = open_clip.CLIP(plan['embed_dim'], plan['vision_cfg'], NO_TEXT, quick_gelu=plan['quick_gelu'])
    resize_tower(clip.visual, spec.image_size)
    for name, tensor in clip.state_dict().items():
        if not name.startswith('visual.'):
            tensor.zero_()
    return clip


def write_timm(model, folder):
    """Writes config.json and model.safetensors for timm.create_model('local-dir:…', pretrained=True); there is no text."""
    spec, plan = model.spec, model.spec.architecture
    sized = {'img_size': spec.image_size} if hasattr(model.tower, 'set_input_size') else {}
    options = {name: value for name, value in plan['options'].items() if name != 'num_classes'}
    config = {'architecture': plan['name'].split('.')[0], 'num_classes': 0, 'num_features': spec.width,
              'model_args': options | sized,
              'pretrained_cfg': {'num_classes': 0, 'input_size': [3, spec.image_size, spec.image_size], 'mean': spec.mean,
                                 'std': spec.std, 'interpolation': 'bicubic', 'crop_pct': 1.0, 'crop_mode': 'squash',
                                 'fixed_input_size': bool(sized)}}
    save_state(model.tower.state_dict(), folder / 'model.safetensors')
    write_text(folder / 'config.json', json.dumps(config, indent=1) + '\n')


def check_library(library, model, folder, tolerance=1e-4):
    """ValueError unless open_clip or timm makes the run's own tower of the folder: equal unit vectors of random images."""
    side, generator = model.spec.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=generator)
    version = f'{library} {(open_clip if library == "open_clip" else timm).__version__}'
    with torch.inference_mode(), no_warnings_logged():
        expected = F.normalize(model.tower(images))
        try:
            if library == 'open_clip':
                made = open_clip.create_model(f'local-dir:{folder}').eval().encode_image(images)
            else:
                made = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
        except Exception as error:  # they raise almost anything
            raise InputError(f'{version} cannot build the tower {model.spec.model_name} at {side} px ({reason_of(error)}): '
                             f'share its model.safetensors with this repository, or export it by export_onnx.') from error
    worst = (F.normalize(made) - expected).abs().max().item()
    if not worst <= tolerance:
        raise InputError(f'{version} builds another tower of the weights of {model.spec.model_name} at {side} px (vectors '
                         f'differ by {worst:.1g}): share its model.safetensors with this repository.')


def maps_of(model):
    """{name: tensor} of what follows the tower, as linear maps: head.weight and head.bias, into which a norm is folded, then
    projection.weight and projection.bias; each may be missing."""
    maps = {}
    if model.head is not None:
        norm, weight = model.head.norm, model.head.embedding.weight.detach().double()
        bias = torch.zeros(len(weight), dtype=torch.float64)
        if isinstance(norm, nn.BatchNorm1d):
            weight = weight / (norm.running_var.double() + norm.eps).sqrt()
            bias = -weight @ norm.running_mean.double()
        maps |= {'head.weight': weight.float(), 'head.bias': bias.float()}
    if model.projection is not None:
        maps |= {f'{PROJECTION}{name}': tensor for name, tensor in model.projection.state_dict().items()}
    return maps


# The card's Python, in which `vector` grows from an image in the folder to the run's own vector
HEAD_CODE = {True: ["vector = normalize(vector @ maps['head.weight'].T + maps['head.bias'])"],
             False: ['vector = normalize(vector)']}
PROJECTION_CODE = ["vector = normalize(vector @ maps['projection.weight'].T + maps['projection.bias'])"]


def tower_code(library, place):
    """Lines of Python: the tower in a folder and its `vector` of `image`."""
    source = repr(f'local-dir:{place}')
    if library == 'open_clip':
        return [f'model, _, preprocess = open_clip.create_model_and_transforms({source})',
                'vector = model.eval().encode_image(preprocess(image)[None])']
    return [f'model = timm.create_model({source}, pretrained=True)',
            'preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
            'vector = model.eval()(preprocess(image)[None])']


def python(libraries, *parts):
    """The card's Python as text."""
    imports = ['import torch', *(f'import {name}' for name in libraries.split(' and ')), 'from PIL import Image, ImageOps',
               'from safetensors.torch import load_file', 'from torch.nn.functional import normalize', '']
    body = ["image = ImageOps.exif_transpose(Image.open('image.jpg')).convert('RGBA')  # upright, and on white:",
            "image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')", *sum(parts, [])]
    return '\n'.join([*imports, 'with torch.inference_mode():', *(f'    {line}' for line in body)]) + '\n'


def check_upload(to, repo):
    """ValueError or RuntimeError, before anything is written, if a folder could not be uploaded."""
    if to is None and repo is None:
        return
    if to not in PLACES or not repo:
        forms = ' or '.join(f"to='{name}', repo='{form}'" for name, (_, form, _) in PLACES.items())
        raise InputError(f'to is {to!r} and repo is {repo!r}: give both to upload ({forms}), or neither.')
    package, _, login = PLACES[to]
    if find_spec(package) is None:
        raise ProcessError(f'An upload needs the package {package}: run `pip install {package}` and log in ({login}).')


def upload(folder, to, repo):
    """Uploads a published folder. RuntimeError if the login or the network is missing; the folder stays."""
    try:
        if to == 'huggingface':
            from huggingface_hub import HfApi

            HfApi().create_repo(repo, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder)
        else:
            import kagglehub

            kagglehub.model_upload(repo, str(folder))
    except Exception as error:  # each has errors of its own
        _, form, login = PLACES[to]
        raise ProcessError(f'{folder} is complete, but was not uploaded to {to} as {repo} ({reason_of(error)}): log in '
                           f'({login}), and name it as {form}.') from error
    print(f'{folder}: uploaded to {to} as {repo}; a new one is private.')
