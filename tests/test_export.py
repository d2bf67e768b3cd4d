"""The exported file gives the eager model's vectors, here and in PyTorch 1.11, and nothing is half-written.

TORCH111 names the Python of an environment with torch 1.11.0 and torchvision 0.12.0; without it those tests skip.
"""
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import utilities

TORCH111 = os.environ.get('TORCH111')
needs_torch111 = pytest.mark.skipif(not TORCH111, reason='TORCH111 is not set: the host\'s own PyTorch 1.11 was NOT '
                                    'tried; set it to the python of an environment with torch 1.11.0')
SIZES = [(1, 1), (1, 300), (300, 1), (3, 900), (37, 53), (64, 64), (333, 250), (600, 400)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def embedder(tower, size, seed=0, dim=3):
    """An Embedder of random, lively weights: layer scales and batch statistics that do something."""
    torch.manual_seed(seed)
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        if name.endswith(('running_mean', 'gamma', 'gamma_1', 'gamma_2', 'bias', 'cls_token', 'reg_token')):
            nn.init.normal_(tensor.data, std=.5)
        if name.endswith('running_var'):
            nn.init.uniform_(tensor.data, .5, 2)
    with torch.no_grad():
        width = tower.eval()(torch.zeros(1, 3, size, size)).shape[1]
    spec = utilities.TowerSpec('test', 'random', size, (.48, .45, .4), (.26, .25, .27), '', width, {})
    return utilities.Embedder(tower, projection=nn.Linear(width, dim), spec=spec)


def clip(quick_gelu=False, dim=3, size=32, seed=0, **vision):
    torch.manual_seed(seed)
    vision = {'image_size': size, 'layers': 2, 'width': 32, 'patch_size': 8, 'head_width': 16} | vision
    text = {'context_length': 4, 'vocab_size': 9, 'width': 16, 'heads': 1, 'layers': 1}
    tower = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).visual
    return embedder(tower, size, dim=dim)


def vit(name, size, **options):
    torch.manual_seed(0)
    options = {'img_size': size, 'embed_dim': 32, 'depth': 2, 'num_heads': 2} | options
    return embedder(timm.create_model(name, num_classes=0, **options), size)


def convolutions(name, **options):
    torch.manual_seed(0)
    return embedder(timm.create_model(name, num_classes=0, **options), 64)


FAMILIES = {
    'token pooling': lambda: clip(),
    'average pooling': lambda: clip(pool_type='avg'),
    'norm after pooling': lambda: clip(pool_type='avg', final_ln_after_pool=True),
    'quick GELU': lambda: clip(quick_gelu=True),
    'layer scale': lambda: clip(ls_init_value=.1),
    'no first norm': lambda: clip(no_ln_pre=True),
    'sin-cos positions': lambda: clip(pos_embed_type='sin_cos_2d'),
    'attentional pooling': lambda: clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4),
    'normalised queries': lambda: clip(qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True),
    'resized positions': lambda: utilities._at_size(clip(), 1.5),
    'CLIP ResNet': lambda: clip(layers=(1, 1, 1, 1), width=8, size=64),
    'SigLIP': lambda: vit('vit_base_patch16_siglip_224', 32),
    'SigLIP2 tanh GELU': lambda: vit('vit_base_patch16_siglip_224', 32, act_layer='gelu_tanh'),
    'EVA02': lambda: vit('eva02_tiny_patch14_224', 28),
    'EVA02-CLIP': lambda: vit('eva02_base_patch16_clip_224', 32),
    'DINOv2': lambda: vit('vit_small_patch14_reg4_dinov2', 28),
    'DINOv3': lambda: vit('vit_small_patch16_dinov3', 32),
    'efficientnet_lite0': lambda: convolutions('efficientnet_lite0'),
    'tf_efficientnet_lite0': lambda: convolutions('tf_efficientnet_lite0'),
    'resnet': lambda: convolutions('resnet50', layers=(1, 1, 1, 1), channels=(8, 16, 32, 64)),
    'ConvNeXt': lambda: convolutions('convnext_atto', depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
}


