"""Head, Embedder, parameter groups: what is computed, what is trained and how fast."""
import copy
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

from guie.checkpoints import load_run, save_run
from guie.config import Config
from guie.model import Embedder, SubcenterHead, freeze, group_table, kept_from_decay, new_model, param_groups, resize
from guie.towers import TowerSpec, load_image_tower, resize_tower, tower_blocks
from tests.families import FAMILIES, REFUSED, VARIANTS, on_meta
from tests.runs import is_one_sentence

MINIATURE = 'local-dir:media/miniature'
CONFIG = Config(model_name=MINIATURE, pretrained='', image_size=32, embedding_dim=32)
LARGE = Config(model_name='ViT-L-14', layer_lrs=((8, 1.25e-6), (16, 2.5e-6), (20, 5e-6), (24, 1e-5)))


def with_head(tower, n_classes=5):
    return Embedder(tower, SubcenterHead(tower.spec.width, n_classes))


def test_the_initial_head_depends_on_its_own_seed_alone():
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(SubcenterHead(8, 4, seed=5).state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]['centers'], SubcenterHead(8, 4, seed=6).centers)


def test_one_pass_with_the_mean_mask_equals_five_dropped_out_passes():
    head = SubcenterHead(64, 3, dim=16).train()
    features = torch.randn(32, 64)
    torch.manual_seed(1)
    masks = [F.dropout(torch.ones_like(features), p) for p in (.1, .2, .3, .4, .5)]
    first = F.dropout(features, .1)
    five = sum(head.embedding(first * mask) for mask in masks) / 5
    torch.manual_seed(1)
    assert torch.allclose(head(features), five, atol=1e-5)
    assert torch.equal(head.eval()(features), head.embedding(features))


def test_the_cosine_is_to_the_nearest_centre():
    head = SubcenterHead(4, 2, dim=4, subcenters=3)
    embedding = torch.randn(5, 4)
    every = F.cosine_similarity(embedding[:, None], head.centers[None], dim=2)
    assert torch.allclose(head.cosine(embedding), every.view(5, 2, 3).amax(2), atol=1e-6)


def test_the_gradient_of_the_cosine_is_autograds_of_the_plain_formula():
    torch.manual_seed(0)
    head = SubcenterHead(4, 7, dim=6, subcenters=3)
    embedding, weights = torch.randn(5, 6, requires_grad=True), torch.randn(5, 7)
    head.centers.data *= torch.rand(21, 1) * 9 + .1  # of any length
    inputs = embedding, head.centers
    found = torch.autograd.grad((head.cosine(embedding) * weights).sum(), inputs)
    every = F.cosine_similarity(embedding[:, None], head.centers[None], dim=2)
    expected = torch.autograd.grad((every.view(5, 7, 3).amax(2) * weights).sum(), inputs)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_the_cosine_keeps_its_digits_under_mixed_precision():
    head = SubcenterHead(8, 5, dim=32)
    embedding = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cosine = head.cosine(embedding)
        half = head.cosine(embedding.bfloat16())
    assert cosine.dtype == half.dtype == torch.float32
    assert torch.allclose(cosine, head.cosine(embedding), atol=1e-6)


def test_a_normalised_head_is_batch_norm_and_linear_map_and_comes_back_from_its_file(tmp_path):
    config = CONFIG.override(head_norm=True)
    model = new_model(config, 5).train()
    features = torch.randn(64, model.spec.width) * 3 + 1
    torch.manual_seed(0)
    model.head(features)  # trained on once
    head = model.head
    assert head.norm.running_mean.abs().max() > 0 and not list(head.norm.parameters())
    scaled = (features - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt()
    expected = F.normalize(scaled @ head.embedding.weight.T)
    assert torch.allclose(model.eval().project(features), expected, atol=1e-5)
    save_run(tmp_path / 'run', model, config)
    assert torch.equal(load_run(tmp_path / 'run').project(features), model.project(features))


def test_an_embedder_normalises_pixels_and_every_vector_on_the_way():
    class Mean(nn.Module):
        spec = TowerSpec('mean', '', 4, (.1, .2, .3), (.5, .4, .2), '', 3, {})

        def forward(self, images):
            return images.mean((2, 3))

    head, projection = SubcenterHead(3, 2, dim=4), nn.Linear(4, 2)
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    features = (images.double() / 255).mean((2, 3))
    features = ((features - torch.tensor([.1, .2, .3])) / torch.tensor([.5, .4, .2])).float()
    embedded = F.normalize(features @ head.embedding.weight.T)
    for model, expected in ((Embedder(Mean()), F.normalize(features)), (Embedder(Mean(), head), embedded),
                            (Embedder(Mean(), head, projection), F.normalize(projection(embedded)))):
        found = model.eval()(images)
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(model(images, classify=True), head.cosine(embedded), atol=1e-5)


def test_any_module_serves_as_a_tower_that_says_its_facts():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    spec = TowerSpec('mine', '', 8, (.5,) * 3, (.5,) * 3, '', 6, {})
    vectors = Embedder(module, spec=spec)(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    assert vectors.shape == (4, 6) and torch.allclose(vectors.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match='TowerSpec'):
        Embedder(module)


def test_a_towers_batch_norm_keeps_its_pretrained_statistics_and_the_heads_does_not():
    config = CONFIG.override(model_name='timm:test_efficientnet', pretrained='random', head_norm=True)
    model = new_model(config, 5).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), classify=True).sum().backward()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {'head.norm.running_mean', 'head.norm.running_var', 'head.norm.num_batches_tracked'}
    assert model.tower.bn1.weight.grad is not None and not model.eval().training  # they learn all the same


