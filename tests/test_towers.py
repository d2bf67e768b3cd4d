"""Towers by name, from open_clip and timm: what is found from the model, and that ours are open_clip's own, only faster."""
import copy
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file
from timm.models import group_parameters

from guie import towers
from guie.checkpoints import load_run, open_checkpoint, save_run
from guie.config import Config
from guie.errors import InputError
from guie.model import Embedder, SubcenterHead, resize
from guie.soups import average_states, save_soup
from guie.submission import export_submission
from guie.towers import (
    NO_TEXT,
    TowerSpec,
    block_modules,
    build_tower,
    checkpoint_activations,
    load_image_tower,
    packed,
    tower_blocks,
    weights_source,
)
from guie.training import fit
from tests.families import FAMILIES, REFUSED, VARIANTS, FirstUses, on_meta
from tests.runs import is_one_sentence, same

MINIATURE = 'local-dir:media/miniature'


@pytest.fixture(scope='module')
def tower():
    return load_image_tower(MINIATURE)


def test_the_miniature_is_open_clips_own_vision_transformer_with_the_shipped_weights(tower):
    assert type(tower) is VisionTransformer
    shipped = load_file('media/miniature/open_clip_model.safetensors')
    assert set(tower.state_dict()) == {name.removeprefix('visual.') for name in shipped if name.startswith('visual.')}
    assert all(torch.equal(tensor, shipped[f'visual.{name}'].float()) for name, tensor in tower.state_dict().items())
    assert tower.spec.image_size == 64 and tower.spec.activation == 'gelu'


def test_a_larger_image_size_resizes_the_position_embedding_only(tower):
    larger = load_image_tower(MINIATURE, image_size=96)
    changed = [name for name, tensor in larger.state_dict().items() if tensor.shape != tower.state_dict()[name].shape]
    assert changed == ['positional_embedding'] and len(larger.positional_embedding) == 6 * 6 + 1


@pytest.mark.parametrize('model_name, pretrained, words', [
    ('ViT-H-15', 'laion2b_s32b_b79k', 'Did you mean .*ViT-H-14'),
    ('ViT-H-14', 'laion3b', 'its tags are laion2b_s32b_b79k'),
    ('ViT-H-14', '', 'neither a weights file nor a tag'),
    ('ViT-L-14', __file__, 'tag@'),
    ('local-dir:nowhere', '', 'There is no folder nowhere of a model'),
    ('timm:efficientnet_light0', 'random', 'Did you mean'),
    ('timm:efficientnet_lite0', 'nowhere.pth', 'does not exist'),
    ('timm:test_efficientnet', __file__, 'is text, not weights: give'),
])
def test_a_wrong_name_or_file_is_one_sentence(model_name, pretrained, words):
    with pytest.raises(ValueError, match=words) as error:
        load_image_tower(model_name, pretrained)
    assert '\n' not in str(error.value)


def test_timms_weights_that_cannot_be_downloaded_are_one_sentence(monkeypatch):
    def offline(name, pretrained, **options):
        raise OSError('cannot reach the hub\nwith a traceback')
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(ValueError, match='timm:resnet18 could not be downloaded .cannot reach the hub.: turn') as error:
        load_image_tower('timm:resnet18')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('model_name, tag, mean, quick', [
    ('ViT-H-14', 'laion2b_s32b_b79k', .48145466, None), ('ViT-L-14', 'laion2b_s32b_b82k', .5, None),
    ('ViT-L-14-336', 'openai', .48145466, True)])
def test_a_local_file_keeps_the_facts_of_the_recipes_tags(tmp_path, model_name, tag, mean, quick):
    (tmp_path / 'weights').touch()
    for file in (f'{tmp_path}/weights', 'random'):
        source, facts = weights_source(model_name, f'{tag}@{file}')
        assert source == (None if file == 'random' else file)
        assert facts['mean'][0] == pytest.approx(mean) and facts.get('quick_gelu') == quick


def save_pickled(state, path):
    torch.save({'state_dict': state}, path)