@pytest.fixture(scope='module')
def families():
    return {name: build() for name, build in FAMILIES.items()}


def photograph(size, seed=0, n=1):
    """uint8 (n, 3, h, w): smooth waves with noise, so that resizing both averages and overshoots."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 7, generator=generator)
    waves = F.interpolate(coarse, size, mode='bilinear') + .2 * torch.randn(n, 3, *size, generator=generator)
    return (waves * 255).clamp(0, 255).byte()


def expected(member, image):
    """What Submission([member]) must return, written out: squash, clip, normalise, tower, projection."""
    side, spec = member.spec.image_size, member.spec
    pixels = F.interpolate(image.float(), (side, side), mode='bicubic', antialias=True).clamp(0, 255) / 255
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    with torch.no_grad():
        features = F.normalize(member.tower.eval()((pixels - mean) / std))
        return F.normalize(member.projection(features))


def load(path, tmp_path):
    with zipfile.ZipFile(path) as archive:
        return torch.jit.load(archive.extract('saved_model.pt', tmp_path)).eval()


@torch.no_grad()
def outputs(model, images):
    return torch.cat([model(image) for image in images])


# ── The file and the model ──────────────────────────────────────────────────────────────────────────────

def test_one_file_of_every_family_gives_the_eager_vectors_at_any_size_and_in_batches(families, tmp_path):
    utilities.export_submission(utilities.Submission(families.values()), tmp_path / 'submission.zip')
    file = load(tmp_path / 'submission.zip', tmp_path)
    for seed, size in enumerate(SIZES):
        images = photograph(size, seed, n=2)
        found = outputs(file, [images, images[:1]]).view(3, -1, 3) * len(families) ** .5
        for i, (name, member) in enumerate(families.items()):
            torch.testing.assert_close(found[:2, i], expected(member, images), rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)


def test_the_vectors_of_the_families_depend_on_the_photograph(families):
    for name, member in families.items():
        a, b = expected(member, photograph((40, 40), 1)), expected(member, photograph((40, 40), 2))
        assert (a - b).norm() > (1e-6 if 'ResNet' in name else 1e-3), name  # random convolutions see mostly one mean


def test_members_of_different_sizes_heads_and_a_joint_projection_are_concatenated(tmp_path):
    first, second = clip(dim=10), clip(size=48, dim=6, seed=1)
    second.head = utilities.SubcenterHead(24, 2, dim=24)
    joint = nn.Linear(16, 5)
    model = utilities.Submission([first, second], joint)
    utilities.export_submission(model, tmp_path / 'submission.zip')
    image = photograph((90, 50))
    with torch.no_grad():
        pixels = F.interpolate(image.float(), (48, 48), mode='bicubic', antialias=True).clamp(0, 255)
        both = torch.cat([expected(first, image), second.eval()(pixels)], 1)
        found = load(tmp_path / 'submission.zip', tmp_path)(image)
        torch.testing.assert_close(found, F.normalize(joint(both)), rtol=0, atol=1e-6)


def test_the_zip_holds_one_stored_file_of_a_version_that_the_host_reads(tmp_path, capsys):
    utilities.export_submission(clip(), tmp_path / 'new' / 'submission.zip')
    assert '3 dimensions' in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / 'new' / 'submission.zip') as archive:
        assert [(entry.filename, entry.compress_type) for entry in archive.infolist()] == [
            ('saved_model.pt', zipfile.ZIP_STORED)]
        with zipfile.ZipFile(archive.extract('saved_model.pt', tmp_path)) as inner:
            assert int(inner.read('saved_model/version')) <= 9
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['submission.zip']


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = clip().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    utilities.export_submission(model, tmp_path / 'submission.zip', half=True)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.tower) is open_clip.transformer.VisionTransformer
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_the_resized_photograph_is_pillows_to_a_grey_level():
    class Seen(nn.Module):
        def forward(self, x):
            self.pixels = x
            return x.mean((2, 3))

    member = embedder(Seen(), 32)
    for size in [(333, 250), (20, 90), (32, 32)]:
        image = photograph(size)
        utilities.Submission([member]).eval()(image)
        seen = member.tower.pixels[0] * member.std + member.mean
        pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC)
        # Pillow rounds and clips between its two passes, which on this noise moves single values by a few levels
        apart = (seen - torch.tensor(np.array(pillow)).permute(2, 0, 1)).abs()
        assert apart.mean() <= .5 and apart.max() <= 6


# ── Test-time options ───────────────────────────────────────────────────────────────────────────────────

def test_a_flip_makes_a_photograph_and_its_mirror_image_the_same():
    image = photograph((45, 70))
    for flip, alike in ((True, True), (False, False)):
        model = utilities.Submission([clip(), clip(seed=1)], flip=flip).eval()
        found = outputs(model, [image, image.flip(3)])
        assert torch.allclose(found[0], found[1], atol=1e-5) == alike


def test_padding_keeps_the_aspect_and_borders_with_the_mean_colour():
    member = clip(dim=8)
    mean = (torch.tensor(member.spec.mean) * 255).view(1, 3, 1, 1)
    wide = photograph((16, 32))
    framed = mean.expand(1, 3, 32, 32).clone()
    framed[:, :, 8:24] = wide  # already at its size: nothing is resized
    with torch.no_grad():
        found = utilities.Submission([member], pad=True).eval()(wide)
        torch.testing.assert_close(found, member.eval()(framed), rtol=0, atol=1e-5)
    square = photograph((50, 50))
    padded, squashed = (outputs(utilities.Submission([member], pad=pad).eval(), [square]) for pad in (True, False))
    torch.testing.assert_close(padded, squashed, rtol=0, atol=1e-5)


@pytest.mark.parametrize('height, width', [(45, 70), (70, 45), (61, 50), (1, 300), (300, 1), (40, 41), (3, 5)])
def test_a_padded_photograph_is_scaled_to_its_longer_side_and_centred(height, width):
    side, image = 32, photograph((height, width)).float()
    border = torch.tensor([10., 20., 30.]).view(3, 1, 1)
    h, w = (max(2, math.floor(length * side / max(height, width) + .5)) for length in (height, width))
    expected = border.expand(1, 3, side, side).clone()
    small = F.interpolate(image, (h, w), mode='bicubic', antialias=True).clamp(0, 255)
    expected[:, :, (side - h) // 2:(side - h) // 2 + h, (side - w) // 2:(side - w) // 2 + w] = small
    torch.testing.assert_close(utilities._letterbox(image, side, border), expected, rtol=0, atol=1e-4)


def test_each_member_weighs_the_same_however_its_looks_differ():
    members, image = [clip(dim=8), clip(dim=8, seed=1)], photograph((45, 70))
    found = outputs(utilities.Submission(members, flip=True, sizes=(1, 1.5)).eval(), [image])
    torch.testing.assert_close(found.view(2, 8).norm(dim=1), torch.full((2,), .5 ** .5))


def test_another_size_is_a_whole_number_of_patches():
    larger = utilities._at_size(clip(dim=8), 1.3)
    assert larger.spec.image_size == 40  # 41.6 asked for, patches of 8
    assert larger.eval()(photograph((40, 40))).shape == (1, 8)


def test_several_sizes_are_the_mean_over_towers_with_open_clips_resized_positions():
    member, image = clip(dim=8), photograph((45, 70))
    larger = clip(dim=8, size=48)
    state = {f'visual.{name}': tensor for name, tensor in member.tower.state_dict().items()}
    open_clip.model.resize_pos_embed(state, type('Model', (), {'visual': larger.tower}))
    larger.tower.load_state_dict({name.removeprefix('visual.'): tensor for name, tensor in state.items()})
    larger.projection = member.projection
    found = outputs(utilities.Submission([member], sizes=(1, 1.5)).eval(), [image])
    torch.testing.assert_close(found, F.normalize(expected(member, image) + expected(larger, image)),
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize('half', [False, True])
def test_all_options_go_into_one_file_that_holds_the_weights_once(half, tmp_path):
    members = [clip(width=64), vit('vit_base_patch16_siglip_224', 32, embed_dim=64),
               convolutions('resnet50', layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))]
    options = {'flip': True, 'pad': True, 'sizes': (1, 1.5)}
    utilities.export_submission(utilities.Submission(members, **options), tmp_path / 'all.zip', half=half)
    weights = sum(t.numel() for member in members for t in member.state_dict().values()) * (2 if half else 4)
    assert (tmp_path / 'all.zip').stat().st_size < 1.1 * weights + 700_000  # the code and alignment of 6 towers
    found = outputs(load(tmp_path / 'all.zip', tmp_path), [photograph(size) for size in SIZES])
    model = utilities.Submission(members, **options).eval()
    wanted = outputs(model, [photograph(size) for size in SIZES])
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3 if half else 1e-5)


# ── Half precision ──────────────────────────────────────────────────────────────────────────────────────

@torch.jit.script_if_tracing
def half_for_two(x: torch.Tensor) -> torch.Tensor:
    return x.half() if x.size(0) == 2 else x


def test_a_half_precision_file_traced_in_fp32_computes_in_fp16_where_its_input_is(families, monkeypatch, tmp_path):
    """A batch of two plays the CUDA host: what a trace had frozen to fp32 would be a clash of dtypes."""
    monkeypatch.setattr(utilities, '_half_on_cuda', half_for_two)
    chosen = ['token pooling', 'normalised queries', 'attentional pooling', 'SigLIP', 'EVA02', 'resnet']
    model = utilities.Submission([families[name] for name in chosen]).eval()
    utilities.export_submission(model, tmp_path / 'half.zip', half=True)
    file, images = load(tmp_path / 'half.zip', tmp_path), photograph((60, 40), n=2)
    in_half, emulated = outputs(file, [images]), outputs(utilities.half_precision(model, emulate=True), [images])
    in_single, exact = outputs(file, images.split(1)), outputs(model, [images])
    assert in_half.dtype == torch.float32 and not torch.equal(in_half, in_single)
    torch.testing.assert_close(in_half, emulated, rtol=0, atol=3e-3)
    for vectors in (in_half, emulated, in_single):
        assert 0 < (vectors - exact).abs().max() < 5e-3


# ── The host's own PyTorch ──────────────────────────────────────────────────────────────────────────────

def odd_photographs():
    sizes = [*SIZES, (2, 2), (1, 2), (3, 2000), (2000, 3), (1200, 1600), (4000, 6000)]
    rng = np.random.default_rng(0)
    sizes += [tuple(map(int, rng.integers(1, 400, 2))) for _ in range(50 - len(sizes))]
    return [photograph(size, seed) for seed, size in enumerate(sizes)]


def replay(zip_path, images, tmp_path):
    """Vectors of the images from a separate process: an error inside such a file can end the whole process."""
    np.savez(tmp_path / 'images.npz', **{f'photograph{i:02}': image.numpy() for i, image in enumerate(images)})
    script = Path(__file__).with_name('replay_host.py')
    done = subprocess.run([TORCH111, script, zip_path, tmp_path / 'vectors.npy', tmp_path / 'images.npz'],
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'PyTorch 1.11.' in done.stdout
    return torch.from_numpy(np.load(tmp_path / 'vectors.npy'))


@needs_torch111
def test_pytorch_1_11_gives_the_eager_vectors_of_every_family_on_50_odd_photographs(families, tmp_path):
    model, images = utilities.Submission(families.values()).eval(), odd_photographs()
    utilities.export_submission(model, tmp_path / 'submission.zip')
    found, wanted = replay(tmp_path / 'submission.zip', images, tmp_path), outputs(model, images)
    apart = (found - wanted).abs().view(len(images), -1, 3).amax((0, 2)) * len(families) ** .5
    print({name: f'{value:.1e}' for name, value in zip(families, apart.tolist(), strict=True)})
    assert apart.max() <= 1e-5


@needs_torch111
@pytest.mark.parametrize('half', [False, True])
def test_pytorch_1_11_runs_every_test_time_option_in_one_file(half, tmp_path):
    members = [clip(width=64), vit('eva02_tiny_patch14_224', 28)]
    model = utilities.Submission(members, flip=True, pad=True, sizes=(1, 1.5)).eval()
    utilities.export_submission(model, tmp_path / 'all.zip', half=half)
    images = odd_photographs()[:13]
    found = replay(tmp_path / 'all.zip', images, tmp_path)
    if half:  # on a CPU host: fp16 weights, fp32 arithmetic
        torch.testing.assert_close(found, outputs(load(tmp_path / 'all.zip', tmp_path), images), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, outputs(model, images), rtol=0, atol=5e-3 if half else 1e-5)


@needs_torch111
def test_pytorch_1_11_has_every_operator_that_a_file_may_use():
    program = 'import torch; print(*{str(s).split("(")[0] for s in torch._C._jit_get_all_schemas()}, sep="\\n")'
    known = subprocess.run([TORCH111, '-c', program], capture_output=True, text=True, check=True).stdout.split()
    known = {name.removeprefix('aten::') for name in known} | {name.split('.')[0].removeprefix('aten::') for name in known}
    assert utilities.HOST_OPERATORS <= known
    assert not {'scaled_dot_product_attention', 'pad', 'rms_norm'} & known


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────────────

class Answer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, photograph):
        return self.function(photograph.float())


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.RMSNorm(8))

    def forward(self, photograph):
        return F.normalize(self.inner(F.adaptive_avg_pool2d(photograph.float(), 2)))


def broken_clip():
    member = clip()
    with torch.no_grad():
        member.tower.conv1.weight[0, 0, 0, 0] = float('nan')
    return member


UNUSABLE = {
    'too wide': (lambda: clip(dim=65), 'has 65 dimensions, more than 64'),
    'NaN weights': (broken_clip, 'has length nan, not 1'),
    'no batch axis': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)))[0]), r'has shape \[3\]'),
    'not a tensor': (lambda: Answer(lambda x: {'vector': x}), r'has shape \[\], not \(1, dim\)'),
    'double': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)).double())), 'float64, not float32'),
    'not normalised': (lambda: Answer(lambda x: x.mean((2, 3))), 'has length .*, not 1'),
    'newer operator': (Norm, 'no operator rms_norm, which inner.2 uses'),
    'frozen decision': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)) - (9 if x.shape[2] < 9 else 900))),
                        'a trace freezes'),
    'no photographs': (lambda: nn.Linear(3, 3), r'uint8 photograph \(1, 3, 37, 53\) stops it with'),
}


@pytest.mark.parametrize('case', UNUSABLE)
def test_an_unusable_model_is_one_sentence_and_an_existing_submission_stays(case, tmp_path):
    build, sentence = UNUSABLE[case]
    path = tmp_path / 'submission.zip'
    path.write_bytes(b'the last good one')
    with pytest.raises(ValueError, match=sentence) as error:
        utilities.export_submission(build(), path)
    assert '\n' not in str(error.value)
    assert path.read_bytes() == b'the last good one' and list(tmp_path.iterdir()) == [path]


def test_a_file_of_a_newer_version_than_the_host_reads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(utilities, 'HOST_ARCHIVE', 2)
    with pytest.raises(ValueError, match='has version . and PyTorch 1.11 reads up to 2'):
        utilities.export_submission(clip(), tmp_path / 'submission.zip')
    assert not list(tmp_path.iterdir())


def test_half_precision_of_a_model_without_embedders_is_refused(tmp_path):
    with pytest.raises(ValueError, match='towers of Embedders'):
        utilities.export_submission(Norm(), tmp_path / 'submission.zip', half=True)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file/submission.zip cannot be written .*choose a writable folder'):
        utilities.export_submission(clip(), tmp_path / 'file' / 'submission.zip')


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(module, file):
        Path(file).write_bytes(b'half of it')
        raise RuntimeError('PytorchStreamWriter failed writing file data/3\nno stack')

    monkeypatch.setattr(torch.jit, 'save', full)
    (tmp_path / 'submission.zip').write_bytes(b'the last good one')
    with pytest.raises(OSError, match='PytorchStreamWriter failed writing file.*room for the weights'):
        utilities.export_submission(clip(), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'the last good one']


def test_a_rename_that_fails_leaves_the_submission_that_was_there(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', refuse)
    (tmp_path / 'submission.zip').write_bytes(b'the last good one')
    with pytest.raises(OSError, match='submission.zip cannot be written .No space left on device.: choose a writable'):
        utilities.export_submission(clip(), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'the last good one']


# ── The host's score ────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A submission and frames of photographs in two sizes, four objects; one file is greyscale, one has alpha."""
    folder, rows = tmp_path_factory.mktemp('world'), []
    for i in range(24):
        image = photograph([(40, 30), (25, 60)][i % 2], seed=i % 4)[0].permute(1, 2, 0).numpy()
        noisy = Image.fromarray(np.clip(image + np.random.default_rng(i).integers(0, 90, image.shape), 0, 255)
                                .astype(np.uint8))
        noisy = noisy.convert({5: 'L', 6: 'RGBA'}.get(i, 'RGB'))
        noisy.save(folder / f'{i}.png')
        rows.append({'path': str(folder / f'{i}.png'), 'label': f'object {i % 4}', 'domain': 'test'})
    frame = pd.DataFrame(rows)
    utilities.export_submission(clip(dim=8), folder / 'submission.zip')
    return folder / 'submission.zip', frame.iloc[:8], frame.iloc[8:]


