"""Towers since CLIP, by name: what is found from the model, which parameter trains how; small ones go all the way."""
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

import utilities

OPENAI, HALF, IMAGENET = (.48145466, .4578275, .40821073), (.5, .5, .5), (.485, .456, .406)
STD = {OPENAI: (.26862954, .26130258, .27577711), HALF: HALF, IMAGENET: (.229, .224, .225)}
TOWERS = [  # name, tag ('random': timm's own), width, pixels, mean, activation, blocks, millions of parameters
    ('ViT-SO400M-14-SigLIP-384', 'webli', 1152, 384, HALF, '', 27, 428),
    ('ViT-SO400M-16-SigLIP2-384', 'webli', 1152, 384, HALF, '', 27, 428),
    ('ViT-H-14-quickgelu', 'dfn5b', 1024, 224, OPENAI, 'quick_gelu', 32, 632),
    ('ViT-H-14-378-quickgelu', 'dfn5b', 1024, 378, OPENAI, 'quick_gelu', 32, 633),
    ('ViT-H-14-quickgelu', 'metaclip_fullcc', 1024, 224, OPENAI, 'quick_gelu', 32, 632),
    ('EVA02-L-14-336', 'merged2b_s6b_b61k', 768, 336, OPENAI, '', 24, 304),
    ('PE-Core-L-14-336', 'meta', 1024, 336, HALF, '', 24, 317),
    ('timm:vit_large_patch14_dinov2', 'random', 1024, 518, IMAGENET, '', 24, 304),
    ('timm:vit_large_patch16_dinov3', 'random', 1024, 256, IMAGENET, '', 24, 303)]


@pytest.mark.parametrize('name, tag, width, pixels, mean, activation, depth, millions', TOWERS)
def test_a_tower_says_what_it_is_and_its_blocks_take_the_bands(name, tag, width, pixels, mean, activation, depth, millions):
    with torch.device('meta'):
        tower = utilities.load_image_tower(name, 'random')
        model = utilities.Embedder(tower, utilities.SubcenterHead(width, 5))
        assert tower(torch.zeros(1, 3, pixels, pixels)).shape == (1, width)
    spec, facts = tower.spec, {'mean': tower.spec.mean, 'std': tower.spec.std}
    if tag != 'random':
        _, facts = utilities.weights_source(name, tag)
    assert (spec.width, spec.image_size, spec.activation) == (width, pixels, activation)
    assert tuple(facts['mean']) == pytest.approx(mean) and tuple(facts['std']) == pytest.approx(STD[mean])
    assert round(sum(parameter.numel() for parameter in tower.parameters()) / 1e6) == millions

    config = utilities.Config()  # four bands, of 32 blocks
    groups = utilities.param_groups(model, config)
    names = Counter(name for group in groups for name in group['names'])
    assert set(names) == {name for name, _ in model.named_parameters()} and set(names.values()) == {1}
    blocks, found = utilities.tower_blocks(tower)
    assert found == depth and {block for block in blocks.values() if 0 <= block < depth} == set(range(depth))
    stem = {name.split('.')[-1 - name.endswith(('weight', 'bias'))] for name, block in blocks.items() if block < 0}
    assert stem <= {'conv1', 'class_embedding', 'positional_embedding', 'ln_pre', 'pos_embed', 'cls_token', 'reg_token',
                    'proj', 'norm_pre'} and stem & {'conv1', 'proj'}
    for group in groups:
        for full, parameter in zip(group['names'], group['params']):
            if full.startswith('tower.'):
                block = min(max(blocks[full[6:]], 0), depth - 1)
                assert group['lr'] == next(lr for end, lr in config.bands if block + .5 < end * depth / 32), full
                kept = parameter.ndim == 1 or full.endswith(('embedding', 'pos_embed', '_token', 'latent'))
                assert group['weight_decay'] == (0 if kept else config.tower_decay), full


SMALL = [('timm:test_vit3', 48), ('PE-Core-T-16-384', 32), ('timm:eva02_tiny_patch14_224', 28),
         ('timm:vit_tiny_patch16_dinov3_qkvb', 32), ('timm:test_vit2', 48)]


@pytest.mark.parametrize('name, size', SMALL)  # pooling as SigLIP's; PE; EVA-02; DINOv3; registers as DINOv2's
def test_a_small_one_trains_a_step_makes_a_soup_and_is_exported(train, tmp_path, name, size):
    config = utilities.Config(model_name=name, pretrained='random', image_size=size, batch_size=32, effective_batch=64,
                              embedding_dim=16, warmup_steps=0)
    torch.manual_seed(0)
    tower = utilities.load_image_tower(name, 'random', size)
    for seed in (1, 2):
        head = utilities.SubcenterHead(tower.spec.width, 12, dim=16)
        model = utilities.Embedder(utilities.copy.deepcopy(tower), head)
        utilities.fit(config.override(seed=seed), model, train, tmp_path / str(seed))
    first, second = (utilities.open_checkpoint(tmp_path / str(seed)) for seed in (1, 2))
    parameters = [f'tower.{name}' for name, parameter in tower.named_parameters()]
    assert all(not torch.equal(first[name], second[name]) for name in parameters if first[name].ndim > 1)
    utilities.save_soup(utilities.average_states([tmp_path / '1', tmp_path / '2']), tmp_path / 'soup',
                        [tmp_path / '1', tmp_path / '2'], 'uniform')
    utilities.export_submission(utilities.load_run(tmp_path / 'soup'), tmp_path)
    assert (tmp_path / 'submission.zip').stat().st_size > 4 * sum(p.numel() for p in tower.parameters())


def test_weights_of_another_size_are_resized_and_come_back_at_the_new_one(tmp_path):
    torch.manual_seed(0)
    own = utilities.load_image_tower('timm:test_vit3', 'random')
    save_file(own.state_dict(), tmp_path / 'weights')
    larger = utilities.load_image_tower('timm:test_vit3', str(tmp_path / 'weights'), 192)
    assert larger.pos_embed.shape[1] == own.pos_embed.shape[1] * 144 // 100 and larger.spec.image_size == 192
    assert torch.equal(larger.blocks[0].attn.qkv.weight, own.blocks[0].attn.qkv.weight)
    utilities.save_run(tmp_path / 'run', utilities.Embedder(larger), utilities.Config())
    images = torch.randint(256, (2, 3, 192, 192), dtype=torch.uint8)
    assert torch.equal(utilities.load_run(tmp_path / 'run')(images), utilities.Embedder(larger).eval()(images))


def test_efficientnets_first_norm_learns_as_slowly_as_its_first_convolution():
    blocks, depth = utilities.tower_blocks(utilities.load_image_tower('timm:test_efficientnet', 'random', 32))
    assert blocks['bn1.weight'] == blocks['conv_stem.weight'] == -1 and blocks['bn2.weight'] == depth