@pytest.mark.parametrize('save', [torch.save, save_pickled, save_file])
def test_a_timm_models_weights_file_loads_whatever_its_name_without_its_classifier(tmp_path, save):
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', pretrained=False).eval()
    save(model.state_dict(), tmp_path / 'weights')
    tower = load_image_tower('timm:test_efficientnet', str(tmp_path / 'weights'), 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.allclose(tower(images), expected, atol=1e-6) and tower.spec.width == expected.shape[1]


KINDS = {  # of open_clip's towers: what their vision_cfg changes
    'class token': {}, 'mean of tokens': {'pool_type': 'avg'}, 'layer scale': {'ls_init_value': .1},
    'norm last': {'pool_type': 'avg', 'final_ln_after_pool': True},
    'coca': {'attentional_pool': True, 'attn_pooler_heads': 2, 'output_tokens': True}}
VISION = {'image_size': 32, 'patch_size': 8, 'layers': 3, 'width': 64, 'head_width': 32}


def spec_of(kind='class token', quick_gelu=False):
    plan = {'library': 'open_clip', 'embed_dim': 16, 'vision_cfg': VISION | KINDS[kind], 'quick_gelu': quick_gelu}
    return TowerSpec(kind, 'random', 32, (.5,) * 3, (.5,) * 3, 'gelu', 16, plan)


def step(tower, images):
    """(output, {name: gradient}) of a step of training."""
    output = tower.train()(images)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in tower.named_parameters()}


def assert_same_step(one, other, images):
    (output, gradients), (expected, reference) = step(one, images), step(other, images)
    assert list(gradients) == list(reference)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-5, atol=1e-5 * float(reference[name].abs().max()),
                                   msg=name)