def test_the_score_is_that_of_vectors_made_one_by_one(world, capsys):
    zip_path, query, index = world
    report = utilities.evaluate_submission(zip_path, query, index)
    member = clip(dim=8)
    vectors = [np.stack([expected(member, torch.tensor(np.array(Image.open(path).convert('RGB')))
                                  .permute(2, 0, 1)[None])[0].numpy() for path in frame['path']])
               for frame in (query, index)]
    np.testing.assert_allclose(report['query'], vectors[0], atol=1e-5)
    np.testing.assert_allclose(report['index'], vectors[1], atol=1e-5)
    hits = 0
    for vector, label in zip(vectors[0], query['label'], strict=True):
        nearest = np.argsort(((vectors[1] - vector) ** 2).sum(1))
        relevant = (index['label'] == label).to_numpy()
        k = min(5, relevant.sum())
        hits += relevant[nearest[:k]].sum() / k
    assert report['mp5'] == pytest.approx(hits / len(query)) and report['dim'] == 8
    printed = capsys.readouterr().out
    assert '205,000' in printed and 'one by one' in printed
    assert report['hours'] == pytest.approx(205_000 / report['images_per_second'] / 3600)
    assert float(re.findall(r'([\d.]+) photographs/s', printed)[-1]) == pytest.approx(report['images_per_second'], abs=.1)


