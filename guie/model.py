"""Model: the head, the Embedder that joins it to a tower, ensembles of them, and which parameter learns how fast."""
import bisect
import copy
import math
import re
from dataclasses import replace
from fnmatch import fnmatch

import pandas as pd
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from guie.errors import InputError
from guie.towers import load_image_tower, resize_tower, tower_blocks, unwrapped

UNDECAYED = re.compile(r'(embedding|pos_emb\w*|_token|latent|bias_table|attention_biases|rel_pos_[hw]|(height|width)_rel)$')


class SubcenterHead(nn.Module):
    """Linear map to the embedding and several centres a class (Deng 2020, sub-centre ArcFace).
    `seed` alone decides the initial weights: ingredients of one soup must share them bit for bit. norm: batch normalisation
    of the features, without weights, before the map (5th place)."""
    DROPOUTS = (.1, .2, .3, .4, .5)  # the five parallel masks of the published head, after one of .1

    def __init__(self, width, n_classes, *, dim=512, subcenters=3, norm=False, seed=5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.subcenters = subcenters
        self.norm = nn.BatchNorm1d(width, affine=False) if norm else nn.Identity()
        self.embedding = nn.Linear(width, dim, bias=False)
        self.centers = nn.Parameter(torch.empty(n_classes * subcenters, dim))  # row = class · subcenters + centre
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5), generator=generator)
        nn.init.xavier_uniform_(self.centers, generator=generator)

    def forward(self, features):
        """(n, width) -> embedding (n, dim), not normalised; dropout while training.
        The published head averages five dropped-out copies after the bias-free map; one pass of their mean is the same."""
        features = self.norm(features)
        if self.training:
            mask = sum(F.dropout(torch.ones_like(features), p) for p in self.DROPOUTS) / len(self.DROPOUTS)
            features = F.dropout(features, .1) * mask
        return self.embedding(features)

    def cosine(self, embedding):
        """(n, dim) -> cosine to the nearest centre of every class, float32 (n, n_classes)."""
        with torch.autocast(embedding.device.type, enabled=False):  # a cosine near 1 has no digits left in fp16
            centers = self.centers.float()  # not normalised, which would copy all of them
            cosine = F.normalize(embedding.float()) @ centers.T / centers.norm(dim=1).clamp_min(1e-12)
        return cosine.unflatten(1, (-1, self.subcenters)).amax(2)


class Embedder(nn.Module):
    """Images to unit vectors: normalise, tower, head's linear map, L2, projection, L2.
    tower: any module that maps float (n, 3, s, s) to (n, width). spec: needed if there is no tower.spec. head: SubcenterHead
    or None. projection: nn.Linear or None."""

    def __init__(self, tower, head=None, projection=None, spec=None):
        super().__init__()
        spec = spec or getattr(tower, 'spec', None)
        if spec is None:
            raise InputError('The tower does not say its image size, mean and std: pass spec=guie.towers.TowerSpec(…).')
        self.tower, self.head, self.projection, self.spec = tower, head, projection, spec
        self.register_buffer('mean', torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images, classify=False):
        """uint8 or float 0..255 (n, 3, s, s) -> float32 (n, dim) of length 1; classify: cosines (n, n_classes)."""
        features = self.tower((images.float() - self.mean) / self.std)
        return self.head.cosine(self.head(features)) if classify else self.project(features.float())

    def train(self, mode=True):
        """As nn.Module's, but a tower's BatchNorm keeps its pretrained statistics: those of a few images at a time are
        noise, and ruin the tower."""
        super().train(mode)
        for module in self.tower.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
                module.eval()
        return self

    def project(self, features):
        """What follows the tower: (n, width) -> (n, dim) of length 1."""
        vectors = F.normalize(self.head.embedding(self.head.norm(features)) if self.head is not None else features)
        return vectors if self.projection is None else F.normalize(self.projection(vectors))


class Ensemble(nn.Module):
    """Several Embedders whose unit vectors are joined and projected together.
    members: Embedders, each fed at its own spec.image_size. projection: nn.Linear that was fitted on `concatenate` of their
    vectors, or None."""

    def __init__(self, members, projection=None):
        super().__init__()
        self.members, self.projection = nn.ModuleList(members), projection

    def forward(self, images):
        """uint8 or float 0..255 (n, 3, H, W) -> float32 (n, dim) of length 1."""
        return self.join([member(resized(images.type_as(member.mean), member.spec.image_size)) for member in self.members])

    def join(self, parts):
        """The members' unit vectors, a tensor (n, d) each -> (n, dim) of length 1."""
        vectors = torch.cat(parts, 1)
        return F.normalize(vectors if self.projection is None else self.projection(vectors))


def resized(images, side):
    """Float images 0..255 (n, 3, H, W) -> (n, 3, side, side), squashed by antialiased bicubic interpolation.
    Its curves leave 0..255 and are clipped, as in Pillow, but not rounded: the last digit, which differs between versions of
    torch, would now and then decide on a whole grey level."""
    return F.interpolate(images, (side, side), mode='bicubic', antialias=True).clamp(0, 255)


def new_model(config, n_classes):
    """The Embedder that a run starts from: the pretrained tower and a new head for so many classes."""
    tower = load_image_tower(config.model_name, config.pretrained, config.image_size)
    head = SubcenterHead(tower.spec.width, n_classes, dim=config.embedding_dim, subcenters=config.subcenters,
                         norm=config.head_norm, seed=config.head_seed)
    model = Embedder(tower, head)
    resize(model, config.image_size, config.overlap)
    return model


