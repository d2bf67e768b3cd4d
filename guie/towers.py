"""Towers: pretrained image towers of open_clip and timm, with what belongs to their weights."""
import logging
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from torch import nn
from torch.utils.checkpoint import checkpoint

from guie.errors import FileError, InputError
from guie.files import did_you_mean, user_path
from guie.weights import check_fit, load_strictly, read_weights, text_state, tower_state, weights_file

STAGES = {'stem': r'stem|patch_embed|pos_embed|cls_token',
          'blocks': [(r'(?:stages|transformers)\.(\d+)\.(?:downsample|pool)\.', (0,)),
                     (r'(?:stages|transformers)\.(\d+)(?:\.blocks)?\.(\d+)', None)]}
MATCHERS = {  # for classes without a group_matcher, in its format: open_clip's own and three of timm's
    'VisionTransformer': {'stem': 'conv1|class_embedding|positional_embedding|ln_pre',
                          'blocks': r'transformer\.resblocks\.(\d+)'},
    'ModifiedResNet': {'stem': r'conv\d|bn\d', 'blocks': r'layer(\d+)\.(\d+)'},
    **dict.fromkeys(('CSATv2', 'MetaFormer', 'PoolingVisionTransformer'), STAGES)}
STEM = re.compile(r'(cls_token|reg_token|pos_embed|norm_pre)(\.|$)')  # group_matchers before timm 1.0.31 place these last
MOBILE_CLIP = 'image_encoder.model.patch_emb'  # begins the names of Apple's own files
NO_TEXT = {'context_length': 1, 'vocab_size': 1, 'width': 8, 'heads': 1, 'layers': 1}  # the smallest that open_clip builds

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class TowerSpec:
    """What an image tower needs besides its weights."""
    model_name: str     # as given to load_image_tower
    pretrained: str     # tag or file of the weights it started from
    image_size: int     # pixels
    mean: tuple         # of the red, green and blue values in 0..1 that the weights were trained with
    std: tuple
    activation: str     # 'gelu', 'quick_gelu', or '' for what is not open_clip's own transformer
    width: int          # columns of the tower's output
    architecture: dict  # rebuilds the module without weights; see build_tower


def weights_source(model_name, pretrained):
    """(what open_clip is to load, settings of the tag) for a built-in name. pretrained: a tag, a file, or 'tag@file' (a file
    with the tag's preprocessing and activation, as on Kaggle without internet); 'random' and 'tag@random' load nothing."""
    if model_name not in open_clip.list_models():
        if other := 'timm' if timm.is_model(model_name) else 'local-dir' if user_path(model_name).is_dir() else '':
            raise InputError(f'open_clip has no model {model_name!r}: write {f"{other}:{model_name}"!r}.')
        raise InputError(f'open_clip has no model {model_name!r}.{did_you_mean(model_name, open_clip.list_models())}')
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    pretrained = pretrained.strip()
    tag, _, file = (pretrained, '', '') if user_path(pretrained).is_file() else pretrained.partition('@')
    if pretrained == 'random':
        return None, {}
    if tag in tags and file == 'random':
        return None, open_clip.get_pretrained_cfg(model_name, tag)
    if tag in tags and not file:
        return tag, open_clip.get_pretrained_cfg(model_name, tag)
    path = user_path(file or pretrained)
    if not (file or pretrained) or not path.exists() or (file and tag not in tags):
        raise InputError(f'{pretrained!r} is neither a weights file nor a tag of {model_name}; its tags are '
                         f'{", ".join(tags)} (or "tag@file" for a file downloaded earlier).{did_you_mean(tag, tags)}')
    facts = [open_clip.get_pretrained_cfg(model_name, known) for known in ([tag] if file else tags)]
    if any((f.get('mean'), f.get('std'), f.get('quick_gelu')) !=
           (facts[0].get('mean'), facts[0].get('std'), facts[0].get('quick_gelu')) for f in facts):
        raise InputError(f'{path} does not say how its images were normalised, and the weights of {model_name} '
                         f'differ in that: write "tag@{path}" with one of {", ".join(tags)}.')
    return str(path), facts[0] if facts else {}