def full_size(name):
    with torch.device('meta'):
        return with_head(load_image_tower(name, 'random'))


@pytest.mark.parametrize('name, config, millions', [
    ('ViT-H-14', Config(), 632), ('ViT-L-14', LARGE, 304), ('ViT-L-14-336', LARGE, 304)])
def test_the_real_towers_take_the_recipes_learning_rates(name, config, millions):
    model = full_size(name)
    groups = param_groups(model, config)
    assert round(sum(p.numel() for p in model.tower.parameters()) / 1e6) == millions
    names = Counter(name for group in groups for name in group['names'])
    assert set(names) == {name for name, _ in model.named_parameters()} and set(names.values()) == {1}
    for group in groups:
        for name, parameter in zip(group['names'], group['params']):
            block = re.search(r'resblocks\.(\d+)', name)
            expected = next(lr for end, lr in config.layer_lrs if int(block[1]) < end) if block else \
                config.head_lr if name.startswith('head') else \
                config.layer_lrs[-1][1] if 'ln_post' in name or 'proj' in name else config.layer_lrs[0][1]
            kept = parameter.ndim == 1 or 'embedding' in name.split('.')[-1]
            decay = 0 if kept else config.head_weight_decay if name.startswith('head') else config.tower_weight_decay
            assert (group['lr'], group['weight_decay']) == (expected, decay), name
            assert parameter is model.get_parameter(name)


@pytest.mark.parametrize('name', ['ViT-SO400M-16-SigLIP2-384', 'EVA02-L-14-336', 'PE-Core-L-14-336',
                                  'timm:vit_large_patch14_dinov2', 'timm:vit_large_patch16_dinov3'])
def test_blocks_of_any_tower_take_the_rates_of_as_many_blocks_as_it_has(name):
    model, config = full_size(name), Config()  # four rates, of 32 blocks
    blocks, depth = tower_blocks(model.tower)
    groups = param_groups(model, config)
    names = Counter(name for group in groups for name in group['names'])
    assert set(names) == {name for name, _ in model.named_parameters()} and set(names.values()) == {1}
    for group in groups:
        for full, parameter in zip(group['names'], group['params']):
            if full.startswith('tower.'):
                block = min(max(blocks[full[6:]], 0), depth - 1)
                assert group['lr'] == next(lr for end, lr in config.layer_lrs if block + .5 < end * depth / 32), full
                kept = parameter.ndim == 1 or full.endswith(('embedding', 'pos_embed', '_token', 'latent'))
                assert group['weight_decay'] == (0 if kept else config.tower_weight_decay), full


@pytest.mark.parametrize('name, depth', [('timm:resnet18', 8), ('timm:convnext_atto', 12)])
def test_a_tower_of_few_blocks_begins_with_the_first_rate_and_ends_with_the_last(name, depth):
    model = with_head(load_image_tower(name, 'random', 64))
    blocks, found = tower_blocks(model.tower)
    rates = {full.removeprefix('tower.'): group['lr'] for group in param_groups(model, Config()) for full in group['names']}
    assert found == depth
    assert {rates[key] for key, block in blocks.items() if block >= depth - 1} == {1e-5}
    assert {rates[key] for key, block in blocks.items() if block < 0} == {1.25e-6}