def whole_patches(tower, side):
    """The side nearest to `side` that a tower's patches cover to its edges. A tower without patches, whose first convolution
    pads the image or has small steps, takes any."""
    stem = next((part for part in tower.modules() if isinstance(part, nn.Conv2d)), None)
    if stem is None or stem.padding != (0, 0) or stem.stride[0] < 4:
        return side
    (kernel, _), (stride, _) = stem.kernel_size, stem.stride
    return kernel + round((side - kernel) / stride) * stride


def resize(model, side, overlap=0.0):
    """Changes the Embedder, in place, to another side or to patches that overlap by a share of their side; its spec says so.
    ValueError: an overlap for a tower other than open_clip's own transformer."""
    plan, stride = copy.deepcopy(model.spec.architecture), None
    if isinstance(model.tower, VisionTransformer):
        patch = model.tower.conv1.kernel_size[0]
        stride = max(1, round(patch * (1 - overlap)))
        same = stride == plan.get('stride', patch) and side == model.spec.image_size
        plan['stride'] = stride
    elif overlap:
        raise InputError(f"Config.overlap is {overlap}, but only patches of open_clip's own transformers can overlap, and "
                         f'{model.spec.model_name} is none of them: set it to 0.')
    else:
        same = side == model.spec.image_size
    if same:
        return
    resize_tower(model.tower, side, stride)
    if plan.get('library') == 'open_clip':
        plan['vision_cfg']['image_size'] = side
    model.spec = model.tower.spec = replace(model.spec, image_size=side, architecture=plan)


def freeze(model, trains):
    """Takes the gradients from what Config.trains leaves out; 'all' changes nothing."""
    if trains in ('head', 'cached head', 'tower'):
        (model.head if trains == 'tower' else model.tower).requires_grad_(False)
    elif trains != 'all':
        (blocks, depth), count = tower_blocks(model.tower), int(trains.removeprefix('last '))
        if count > depth:
            raise InputError(f'Config.trains is {trains!r}, but the tower has {depth} blocks.')
        for name, parameter in model.tower.named_parameters():
            if blocks[name] < depth - count:
                parameter.requires_grad_(False)


def kept_from_decay(tower):
    """Names of a tower's parameters without weight decay, which would only harm them: biases, norms and all else of one
    dimension, tokens, position embeddings, tables of relative positions, and what timm names (no_weight_decay)."""
    trunk, prefix = unwrapped(tower)
    patterns = [f'{prefix}{name}' for name in (trunk.no_weight_decay() if hasattr(trunk, 'no_weight_decay') else ())]
    return {name for name, parameter in tower.named_parameters() if parameter.ndim < 2 or UNDECAYED.search(name)
            or any(fnmatch(name, pattern) for pattern in patterns)}


def param_groups(model, config):
    """AdamW's groups for an Embedder: every trainable parameter in exactly one.
    The tower's blocks take the learning rates of config.layer_lrs, stretched if the tower has another number of blocks. What
    comes before the blocks takes the first rate; what follows them (final norm, projection) takes the last one. Parameters
    in kept_from_decay have no weight decay. Returns a list of dicts: name, params, names, lr, weight_decay. InputError:
    several rates for a tower whose order of layers is unknown."""
    ends, groups = [end for end, _ in config.layer_lrs], {}
    tower = [(name, parameter) for name, parameter in model.tower.named_parameters() if parameter.requires_grad]
    blocks, depth = tower_blocks(model.tower) if tower and len(ends) > 1 else (dict.fromkeys(dict(tower), 0), ends[0])
    kept = kept_from_decay(model.tower)

    def add(group, name, parameter, lr, weight_decay, decays):
        group, weight_decay = (group, weight_decay) if decays else (f'{group}, no decay', 0.0)
        entry = groups.setdefault(group, {'name': group, 'params': [], 'names': [], 'lr': lr, 'weight_decay': weight_decay})
        entry['params'].append(parameter)
        entry['names'].append(name)

    for name, parameter in tower:
        middle = (max(blocks[name], 0) + .5) * ends[-1] / depth  # of the block, among those that layer_lrs counts
        place = min(bisect.bisect_right(ends, middle), len(ends) - 1)  # what follows the blocks lies beyond the last
        add(f'tower, blocks below {math.ceil(ends[place] * depth / ends[-1] - .5)}', f'tower.{name}', parameter,
            config.layer_lrs[place][1], config.tower_weight_decay, name not in kept)
    for name, parameter in ([] if model.head is None else model.head.named_parameters()):
        if parameter.requires_grad:
            apart = name == 'centers' and config.class_lr is not None
            add('classes' if apart else 'head', f'head.{name}', parameter, config.class_lr if apart else config.head_lr,
                config.head_weight_decay, parameter.ndim > 1)
    return list(groups.values())


def group_table(model, config):
    """DataFrame of param_groups, a row a group: tensors, learning rate, parameters (millions), weight decay, and the names
    of the first and the last tensor, without 'tower.' and 'transformer.'."""
    rows = []
    for group in param_groups(model, config):
        first, last = (group['names'][place].removeprefix('tower.').removeprefix('transformer.') for place in (0, -1))
        rows.append({'group': group['name'], 'tensors': len(group['params']), 'lr': group['lr'],
                     'parameters (M)': sum(parameter.numel() for parameter in group['params']) / 1e6,
                     'weight decay': group['weight_decay'], 'from': first, 'to': last})
    return pd.DataFrame(rows).set_index('group')