def test_quick_batches_of_one_size_give_the_same_result(world):
    zip_path, query, index = world
    slow = utilities.evaluate_submission(zip_path, query, index)
    quick = utilities.evaluate_submission(zip_path, query, index, quick=True)
    assert quick['mp5'] == slow['mp5']
    np.testing.assert_allclose(quick['query'], slow['query'], atol=1e-6)
    np.testing.assert_allclose(quick['index'], slow['index'], atol=1e-6)
    assert sorted(map(len, utilities._batches_of_one_size([*query['path'], *index['path']], 8))) == [4, 4, 8, 8]


def test_a_limit_takes_the_first_rows_of_each_frame(world):
    zip_path, query, index = world
    report = utilities.evaluate_submission(zip_path, query, index, limit=5)
    assert len(report['query']) == len(report['index']) == 5


def test_a_file_that_is_no_submission_is_one_sentence(world, tmp_path):
    _, query, index = world
    (tmp_path / 'text.zip').write_text('no zip')
    for name, member in (('other.zip', 'other.pt'), ('wrong.zip', 'saved_model.pt')):
        with zipfile.ZipFile(tmp_path / name, 'w') as archive:
            archive.writestr(member, 'no TorchScript')
    for name in ('text.zip', 'other.zip', 'wrong.zip'):
        with pytest.raises(ValueError, match=f'{name} is not a submission: .*saved_model.pt at its root'):
            utilities.evaluate_submission(tmp_path / name, query, index)