@pytest.mark.parametrize('name', [*FAMILIES, *VARIANTS])
def test_a_familys_decay_is_timms_own_and_its_rates_rise_with_the_blocks(name):
    tower = on_meta(name)
    spec = TowerSpec(name, '', 32, (.5,) * 3, (.5,) * 3, '', 8, {})
    one_rate = param_groups(Embedder(tower, spec=spec), Config(layer_lrs=((7, 1e-4),), tower_weight_decay=.1))
    names = {id(parameter): key for key, parameter in tower.named_parameters() if parameter.requires_grad}
    kept = {full.removeprefix('tower.') for group in one_rate if not group['weight_decay'] for full in group['names']}
    patterns = tower.no_weight_decay() if hasattr(tower, 'no_weight_decay') else ()
    of_timm = param_groups_weight_decay(tower, .1, no_weight_decay_list=patterns)
    theirs = {names[id(parameter)] for group in of_timm if not group['weight_decay'] for parameter in group['params']}
    assert theirs <= kept and sum(len(group['names']) for group in one_rate) == len(names)
    assert [key for key in kept - theirs if not re.search(  # tokens and positions that timm's lists leave out
        r'(_token|latent|pos_emb\w*|pos_embed\.\w+_rel|rel_pos_[hw]|_bias_table|attention_biases)$', key)] == []
    if name in REFUSED:
        with pytest.raises(ValueError, match=f'^{type(tower).__name__} does not say in which order'):
            param_groups(Embedder(tower, spec=spec), Config())
        return
    groups, (blocks, depth) = param_groups(Embedder(tower, spec=spec), Config()), tower_blocks(tower)
    rates = {full.removeprefix('tower.'): group['lr'] for group in groups for full in group['names']}
    in_order = [rates[key] for key in sorted(rates, key=blocks.get)]
    assert in_order == sorted(in_order) and in_order[0] == 1.25e-6 and in_order[-1] == 1e-5
    assert {rate for key, rate in rates.items() if blocks[key] < 0} == {1.25e-6}
    assert {rate for key, rate in rates.items() if blocks[key] >= depth - 1} == {1e-5}


@pytest.mark.parametrize('name', ['swin_base_patch4_window7_224', 'PE-Core-T-16-384', 'EVA02-B-16', 'ViT-B-16-SigLIP'])
def test_what_timm_does_not_decay_is_not_decayed_in_open_clips_wrapper(name):
    tower = full_size(name).tower
    plain = on_meta(tower.spec.architecture['vision_cfg']['timm_model_name'])
    found = {key.removeprefix('trunk.') for key in kept_from_decay(tower)}
    assert plain.no_weight_decay() & {key for key, _ in tower.trunk.named_parameters()} <= found
    assert ('layers.0.blocks.0.attn.relative_position_bias_table' in found) == ('swin' in name)


@pytest.mark.parametrize('tower', [
    nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6)), nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten()),
    nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 6)), nn.Linear(8, 6)])
def test_a_tower_of_ones_own_learns_at_one_rate_and_is_refused_several(tower):
    spec = TowerSpec('mine', '', 8, (.5,) * 3, (.5,) * 3, '', 6, {})
    one, several = Config(layer_lrs=((6, 1e-4),)), Config()
    model = Embedder(tower, SubcenterHead(6, 4, dim=5), spec=spec)
    groups = {full: group['lr'] for group in param_groups(model, one) for full in group['names']}
    assert {rate for full, rate in groups.items() if full.startswith('tower.')} == {1e-4}
    assert set(groups) == {full for full, _ in model.named_parameters()}
    for asked in (lambda: param_groups(model, several), lambda: freeze(model, 'last 1')):
        with pytest.raises(ValueError, match=f'^{type(tower).__name__} does not say in which order') as error:
            asked()
        assert is_one_sentence(error)
    freeze(model, 'head')  # then the tower has no rate
    assert [group['name'] for group in param_groups(model, several)] == ['head']


def test_the_table_of_groups_counts_every_parameter_once():
    model = new_model(CONFIG, 5)
    table, groups = group_table(model, CONFIG), param_groups(model, CONFIG)
    assert table.index.tolist() == [group['name'] for group in groups] and table.index.is_unique
    assert table['parameters (M)'].sum() == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    assert table['tensors'].sum() == len(list(model.parameters()))
    assert table.loc['head', ['lr', 'weight decay', 'from', 'to']].tolist() == [
        CONFIG.head_lr, CONFIG.head_weight_decay, 'head.centers', 'head.embedding.weight']
    assert 'resblocks.5.mlp.c_proj.weight' in table['to'].tolist()  # short enough for a narrow page