@pytest.mark.parametrize('quick_gelu', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_a_tower_has_the_names_output_and_gradients_of_open_clips_default_blocks(kind, quick_gelu):
    torch.manual_seed(0)
    plain = open_clip.CLIP(16, VISION | KINDS[kind], NO_TEXT, quick_gelu=quick_gelu).visual
    for parameter in plain.parameters():
        parameter.data += .1 * torch.randn_like(parameter)  # biases begin at 0, where a wrong one does no harm
    tower = build_tower(spec_of(kind, quick_gelu))
    assert type(tower.transformer.resblocks[0]) is not type(plain.transformer.resblocks[0])
    assert {name: tensor.shape for name, tensor in tower.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()}
    tower.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = plain.eval()(images)
        expected = expected[0] if kind == 'coca' else expected
        torch.testing.assert_close(tower.eval()(images), expected, rtol=1e-5, atol=1e-5)
    assert_same_step(tower, plain, images)


def test_random_weights_are_as_wide_as_those_of_open_clips_default_blocks():
    ours, default = load_image_tower('ViT-B-32', 'random'), open_clip.create_model('ViT-B-32').visual
    for (name, tensor), other in zip(ours.state_dict().items(), default.state_dict().values(), strict=True):
        if tensor.numel() > 1e5:
            assert tensor.std().item() == pytest.approx(other.std().item(), rel=.02), name


def test_other_towers_than_transformers_are_open_clips_as_they_are():
    for name in ('RN50', 'ViT-B-16-SigLIP'):
        vision = open_clip.get_model_config(name)['vision_cfg']
        assert packed(vision) == vision
    with torch.device('meta'):
        assert load_image_tower('RN50', 'random')(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)


def test_a_coca_tower_gives_one_vector_an_image():
    with torch.device('meta'):
        tower = load_image_tower('coca_ViT-B-32', 'random')
        for one in (tower, build_tower(tower.spec)):
            assert one(torch.zeros(2, 3, 224, 224)).shape == (2, 512)


@pytest.mark.parametrize('kind', ['class token', 'coca'])
def test_recomputed_activations_give_the_same_step_also_in_a_copy_and_when_asked_for_twice(kind):
    torch.manual_seed(0)
    tower, images, calls = build_tower(spec_of(kind)), torch.randn(4, 3, 32, 32), []
    tower.transformer.resblocks[1].ln_1.register_forward_hook(lambda *_: calls.append(1))
    plain, plain_calls = copy.deepcopy(tower), len(calls)
    checkpoint_activations(tower)
    checkpoint_activations(tower)
    copied = copy.deepcopy(tower)
    assert plain_calls == 0 and list(copied.state_dict()) == list(plain.state_dict())
    assert_same_step(tower, plain, images)
    assert len(calls) == 1 + 2  # once without, twice with: forward, and again for backward
    with torch.no_grad():
        tower.proj.zero_()
        for parameter in tower.transformer.parameters():
            parameter.fill_(torch.nan)
    plain.zero_grad()
    assert_same_step(copied, plain, images)  # whose blocks are its own
    assert len(calls) == 1 + 2 + 1 + 2
    copied.eval()
    with torch.inference_mode():
        assert torch.equal(copied(images), plain.eval()(images))


def test_a_model_that_cannot_recompute_activations_says_so(capsys):
    with torch.device('meta'):
        vgg = timm.create_model('vgg11')
    for tower in (torch.nn.Flatten(), vgg):
        checkpoint_activations(tower)
        assert f'{type(tower).__name__} cannot recompute activations' in capsys.readouterr().out


@pytest.mark.parametrize('overlap', [0., .5])
def test_a_tower_trains_a_step_is_saved_and_built_again(tower, tmp_path, overlap):
    torch.manual_seed(0)
    model = Embedder(copy.deepcopy(tower), SubcenterHead(tower.spec.width, 3, dim=8))
    resize(model, 48, overlap)
    checkpoint_activations(model.tower)
    before, images = copy.deepcopy(model.state_dict()), torch.randint(256, (3, 3, 48, 48), dtype=torch.uint8)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.nn.functional.cross_entropy(model(images, classify=True), torch.arange(3)).backward()
    optimiser.step()
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    save_run(tmp_path / 'run', model, Config())
    again = load_run(tmp_path / 'run')
    assert again.spec == model.spec and again.spec.image_size == 48
    with torch.inference_mode():
        assert torch.equal(again(images), model.eval()(images))


OPENAI, HALF, IMAGENET = (.48145466, .4578275, .40821073), (.5, .5, .5), (.485, .456, .406)
STD = {OPENAI: (.26862954, .26130258, .27577711), HALF: HALF, IMAGENET: (.229, .224, .225)}
TOWERS = [  # name, tag ('random': timm's own), width, pixels, mean, activation, blocks, millions of parameters
    ('ViT-SO400M-14-SigLIP-384', 'webli', 1152, 384, HALF, '', 27, 428),
    ('ViT-SO400M-16-SigLIP2-384', 'webli', 1152, 384, HALF, '', 27, 428),
    ('ViT-H-14', 'laion2b_s32b_b79k', 1024, 224, OPENAI, 'gelu', 32, 632),
    ('ViT-L-14-336', 'openai', 768, 336, OPENAI, 'quick_gelu', 24, 304),
    ('ViT-H-14-quickgelu', 'dfn5b', 1024, 224, OPENAI, 'quick_gelu', 32, 632),
    ('ViT-H-14-378-quickgelu', 'dfn5b', 1024, 378, OPENAI, 'quick_gelu', 32, 633),
    ('ViT-H-14-quickgelu', 'metaclip_fullcc', 1024, 224, OPENAI, 'quick_gelu', 32, 632),
    ('EVA02-L-14-336', 'merged2b_s6b_b61k', 768, 336, OPENAI, '', 24, 304),
    ('PE-Core-L-14-336', 'meta', 1024, 336, HALF, '', 24, 317),
    ('timm:vit_large_patch14_dinov2', 'random', 1024, 518, IMAGENET, '', 24, 304),
    ('timm:vit_large_patch16_dinov3', 'random', 1024, 256, IMAGENET, '', 24, 303)]
STEMS = {'conv1', 'class_embedding', 'positional_embedding', 'ln_pre', 'pos_embed', 'cls_token', 'reg_token', 'proj',
         'norm_pre'}


@pytest.mark.parametrize('name, tag, width, pixels, mean, activation, depth, millions', TOWERS)
def test_a_tower_says_what_it_is(name, tag, width, pixels, mean, activation, depth, millions):
    with torch.device('meta'):
        tower = load_image_tower(name, tag if tag == 'random' else f'{tag}@random')
        for one in (tower, build_tower(tower.spec)):
            assert one(torch.zeros(1, 3, pixels, pixels)).shape == (1, width)
    spec = tower.spec
    assert (spec.width, spec.image_size, spec.activation) == (width, pixels, activation)
    assert spec.mean == pytest.approx(mean) and spec.std == pytest.approx(STD[mean])
    assert round(sum(parameter.numel() for parameter in tower.parameters()) / 1e6) == millions
    blocks, found = tower_blocks(tower)
    assert found == depth and {block for block in blocks.values() if 0 <= block < depth} == set(range(depth))
    stem = {name.split('.')[-1 - name.endswith(('weight', 'bias'))] for name, block in blocks.items() if block < 0}
    assert stem <= STEMS and stem & {'conv1', 'proj'}


SMALL = [('timm:test_vit3', 48), ('PE-Core-T-16-384', 32), ('timm:eva02_tiny_patch14_224', 28),
         ('timm:vit_tiny_patch16_dinov3_qkvb', 32), ('timm:test_vit2', 48)]


@pytest.mark.parametrize('name, size', SMALL)  # pooling as SigLIP's; PE; EVA-02; DINOv3; registers as DINOv2's
def test_a_small_one_trains_a_step_makes_a_soup_and_is_exported(train, tmp_path, name, size):
    if name.startswith('timm:') and name[5:] not in timm.list_models():
        pytest.skip(f'timm {timm.__version__} has no {name[5:]} yet')
    config = Config(model_name=name, pretrained='random', image_size=size, batch_size=32, effective_batch=64,
                    embedding_dim=16, warmup_steps=0, checkpoint_activations=True)
    torch.manual_seed(0)
    tower = load_image_tower(name, 'random', size)
    for seed in (1, 2):
        model = Embedder(copy.deepcopy(tower), SubcenterHead(tower.spec.width, 12, dim=16))
        fit(config.override(seed=seed), model, train, tmp_path / str(seed))
    runs = [open_checkpoint(tmp_path / str(seed)) for seed in (1, 2)]
    first, second = runs
    parameters = [f'tower.{name}' for name, parameter in tower.named_parameters()]
    assert all(not torch.equal(first[name], second[name]) for name in parameters if first[name].ndim > 1)
    save_soup(average_states(runs), tmp_path / 'soup', runs, 'uniform')
    export_submission(load_run(tmp_path / 'soup'), tmp_path)
    assert (tmp_path / 'submission.zip').stat().st_size > 4 * sum(p.numel() for p in tower.parameters())


def test_weights_of_another_size_are_resized_and_come_back_at_the_new_one(tmp_path):
    torch.manual_seed(0)
    own = load_image_tower('timm:test_vit3', 'random')
    save_file(own.state_dict(), tmp_path / 'weights')
    larger = load_image_tower('timm:test_vit3', str(tmp_path / 'weights'), 192)
    assert larger.pos_embed.shape[1] == own.pos_embed.shape[1] * 144 // 100 and larger.spec.image_size == 192
    assert torch.equal(larger.blocks[0].attn.qkv.weight, own.blocks[0].attn.qkv.weight)
    save_run(tmp_path / 'run', Embedder(larger), Config())
    images = torch.randint(256, (2, 3, 192, 192), dtype=torch.uint8)
    assert torch.equal(load_run(tmp_path / 'run')(images), Embedder(larger).eval()(images))


def test_efficientnets_first_norm_learns_as_slowly_as_its_first_convolution():
    blocks, depth = tower_blocks(load_image_tower('timm:test_efficientnet', 'random', 32))
    assert blocks['bn1.weight'] == blocks['conv_stem.weight'] == -1 and blocks['bn2.weight'] >= depth - 1


@pytest.mark.parametrize('name', [*FAMILIES, *VARIANTS])
def test_a_familys_blocks_come_in_the_order_of_timms_own_layers(name):
    tower = on_meta(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f'^{type(tower).__name__} does not say in which order its layers come.*[.]$'):
            tower_blocks(tower)
        return
    blocks, depth = tower_blocks(tower)
    assert list(blocks) == [name for name, _ in tower.named_parameters()]
    assert set(blocks.values()) - {-1, depth} == set(range(depth)) and -1 in blocks.values()
    if hasattr(tower, 'group_matcher'):
        layers = group_parameters(tower, tower.group_matcher(), reverse=True)
        late = {} if timm.__version__ >= '1.0.31' else {'cls_token', 'reg_token', 'norm_pre'}  # timm's were misplaced
        assert {key: layer - 1 for key, layer in layers.items() if key.split('.')[0] not in late} == {
            key: block for key, block in blocks.items() if key.split('.')[0] not in late}
    early = {'reg_token', 'cls_token', 'pos_embed'} | ({'norm_pre'} if not name.startswith('convnext') else set())
    assert {block for key, block in blocks.items() if key.split('.')[0] in early} <= {-1}


WITHOUT_MATCHER = ['csatv2', 'caformer_s18', 'poolformer_s12', 'pit_ti_224', 'pit_s_distilled_224']


def blocks_as_used(tower, size):
    with torch.inference_mode(), FirstUses(tower) as uses:
        tower.eval()(torch.zeros(1, 3, size, size, device='meta'))
    blocks, depth = tower_blocks(tower)
    assert set(blocks.values()) - {-1, depth} == set(range(depth))
    return [blocks[name] for name in uses.order]


@pytest.mark.parametrize('name', WITHOUT_MATCHER)
def test_families_without_layers_of_timms_own_have_blocks_in_the_order_of_use(name):
    tower = on_meta(name)
    found = blocks_as_used(tower, tower.pretrained_cfg['input_size'][-1])
    assert found == sorted(found) and found[0] == -1


@pytest.mark.parametrize('name, depth', [
    ('ViT-B-32', 12), ('coca_ViT-B-32', 12), ('ViT-H-14-CLIPA', 32), ('ViT-M-16-alt', 12), ('RN50', 16), ('RN50x4', 26),
    ('convnext_tiny', 18), ('swin_base_patch4_window7_224', 24), ('ViTamin-S', 14), ('EVA02-B-16', 12),
    ('MobileCLIP-S1', 40), ('MobileCLIP-B', 12), ('ViT-B-16-SigLIP', 12), ('PE-Core-T-16-384', 12),
    ('vit_relpos_medium_patch16_cls_224', 12), ('vit_medium_patch16_gap_256', 12)])
def test_every_kind_of_open_clips_towers_has_blocks_in_the_order_of_use(name, depth):
    with torch.device('meta'):
        tower = load_image_tower(name, 'random')
    found = blocks_as_used(tower, tower.spec.image_size)
    assert found == sorted(found) and found[0] == -1 and tower_blocks(tower)[1] == depth
    assert {block for name, block in tower_blocks(tower)[0].items() if name.startswith('head.')} <= {depth}


class Layers(torch.nn.Module):
    """Four layers and a matcher that knows some of them."""

    def __init__(self, pattern):
        super().__init__()
        self.stem, self.layers = torch.nn.Linear(4, 4), torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        self.pattern = pattern

    def group_matcher(self, coarse=False):
        return {'stem': '^stem', 'blocks': self.pattern}


@pytest.mark.parametrize('tower', [
    torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6)), torch.nn.Conv2d(3, 6, 2),
    Layers(r'^blocks\.(\d+)'), Layers(r'^layers\.([013])')])  # no layers; a part of them