UNFIT = {  # what a stranger's file returns for float (n, 3, h, w), what the sentence says
    'too wide': (lambda x: x.mean((2, 3)).repeat(1, 30), 'gives 90 dimensions'),
    'NaN': (lambda x: x.mean((2, 3)) / 0 * 0, 'returns NaN or infinite values'),
    'no batch axis': (lambda x: x.mean((0, 2, 3)), r'returns the shape \[3\]'),
    'a dictionary': (lambda x: {'vector': x.mean((2, 3))}, 'returns dict'),
    'two vectors': (lambda x: x.mean((2, 3)).repeat(2, 1), r'returns the shape \[\d+, 3\]'),
    'an error': (lambda x: x.view(7, -1), 'stops with ".*shape'),
}


@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('case', UNFIT)
def test_a_submission_that_the_host_cannot_use_is_one_sentence(case, quick, world, tmp_path):
    _, query, index = world
    function, sentence = UNFIT[case]
    traced = torch.jit.trace(Answer(function), photograph((5, 7)), strict=False, check_trace=False)
    traced.save(str(tmp_path / 'saved_model.pt'))
    with zipfile.ZipFile(tmp_path / 'unfit.zip', 'w') as archive:
        archive.write(tmp_path / 'saved_model.pt', 'saved_model.pt')
    with pytest.raises(ValueError, match=f'unfit.zip {sentence}.* at most 64 finite numbers') as error:
        utilities.evaluate_submission(tmp_path / 'unfit.zip', query, index, quick=quick)
    assert '\n' not in str(error.value) and query['path'].iloc[0] in str(error.value)