@contextmanager
def no_warnings_logged():
    """Silences open_clip's warnings of random weights that are meant to be random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def packed(vision_cfg):
    """open_clip's vision_cfg with transformer blocks that compute query, key and value in one product.
    Names, shapes and output are those of the default blocks, in which PyTorch's own attention copies the three apart. CoCa's
    towers then return one vector an image too, without the tokens that only their text decoder reads."""
    is_transformer = 'timm_model_name' not in vision_cfg and isinstance(vision_cfg.get('layers', 12), int)
    return vision_cfg | ({'block_type': 'custom', 'output_tokens': False} if is_transformer else {})


def local_folder(model_name):
    """The folder of 'local-dir:folder'. A relative one that is not below the current folder may be in the repository: runs
    of the demo name the miniature so, on any machine."""
    folder = user_path(model_name.removeprefix('local-dir:'))
    return REPOSITORY / folder if not folder.exists() and (REPOSITORY / folder).exists() else folder


def with_folder(model_name):
    """A name as open_clip finds it from the current folder: that of a 'local-dir:' has its local_folder."""
    return f'local-dir:{local_folder(model_name)}' if model_name.startswith('local-dir:') else model_name


def load_open_clip(model_name, pretrained, image_size=None, *, text=True):
    """open_clip's whole CLIP with weights, never silently random. text: False leaves out the text half of a file."""
    if model_name.startswith('local-dir:') and not local_folder(model_name).is_dir():
        raise InputError(f'There is no folder {local_folder(model_name)} of a model: check the path after local-dir:.')
    model_name = with_folder(model_name)
    random = pretrained == 'random' or pretrained.endswith('@random')
    source, facts, file = None, {}, None
    if not model_name.startswith(('local-dir:', 'hf-hub:')):
        source, facts = weights_source(model_name, pretrained)
        file = source if source not in open_clip.list_pretrained_tags_by_model(model_name) else None
    try:
        vision_cfg = packed(open_clip.get_model_config(model_name)['vision_cfg'])
        if model_name.startswith('local-dir:') and not random:
            file = model_name.removeprefix('local-dir:')
            whole = user_path(file) / 'open_clip_model.safetensors'  # which open_clip prefers too: publish adds a run's own
            file = whole if whole.is_file() else file
        whole = random or file  # open_clip itself loads nothing
        with no_warnings_logged() if whole else nullcontext():
            model = open_clip.create_model(
                model_name, pretrained=None if file else source, load_weights=not whole, require_pretrained=not whole,
                device=torch.get_default_device(), force_quick_gelu=facts.get('quick_gelu', False), pretrained_text=False,
                force_image_size=image_size if isinstance(vision_cfg.get('layers'), list) else None,  # a ResNet
                force_preprocess_cfg={name: facts[name] for name in ('mean', 'std') if facts.get(name)},
                **({'vision_cfg': vision_cfg} if 'block_type' in vision_cfg else {}))
        for block in model.visual.transformer.resblocks if random and 'block_type' in vision_cfg else ():
            nn.init.xavier_uniform_(block.attn.in_proj_weight)  # as in the default blocks; open_clip draws these too wide
        if file:
            load_clip(model, weights_file(file), image_size, text)
        elif image_size:
            resize_tower(model.visual, image_size)
        return model
    except (InputError, FileError):
        raise
    except Exception as error:  # damaged weights make open_clip raise almost anything
        reason = [*str(error).strip().splitlines(), type(error).__name__][0].rstrip('.')
        raise InputError(f'The weights {pretrained or model_name!r} do not load into {model_name}: {reason}.') from error


def load_clip(model, path, image_size, text):
    """Loads a file of weights into open_clip's CLIP, its image tower and, unless text is False, its text half."""
    tensors = {} if path.suffix == '.npz' else read_weights(path)[0]
    if path.suffix == '.npz' or any(name.startswith(MOBILE_CLIP) for name in tensors):
        open_clip.load_checkpoint(model, str(path))  # Google's and Apple's own files, which it converts
        state = model.visual.state_dict()
    else:
        state = tower_state(tensors, path, model.visual.state_dict())
        if text:
            load_text(model, tensors, path)
    load_resized(model.visual, state, path, image_size)