def test_a_tower_whose_order_cannot_be_told_is_refused_by_name(tower):
    with pytest.raises(InputError, match=f'^{type(tower).__name__} does not say .*layer_lrs .*[.]$') as error:
        tower_blocks(tower)
    assert '\n' not in str(error.value) and block_modules(tower) == []
    assert tower_blocks(Layers(r'^layers\.(\d+)'))[1] == 4


@pytest.mark.parametrize('name, count', [
    ('vit_tiny_patch16_224', 12), ('resnet18', 8), ('regnety_002', 13), ('convnext_atto', 12), ('caformer_s18', 18),
    ('coat_lite_tiny', 11)])  # whose blocks share modules
def test_what_is_sharded_as_one_lies_in_one_block_and_all_blocks_are(name, count):
    tower = on_meta(name)
    blocks, depth = tower_blocks(tower)
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    parts = [[names[id(parameter)] for parameter in module.parameters()] for module in block_modules(tower)]
    assert depth == count and all(len({blocks[key] for key in part}) == 1 for part in parts)
    assert sorted(sum(parts, [])) == sorted(key for key, block in blocks.items() if 0 <= block < depth and '.' in key)


def test_a_tower_of_ones_own_making_cannot_be_rebuilt_from_its_spec_alone():
    with pytest.raises(ValueError, match='mine cannot be rebuilt from its checkpoint alone; pass its tower along'):
        build_tower(replace(spec_of(), model_name='mine', architecture={}))