def test_vectors_whose_length_follows_the_photograph_are_refused(world, tmp_path):
    class Column(nn.Module):
        def forward(self, photograph: torch.Tensor):
            return photograph[:, 0, :, 0].float()

    torch.jit.script(Column()).save(str(tmp_path / 'saved_model.pt'))
    with zipfile.ZipFile(tmp_path / 'unfit.zip', 'w') as archive:
        archive.write(tmp_path / 'saved_model.pt', 'saved_model.pt')
    with pytest.raises(ValueError, match='unfit.zip gives vectors of different lengths'):
        utilities.evaluate_submission(tmp_path / 'unfit.zip', *world[1:])


def test_an_absent_submission_is_named(world, tmp_path):
    for path in (tmp_path / 'none.zip', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'no submission {path}: check the path'):
            utilities.evaluate_submission(path, *world[1:])


@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('name', ['torn.jpg', 'absent.jpg', 'cut.png'])
def test_an_unreadable_photograph_is_named(world, tmp_path, name, quick):
    zip_path, query, index = world
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8\xff')
    (tmp_path / 'cut.png').write_bytes(Path(index['path'].iloc[0]).read_bytes()[:-500])
    query = pd.concat([query, pd.DataFrame([{'path': str(tmp_path / name), 'label': 'object 1'}])])
    with pytest.raises(OSError, match=f'{name} is not a readable photograph .*leave it out of the frame'):
        utilities.evaluate_submission(zip_path, query, index, quick=quick)


if __name__ == '__main__':
    sys.exit(pytest.main([__file__]))