def load_text(model, tensors, path):
    """Loads the text half of a CLIP's tensors into open_clip's."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('visual.')}
    found = text_state(tensors, own)
    if not found:
        raise InputError(f'{path} holds no text tower: give a file of the whole CLIP.')
    check_fit(own, {name: own[name] for name in own if name.startswith('logit_')} | found, path)
    model.load_state_dict(found, strict=False)


def load_resized(tower, state, source, side):
    """Loads weights (load_strictly) at their own image size; then the tower takes squares of `side` pixels."""
    own = tower.state_dict()
    if side and any(name in own and own[name].shape != tensor.shape for name, tensor in state.items()):
        resize_tower(tower, side)  # fine-tuned at another size, mostly at the one that is asked for
    load_strictly(tower, state, source)
    if side:
        resize_tower(tower, side)


def load_image_tower(model_name, pretrained='', image_size=None):
    """The image half of a pretrained model, with its TowerSpec as `tower.spec`.
    model_name: an open_clip name, 'local-dir:folder', 'hf-hub:org/name', or 'timm:name'. pretrained: a tag, a file,
    'tag@file', 'random' or 'tag@random'. image_size: pixels; if not the weights' own, the position embedding is resized.
    Returns a module: normalised float (n, 3, s, s) -> (n, spec.width). ValueError: unknown name, tag or file, or weights
    that do not fit."""
    if model_name.startswith('timm:'):
        return load_timm_tower(model_name, pretrained, image_size)
    tower = load_open_clip(model_name, pretrained, image_size, text=False).visual
    config = open_clip.get_model_config(with_folder(model_name))
    quick = any(isinstance(module, QuickGELU) for module in tower.modules())
    own = isinstance(tower, VisionTransformer)
    size, facts = tower.image_size, tower.preprocess_cfg
    size = size[0] if isinstance(size, (tuple, list)) else size
    vision = config['vision_cfg'] | {'image_size': size, 'timm_model_pretrained': False}
    tower.spec = TowerSpec(model_name, pretrained, size, tuple(facts['mean']), tuple(facts['std']),
                           ('quick_gelu' if quick else 'gelu') if own else '', config['embed_dim'],
                           {'library': 'open_clip', 'embed_dim': config['embed_dim'], 'vision_cfg': vision,
                            'quick_gelu': quick})
    return tower


def load_timm_tower(model_name, pretrained, image_size=None):
    """A plain timm model without its classifier; see load_image_tower."""
    name = model_name.removeprefix('timm:')
    if name.split('.')[0] not in timm.list_models():
        raise InputError(f'timm has no model {name!r}.{did_you_mean(name, timm.list_models())}')
    file = user_path(pretrained) if pretrained and pretrained != 'random' else None
    if file and not file.exists():
        raise InputError(f'The weights file {pretrained} does not exist; pretrained="" asks timm for its own.')
    options = {'num_classes': 0}
    try:
        tower = timm.create_model(name, pretrained=not pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise InputError(f'The weights of timm:{name} could not be downloaded ({str(error).splitlines()[0]}): turn the '
                         f'internet on, or give a weights file as pretrained.') from None
    facts = timm.data.resolve_model_data_config(tower)
    size = image_size or facts['input_size'][-1]
    if file:
        file = weights_file(file)
        load_resized(tower, tower_state(read_weights(file)[0], file, tower.state_dict()), file, size)
    resize_tower(tower, size)
    with torch.inference_mode():
        width = tower.eval()(torch.zeros(1, 3, size, size)).shape[1]
    tower.spec = TowerSpec(model_name, pretrained, size, tuple(facts['mean']), tuple(facts['std']), '', width,
                           {'library': 'timm', 'name': name, 'options': options})
    return tower


def unloaded_tower(config):
    """The tower of a configuration with random weights, for a checkpoint that holds its own; nothing is downloaded."""
    tag = config.pretrained.partition('@')[0]
    known = tag in open_clip.list_pretrained_tags_by_model(config.model_name)
    tower = load_image_tower(config.model_name, f'{tag}@random' if known else 'random', config.image_size)
    tower.spec = replace(tower.spec, pretrained=config.pretrained)
    return tower


def tower_without_values(config):
    """unloaded_tower on the meta device: its shapes alone."""
    try:
        with torch.device('meta'):
            return unloaded_tower(config)
    except InputError:  # timm before 1.0.31 computes with some weights while it builds, such as RegNet's
        return unloaded_tower(config).to('meta')


def build_tower(spec):
    """The tower of a TowerSpec with random weights, to load our own into."""
    plan = spec.architecture
    if plan.get('library') == 'timm':
        tower = timm.create_model(plan['name'], pretrained=False, **plan['options'])
    elif plan.get('library') == 'open_clip':
        tower = open_clip.CLIP(plan['embed_dim'], packed(plan['vision_cfg']), NO_TEXT, quick_gelu=plan['quick_gelu']).visual
    else:
        raise InputError(f'{spec.model_name} cannot be rebuilt from its checkpoint alone; pass its tower along.')
    resize_tower(tower, spec.image_size, plan.get('stride'))
    tower.spec = spec
    return tower


def resize_tower(tower, side, stride=None):
    """Makes a tower take squares of `side` pixels, its patches `stride` pixels apart (None: as they are), in place.
    Position embeddings are interpolated to the new grid, as when weights are loaded at another size; convolutions take any
    size. A stride is for open_clip's own transformer."""
    if isinstance(tower, VisionTransformer):
        conv, old = tower.conv1, tower.positional_embedding
        conv.stride = (stride, stride) if stride else conv.stride
        tower.image_size, tower.grid_size = (side, side), ((side - conv.kernel_size[0]) // conv.stride[0] + 1,) * 2
        positions = resample_abs_pos_embed(old.detach()[None], list(tower.grid_size))[0]
        tower.positional_embedding = nn.Parameter(positions, requires_grad=old.requires_grad)
    elif hasattr(tower, 'set_input_size'):  # timm's transformers
        tower.set_input_size((side, side))


def unwrapped(tower):
    """(timm's model in open_clip's wrapper, the prefix of its parameters' names there), or (the tower itself, '')."""
    return (tower.trunk, 'trunk.') if hasattr(tower, 'trunk') else (tower, '')


def tower_blocks(tower):
    """({name: block of each parameter}, number of blocks); -1 comes before the blocks, their number after them.
    Blocks are the layers over which timm lets learning rates rise. InputError: the order of layers is unknown."""
    trunk, prefix = unwrapped(tower)
    kinds = [kind.__name__ for kind in type(trunk).__mro__]
    matcher = trunk.group_matcher() if hasattr(trunk, 'group_matcher') else next(
        (MATCHERS[kind] for kind in kinds if kind in MATCHERS), {})
    names = [name for name, _ in trunk.named_parameters()]
    layers = group_parameters(SimpleNamespace(named_parameters=lambda: [(name, name) for name in ['', *names]]), matcher,
                              reverse=True)
    depth = layers.pop('') - 1  # of a name that no pattern matches
    inside = [place for place, name in enumerate(names) if 0 < layers[name] <= depth and not STEM.match(name)]
    if not inside or any(layers[name] > depth for name in names[inside[0]:inside[-1]]):
        raise InputError(f'{kinds[0]} does not say in which order its layers come, so they cannot learn at different rates: '
                         f"give Config.layer_lrs one pair and Config.trains no 'last N', or take another tower.")
    early = {name for name in names[:inside[0]] if STEM.match(name)}
    blocks = {f'{prefix}{name}': -1 if name in early else layers[name] - 1 for name in names}
    return {name: blocks.get(name, depth) for name, _ in tower.named_parameters()}, depth


def block_modules(tower):
    """[the outermost modules that lie in one block each]; [] for a tower whose order of layers is unknown."""
    try:
        blocks, depth = tower_blocks(tower)
    except InputError:
        return []
    found = {}
    for name, module in tower.named_modules():
        inside = [block for key, block in blocks.items() if key.startswith(f'{name}.')]
        own = len(inside) == len(list(module.parameters()))  # none is shared with another module
        if own and len(set(inside)) == 1 and 0 <= inside[0] < depth and not isinstance(module, nn.ModuleList) and not any(
                name.startswith(f'{outer}.') for outer in found):
            found[name] = module
    return list(found.values())


def checkpoint_activations(tower):
    """Makes the tower recompute activations in the backward pass instead of keeping them, if it can."""
    if isinstance(tower, VisionTransformer):  # open_clip passes its packed blocks arguments that they do not take
        for block in tower.transformer.resblocks:
            block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)
        return
    try:
        tower.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm asserts that a model can
        print(f'{type(tower).__name__} cannot recompute activations; if memory runs out, lower batch_size.')