@pytest.mark.parametrize('folder', ['me@home', 'a@b@c', 'plain', '@'])
@pytest.mark.parametrize('tag', ['', 'laion2b_s34b_b79k@'])
def test_a_weights_file_may_have_an_at_in_its_path(tmp_path, monkeypatch, folder, tag):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'w@1.bin').touch()
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in (f'{tmp_path}/{folder}/w@1.bin', f'~/{folder}/w@1.bin', f' $HOME/{folder}/w@1.bin '):
        model = 'ViT-B-32' if tag else 'ViT-S-32-alt'  # which has no tags that could differ
        source, facts = weights_source(model, tag + path)
        assert source == f'{tmp_path}/{folder}/w@1.bin' and bool(facts) == bool(tag)


@pytest.mark.parametrize('pretrained, words', [
    ('laion2b_s34b_b79@/none.bin', 'neither a weights file nor a tag .* Did you mean laion2b_s34b_b79k'),
    ('laion2b_s34b_b79k@/no@ne.bin', "'laion2b_s34b_b79k@/no@ne.bin' is neither"), ('/me@home/none.bin', 'is neither'),
    ('OpenAI', 'Did you mean openai')])
def test_weights_that_are_not_there_are_one_sentence(pretrained, words):
    with pytest.raises(ValueError, match=words) as error:
        weights_source('ViT-B-32', pretrained)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, hint', [
    ('resnet18', "open_clip has no model 'resnet18': write 'timm:resnet18'."),
    ('media/miniature', "open_clip has no model 'media/miniature': write 'local-dir:media/miniature'."),
    ('local-dir:no/such', 'There is no folder no/such of a model: check the path after local-dir:.')])
def test_a_name_of_another_kind_has_a_hint(name, hint):
    with pytest.raises(ValueError) as error:
        load_image_tower(name, 'random')
    assert hint in str(error.value) and is_one_sentence(error)


def test_the_miniature_is_found_from_any_folder(tmp_path, monkeypatch):
    expected = load_image_tower('local-dir:media/miniature', image_size=32)
    monkeypatch.chdir(tmp_path)
    found = load_image_tower('local-dir:media/miniature', image_size=32)
    assert found.spec == expected.spec and same(found.state_dict(), expected.state_dict())
    with monkeypatch.context() as patch:  # one's own folder comes first
        (tmp_path / 'media/miniature').mkdir(parents=True)
        patch.setattr(towers, 'REPOSITORY', tmp_path / 'elsewhere')
        assert towers.local_folder('local-dir:media/miniature') == Path('media/miniature')
