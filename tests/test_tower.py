"""Towers, head, parameter groups: what is loaded, what is trained and how fast."""
import copy
import dataclasses
import json
from collections import Counter

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file

import utilities

MINIATURE = 'local-dir:media/miniature'


@pytest.fixture(scope='module')
def tower():
    return utilities.load_image_tower(MINIATURE)


def with_head(tower, n_classes=5):
    return utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, n_classes))


def test_the_miniature_is_open_clips_own_vision_transformer_with_the_shipped_weights(tower):
    assert type(tower) is open_clip.transformer.VisionTransformer
    shipped = load_file('media/miniature/open_clip_model.safetensors')
    assert torch.equal(tower.state_dict()['proj'], shipped['visual.proj'].float())
    assert tower.spec.image_size == 64 and tower.spec.activation == 'gelu'


def test_a_larger_image_size_resizes_the_position_embedding_only(tower):
    larger = utilities.load_image_tower(MINIATURE, image_size=96)
    changed = [name for name, tensor in larger.state_dict().items() if tensor.shape != tower.state_dict()[name].shape]
    assert changed == ['positional_embedding'] and len(larger.positional_embedding) == 6 * 6 + 1


@pytest.mark.parametrize('model_name, pretrained, words', [
    ('ViT-H-15', 'laion2b_s32b_b79k', 'Did you mean .*ViT-H-14'),
    ('ViT-H-14', 'laion3b', 'its tags are laion2b_s32b_b79k'),
    ('ViT-H-14', '', 'neither a weights file nor a tag'),
    ('ViT-L-14', __file__, 'tag@'),
    ('local-dir:nowhere', '', 'nowhere'),
    ('timm:efficientnet_light0', 'random', 'Did you mean'),
    ('timm:efficientnet_lite0', 'nowhere.pth', 'does not exist'),
])
def test_a_wrong_name_or_file_is_one_sentence(model_name, pretrained, words):
    with pytest.raises(ValueError, match=words) as error:
        utilities.load_image_tower(model_name, pretrained)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('model_name, tag, mean, quick', [
    ('ViT-H-14', 'laion2b_s32b_b79k', .48145466, None), ('ViT-L-14', 'laion2b_s32b_b82k', .5, None),
    ('ViT-L-14-336', 'openai', .48145466, True)])
def test_a_local_file_keeps_the_facts_of_the_recipes_tags(tmp_path, model_name, tag, mean, quick):
    (tmp_path / 'weights').touch()
    for file in (f'{tmp_path}/weights', 'random'):
        source, facts = utilities.weights_source(model_name, f'{tag}@{file}')
        assert source == (None if file == 'random' else file)
        assert facts['mean'][0] == pytest.approx(mean) and facts.get('quick_gelu') == quick


def test_a_timm_models_weights_file_loads_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / 'weights')
    tower = utilities.load_image_tower('timm:test_efficientnet', str(tmp_path / 'weights'), 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.allclose(tower(images), expected, atol=1e-6) and tower.spec.width == expected.shape[1]


def test_any_module_serves_as_a_tower():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    spec = utilities.TowerSpec('mine', '', 8, (.5,) * 3, (.5,) * 3, '', 6, {})
    vectors = utilities.Embedder(module, spec=spec)(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    assert vectors.shape == (4, 6) and torch.allclose(vectors.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match='TowerSpec'):
        utilities.Embedder(module)


def test_the_initial_head_depends_on_its_own_seed_alone():
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(utilities.SubcenterHead(8, 4, seed=5).state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]['centers'], utilities.SubcenterHead(8, 4, seed=6).centers)


def test_one_pass_with_the_mean_mask_equals_five_dropped_out_passes():
    head = utilities.SubcenterHead(64, 3, dim=16).train()
    features = torch.randn(32, 64)
    torch.manual_seed(1)
    mask = sum(torch.nn.functional.dropout(torch.ones_like(features), p) for p in head.DROPOUTS) / 5
    first = torch.nn.functional.dropout(features, .1)
    torch.manual_seed(1)
    masks = [torch.nn.functional.dropout(torch.ones_like(features), p) for p in head.DROPOUTS]
    torch.nn.functional.dropout(features, .1)
    five = sum(head.embedding(first * m) for m in masks) / 5
    torch.manual_seed(1)
    assert torch.allclose(five, head.embedding(first * mask), atol=1e-5)
    torch.manual_seed(1)
    assert torch.allclose(head(features), five, atol=1e-5)


def test_the_cosine_is_to_the_nearest_centre():
    head = utilities.SubcenterHead(4, 2, dim=4, subcenters=3)
    embedding = torch.randn(5, 4)
    every = torch.nn.functional.cosine_similarity(embedding[:, None], head.centers[None], dim=2)
    assert torch.allclose(head.cosine(embedding), every.view(5, 2, 3).amax(2), atol=1e-6)


def test_the_gradient_of_the_cosine_is_autograds_of_the_plain_formula():
    torch.manual_seed(0)
    head = utilities.SubcenterHead(4, 7, dim=6, subcenters=3)
    embedding, weights = torch.randn(5, 6, requires_grad=True), torch.randn(5, 7)
    head.centers.data *= torch.rand(21, 1) * 9 + .1  # of any length
    inputs = embedding, head.centers
    found = torch.autograd.grad((head.cosine(embedding) * weights).sum(), inputs)
    every = torch.nn.functional.cosine_similarity(embedding[:, None], head.centers[None], dim=2)
    expected = torch.autograd.grad((every.view(5, 7, 3).amax(2) * weights).sum(), inputs)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_a_last_block_of_the_class_token_alone_changes_neither_output_nor_gradients():
    torch.manual_seed(0)
    whole = utilities.load_open_clip(MINIATURE, '').visual
    tower = utilities.load_image_tower(MINIATURE)
    images = torch.randn(3, 3, 64, 64)
    for mode in (True, False):
        assert torch.allclose(tower.train(mode)(images), whole.train(mode)(images), atol=1e-5)
    for module in (tower, whole):
        module(images).square().sum().backward()
    for (name, one), other in zip(tower.named_parameters(), whole.parameters()):
        assert torch.allclose(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max()) + 1e-6), name