@pytest.mark.parametrize('trains, moving', [
    ('all', '.'), ('head', r'head\.'), ('cached head', r'head\.'), ('tower', r'tower\.'),
    ('last 2', r'head\.|tower\.(proj|ln_post|transformer\.resblocks\.[45]\.)'),
    ('last 6', r'head\.|tower\.(proj|ln_post|transformer)')])
def test_what_is_frozen_has_no_gradient_and_is_in_no_group(trains, moving):
    model = new_model(CONFIG, 5)
    freeze(model, trains)
    expected = {name for name, _ in model.named_parameters() if re.match(moving, name)}
    model(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), classify=True).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert {name for group in param_groups(model, CONFIG) for name in group['names']} == expected


def test_the_classes_learn_at_a_rate_of_their_own_if_they_have_one():
    model = new_model(CONFIG, 5)
    groups = {group['name']: group for group in param_groups(model, CONFIG.override(class_lr=.5))}
    assert (groups['classes']['names'], groups['classes']['lr']) == (['head.centers'], .5)
    assert (groups['head']['names'], groups['head']['lr']) == (['head.embedding.weight'], CONFIG.head_lr)
    assert 'classes' not in {group['name'] for group in param_groups(model, CONFIG)}


def test_more_blocks_than_there_are_cannot_be_trained():
    with pytest.raises(ValueError, match="'last 7', but the tower has 6 blocks"):
        freeze(new_model(CONFIG, 12), 'last 7')


def test_a_new_model_has_the_configurations_head_and_the_pretrained_tower():
    config = CONFIG.override(subcenters=2, head_seed=9, image_size=64)
    model = new_model(config, 7)
    same = SubcenterHead(model.spec.width, 7, dim=32, subcenters=2, seed=9)
    assert model.head.centers.shape == (14, 32) and torch.equal(model.head.centers, same.centers)
    assert all(torch.equal(tensor, model.tower.state_dict()[name])
               for name, tensor in load_image_tower(MINIATURE).state_dict().items())


def test_overlapping_patches_are_those_of_the_image_cut_at_a_smaller_stride(tmp_path):
    config = CONFIG.override(overlap=.5)
    model, plain = new_model(config, 5).eval(), new_model(CONFIG, 5)
    assert model.tower.positional_embedding.shape[0] == 3 * 3 + 1 and model.tower.conv1.stride == (8, 8)
    assert plain.tower.positional_embedding.shape[0] == 2 * 2 + 1
    assert torch.equal(model.tower.conv1.weight, plain.tower.conv1.weight)
    image = torch.rand(1, 3, 32, 32)
    patches = model.tower.conv1(image)
    assert torch.allclose(patches[:, :, 1, 2], plain.tower.conv1(image[:, :, 8:24, 16:32])[:, :, 0, 0], atol=1e-6)
    save_run(tmp_path / 'run', model, config)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(load_run(tmp_path / 'run')(images), model(images))


def test_a_tower_resized_is_the_tower_loaded_at_that_size():
    first = new_model(CONFIG.override(image_size=64), 5)
    resize(first, 96)
    loaded = load_image_tower(MINIATURE, image_size=96)
    assert torch.allclose(first.tower.positional_embedding, loaded.positional_embedding, atol=1e-5)
    assert first.spec.image_size == first.tower.spec.image_size == 96
    assert first.spec.architecture['vision_cfg']['image_size'] == 96
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.allclose(first.tower.eval()(images), loaded.eval()(images), atol=1e-4)


def test_a_resized_tower_keeps_what_is_frozen_and_a_resize_to_the_same_changes_nothing():
    model = new_model(CONFIG, 5)
    freeze(model, 'head')
    before = model.tower.positional_embedding
    resize(model, 32)
    assert model.tower.positional_embedding is before
    resize_tower(model.tower, 64)
    assert not model.tower.positional_embedding.requires_grad and len(model.tower.positional_embedding) == 17


def test_only_open_clips_own_transformers_can_have_overlapping_patches():
    config = CONFIG.override(model_name='timm:test_efficientnet', pretrained='random', overlap=.5)
    with pytest.raises(ValueError, match='overlap is 0.5, but only .*test_efficientnet'):
        new_model(config, 5)