def test_a_tower_that_reads_every_token_keeps_its_last_block():
    for change in ({'pool_type': 'avg'}, {'attentional_pool': True}, {'output_tokens': True}):
        config = {'image_size': 32, 'patch_size': 16, 'layers': 2, 'width': 64, 'head_width': 64, **change}
        plan = {'library': 'open_clip', 'embed_dim': 32, 'vision_cfg': config, 'quick_gelu': False}
        tower = utilities.build_tower(utilities.TowerSpec('x', 'random', 32, (.5,) * 3, (.5,) * 3, 'gelu', 32, plan))
        assert type(tower.transformer.resblocks[-1]) is open_clip.transformer.ResidualAttentionBlock, change


def full_size(name, image_size=224, device='meta'):
    config = open_clip.get_model_config(name)
    spec = utilities.TowerSpec(name, 'random', image_size, (.5,) * 3, (.5,) * 3, 'gelu', config['embed_dim'], {
        'library': 'open_clip', 'embed_dim': config['embed_dim'],
        'vision_cfg': config['vision_cfg'] | {'image_size': image_size}, 'quick_gelu': False})
    with torch.device(device):
        return utilities.build_tower(spec)


@pytest.mark.parametrize('name, notebook, millions', [
    ('ViT-H-14', 'train_vit_h_224', 632), ('ViT-L-14', 'train_vit_l_336', 304), ('ViT-L-14-336', 'train_vit_l_336', 304)])
def test_the_real_towers_take_the_recipes_learning_rates(name, notebook, millions):
    config = configuration(notebook)
    model = with_head(full_size(name))
    groups = utilities.param_groups(model, config)
    assert round(sum(p.numel() for p in model.tower.parameters()) / 1e6) == millions
    names = Counter(name for group in groups for name in group['names'])
    assert set(names) == {name for name, _ in model.named_parameters()} and set(names.values()) == {1}
    for group in groups:
        for name, parameter in zip(group['names'], group['params']):
            block = utilities.BLOCK.search(name)
            expected = next(lr for end, lr in config.bands if int(block[1]) < end) if block else \
                config.head_lr if name.startswith('head') else \
                config.bands[-1][1] if 'ln_post' in name or 'proj' in name else config.bands[0][1]
            kept = parameter.ndim == 1 or 'embedding' in name.split('.')[-1]
            decay = 0 if kept else config.head_decay if name.startswith('head') else config.tower_decay
            assert (group['lr'], group['weight_decay']) == (expected, decay), name


def configuration(notebook):
    """The Config of a training notebook's configuration cell."""
    cells = json.load(open(f'{notebook}.ipynb'))['cells']
    source, = (''.join(cell['source']) for cell in cells if 'configuration' in cell['metadata'].get('tags', []))
    names = {'utilities': utilities}
    exec(source, names)
    return names['config']


TOWERS = {  # notebook: last block of each band, image size, tower by default, tower of the published run
    'train_vit_h_224': ((10, 20, 26, 32), 224, ('ViT-H-14', 'laion2b_s32b_b79k'), ('ViT-H-14', 'laion2b_s32b_b79k')),
    'train_vit_l_336': ((8, 16, 20, 24), 336, ('ViT-L-14', 'laion2b_s32b_b82k'), ('ViT-L-14-336', 'openai'))}


def test_unknown_words_are_reported(capsys):
    encode = utilities.load_text_tower(MINIATURE)
    vectors = encode(['hot dog', 'hot zyzzyva'])
    assert vectors.shape == (2, utilities.load_image_tower(MINIATURE).spec.width)
    assert '1 words are unknown' in capsys.readouterr().out


@pytest.mark.parametrize('share, k', [(.2, 4), (.5, 10), (.01, 3)])
def test_a_share_of_the_classes_holds_those_of_the_batch_and_has_their_loss_and_gradient(share, k):
    head, margins = utilities.SubcenterHead(6, 20, dim=8), utilities.adaptive_margins(torch.arange(20) + 4)
    embedding, labels = torch.randn(5, 8), torch.tensor([7, 3, 7, 19, 3])
    drawn = [utilities.some_classes(labels, 20, share) for _ in range(50)]
    for classes, renamed in drawn:
        assert len(classes) == k and classes.tolist() == sorted(set(classes.tolist()))
        assert torch.equal(classes[renamed], labels)
    assert share == .01 or {int(one) for classes, _ in drawn for one in classes} == set(range(20))
    classes, renamed = drawn[0]
    expected = head.cosine(embedding)[:, classes]
    assert torch.allclose(head.cosine(embedding, classes), expected, atol=1e-6)
    losses = [utilities.arcface_loss(cosine, renamed, margins[classes]) for cosine in (
        head.cosine(embedding, classes), expected)]
    found, reference = (torch.autograd.grad(loss, head.centers)[0] for loss in losses)
    assert torch.allclose(found, reference, atol=1e-6)
    absent = sorted(set(range(20)) - set(classes.tolist()))
    assert not found.unflatten(0, (-1, 3))[absent].any()
    assert utilities.some_classes(labels, 20, 1)[0] is None


@pytest.mark.parametrize('choice', [{'head_norm': True}, {'distil': 1.}])
def test_what_compares_the_photographs_of_a_batch_keeps_it(choice):
    with pytest.raises(ValueError, match='give more'):
        utilities.Config(batch_size=1, **choice)
    plans = list(utilities.smaller_plans(utilities.Config(**choice), 2))
    assert plans == [{'checkpoint_activations': True}, {'checkpoint_activations': True, 'shard': True}]
    assert {'checkpoint_activations': True, 'batch_size': 1} in utilities.smaller_plans(utilities.Config(), 2)


@pytest.mark.parametrize('name, depth', [('timm:resnet18', 5), ('timm:convnext_atto', 4)])
def test_a_tower_of_few_blocks_ends_in_the_last_band_and_begins_in_the_first(name, depth):
    model, config = with_head(utilities.load_image_tower(name, 'random', 64)), utilities.Config()
    blocks, found = utilities.tower_blocks(model.tower)
    groups = utilities.param_groups(model, config)
    rates = {full.removeprefix('tower.'): group['lr'] for group in groups for full in group['names']}
    assert found == depth
    assert {rates[key] for key, block in blocks.items() if block >= depth - 1} == {1e-5}
    assert {rates[key] for key, block in blocks.items() if block < 0} == {1.25e-6}


def test_timms_weights_that_cannot_be_had_are_one_sentence(monkeypatch):
    def offline(name, pretrained, **options):
        raise OSError('cannot reach the hub\nwith a traceback')
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(ValueError, match='weights of timm:resnet18 could not be had .cannot reach the hub.: turn') as error:
        utilities.load_image_tower('timm:resnet18')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('pool_type, ask', [('tok', 'class token'), ('avg', 'all tokens')])
def test_a_quickened_tower_has_the_output_and_the_gradients_of_open_clips(pool_type, ask):
    torch.manual_seed(0)
    plain = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 2, 4., pool_type=pool_type, output_dim=16)
    quick = utilities.quicken(copy.deepcopy(plain))
    assert {type(block.attn) for block in quick.transformer.resblocks} == {utilities.PackedAttention}
    assert (type(quick.transformer.resblocks[-1]) is utilities.ClassTokenBlock) == (ask == 'class token')
    images = torch.randn(3, 3, 32, 32)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(quick.train(mode)(images), plain.train(mode)(images), rtol=1e-5, atol=1e-6)
    for tower in (plain, quick):
        tower(images).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), quick.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)
