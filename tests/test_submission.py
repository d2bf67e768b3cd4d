"""The exported file gives the eager model's vectors, here and in PyTorch 1.11, and nothing is half-written.

TORCH111 names the Python of an environment with torch 1.11.0 and torchvision 0.12.0; without it those tests skip.
"""
import json
import os
import re
import subprocess
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

from guie import submission
from guie.checkpoints import save_run
from guie.config import Config
from guie.images import read_image
from guie.model import Embedder, SubcenterHead
from guie.retrieval import mean_precision_at_5
from guie.submission import Submission, at_size, evaluate_submission, export_submission, replay_submission
from guie.towers import TowerSpec, load_image_tower, packed
from tools.host_operators import OUTPUT

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
    spec = TowerSpec('test', 'random', size, (.48, .45, .4), (.26, .25, .27), '', width, {})
    return Embedder(tower, projection=nn.Linear(width, dim), spec=spec)


def clip(quick_gelu=False, dim=3, size=32, seed=0, **vision):
    torch.manual_seed(seed)
    vision = packed({'image_size': size, 'layers': 2, 'width': 32, 'patch_size': 8, 'head_width': 16}) | vision
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
    "quick GELU, PyTorch's own attention": lambda: clip(quick_gelu=True, block_type='default'),
    'layer scale': lambda: clip(ls_init_value=.1),
    'no first norm': lambda: clip(no_ln_pre=True),
    'sin-cos positions': lambda: clip(pos_embed_type='sin_cos_2d'),
    'attentional pooling': lambda: clip(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4),
    'normalised queries': lambda: clip(qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True),
    'resized positions': lambda: at_size(clip(), 1.5),
    'CLIP ResNet': lambda: clip(block_type=None, layers=(1, 1, 1, 1), width=8, size=64),
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


def waves(size, seed=0, n=1):
    """uint8 images (n, 3, h, w): smooth waves with noise, so that resizing both averages and overshoots."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 7, generator=generator)
    smooth = F.interpolate(coarse, size, mode='bilinear') + .2 * torch.randn(n, 3, *size, generator=generator)
    return (smooth * 255).clamp(0, 255).byte()


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


# ── The file and the model ───────────────────────────────────────────────────────────────────────────────────────────

def test_one_file_of_every_family_gives_the_eager_vectors_at_any_size_and_in_batches(families, tmp_path):
    export_submission(Submission(families.values()), tmp_path / 'submission.zip')
    file = load(tmp_path / 'submission.zip', tmp_path)
    for seed, size in enumerate(SIZES):
        images = waves(size, seed, n=2)
        found = outputs(file, [images, images[:1]]).view(3, -1, 3) * len(families) ** .5
        for i, (name, member) in enumerate(families.items()):
            torch.testing.assert_close(found[:2, i], expected(member, images), rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)


def test_the_vectors_of_the_families_depend_on_the_image(families):
    for name, member in families.items():
        a, b = expected(member, waves((40, 40), 1)), expected(member, waves((40, 40), 2))
        assert (a - b).norm() > (1e-6 if 'ResNet' in name else 1e-3), name  # random convolutions see mostly one mean


def test_members_of_different_sizes_heads_and_a_joint_projection_are_concatenated(tmp_path):
    first, second = clip(dim=10), clip(size=48, dim=6, seed=1)
    second.head = SubcenterHead(24, 2, dim=24)
    joint = nn.Linear(16, 5)
    export_submission(Submission([first, second], joint), tmp_path / 'submission.zip')
    image = waves((90, 50))
    with torch.no_grad():
        pixels = F.interpolate(image.float(), (48, 48), mode='bicubic', antialias=True).clamp(0, 255)
        both = torch.cat([expected(first, image), second.eval()(pixels)], 1)
        found = load(tmp_path / 'submission.zip', tmp_path)(image)
        torch.testing.assert_close(found, F.normalize(joint(both)), rtol=0, atol=1e-6)


def test_a_member_may_be_the_path_of_a_run(tmp_path):
    tower = load_image_tower('local-dir:media/miniature')
    model = Embedder(tower, SubcenterHead(tower.spec.width, 2, dim=8)).eval()
    save_run(tmp_path, model, Config())
    image = waves((90, 50))
    assert torch.equal(outputs(Submission([tmp_path]).eval(), [image]), outputs(Submission([model]).eval(), [image]))


def test_the_zip_holds_one_stored_file_of_a_version_that_the_host_reads(tmp_path, capsys):
    export_submission(clip(), tmp_path / 'new' / 'submission.zip')
    assert '3 dimensions' in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / 'new' / 'submission.zip') as archive:
        assert [(entry.filename, entry.compress_type) for entry in archive.infolist()] == [
            ('saved_model.pt', zipfile.ZIP_STORED)]
        with zipfile.ZipFile(archive.extract('saved_model.pt', tmp_path)) as inner:
            assert int(inner.read('saved_model/version')) <= 9
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['submission.zip']
    export_submission(clip(), f'{tmp_path}/other/')
    assert [path.name for path in (tmp_path / 'other').iterdir()] == ['submission.zip']


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = clip(block_type='default').train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_submission(model, tmp_path / 'submission.zip')
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.tower) is open_clip.transformer.VisionTransformer
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_the_resized_image_is_pillows_to_a_grey_level():
    class Seen(nn.Module):
        def forward(self, x):
            self.pixels = x
            return x.mean((2, 3))

    member = embedder(Seen(), 32)
    for size in [(333, 250), (20, 90), (32, 32)]:
        image = waves(size)
        Submission([member]).eval()(image)
        seen = member.tower.pixels[0] * member.std + member.mean
        pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC)
        # Pillow rounds and clips between its two passes, which on this noise moves single values by a few levels
        apart = (seen - torch.tensor(np.array(pillow)).permute(2, 0, 1)).abs()
        assert apart.mean() <= .5 and apart.max() <= 6


# ── Test-time options ────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_flip_makes_an_image_and_its_mirror_image_the_same():
    image = waves((45, 70))
    for flip in (True, False):
        model = Submission([clip(), clip(seed=1)], flip=flip).eval()
        found = outputs(model, [image, image.flip(3)])
        assert torch.allclose(found[0], found[1], atol=1e-5) == flip


def test_each_member_weighs_the_same_however_its_looks_differ():
    members, image = [clip(dim=8), clip(dim=8, seed=1)], waves((45, 70))
    found = outputs(Submission(members, flip=True, sizes=(1, 1.5)).eval(), [image])
    torch.testing.assert_close(found.view(2, 8).norm(dim=1), torch.full((2,), .5 ** .5))


def test_another_size_is_a_whole_number_of_patches():
    larger = at_size(clip(dim=8), 1.3)
    assert larger.spec.image_size == 40  # 41.6 asked for, patches of 8
    assert larger.eval()(waves((40, 40))).shape == (1, 8)


def test_several_sizes_are_the_mean_over_towers_with_open_clips_resized_positions():
    member, image = clip(dim=8), waves((45, 70))
    larger = clip(dim=8, size=48)
    state = {f'visual.{name}': tensor for name, tensor in member.tower.state_dict().items()}
    open_clip.model.resize_pos_embed(state, type('Model', (), {'visual': larger.tower}))
    larger.tower.load_state_dict({name.removeprefix('visual.'): tensor for name, tensor in state.items()})
    larger.projection = member.projection
    found = outputs(Submission([member], sizes=(1, 1.5)).eval(), [image])
    torch.testing.assert_close(found, F.normalize(expected(member, image) + expected(larger, image)), rtol=0, atol=1e-5)


def test_all_options_go_into_one_file_that_holds_the_weights_once(tmp_path):
    members = [clip(width=64), vit('vit_base_patch16_siglip_224', 32, embed_dim=64),
               convolutions('resnet50', layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))]
    model = Submission(members, flip=True, sizes=(1, 1.5)).eval()
    export_submission(model, tmp_path / 'all.zip')
    weights = sum(tensor.numel() for member in members for tensor in member.state_dict().values()) * 4
    assert (tmp_path / 'all.zip').stat().st_size < 1.1 * weights + 700_000  # the code and alignment of 6 towers
    images = [waves(size) for size in SIZES]
    found = outputs(load(tmp_path / 'all.zip', tmp_path), images)
    torch.testing.assert_close(found, outputs(model, images), rtol=0, atol=1e-5)


# ── The host's own PyTorch ───────────────────────────────────────────────────────────────────────────────────────────

def images_of(sizes):
    return [waves(tuple(map(int, size)), seed) for seed, size in enumerate(sizes)]


def run_on_host(*command):
    """A program in PyTorch 1.11, in a process of its own: an error inside a file can end the whole process."""
    done = subprocess.run([TORCH111, *command], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def replay_on_host(zip_path, images, tmp_path):
    np.savez(tmp_path / 'images.npz', **{f'image{i:02}': image.numpy() for i, image in enumerate(images)})
    script = Path(__file__).with_name('replay_host.py')
    said = run_on_host(script, zip_path, tmp_path / 'vectors.npy', tmp_path / 'images.npz')
    assert 'PyTorch 1.11.' in said
    return torch.from_numpy(np.load(tmp_path / 'vectors.npy'))


@needs_torch111
def test_pytorch_1_11_gives_the_eager_vectors_of_every_family_on_50_odd_images(families, tmp_path):
    sizes = [*SIZES, (2, 2), (1, 2), (3, 2000), (2000, 3), *np.random.default_rng(0).integers(1, 400, (38, 2))]
    model, images = Submission(families.values()).eval(), images_of(sizes)
    export_submission(model, tmp_path / 'submission.zip')
    found, wanted = replay_on_host(tmp_path / 'submission.zip', images, tmp_path), outputs(model, images)
    apart = (found - wanted).abs().view(len(images), -1, 3).amax((0, 2)) * len(families) ** .5
    print({name: f'{value:.1e}' for name, value in zip(families, apart.tolist(), strict=True)})
    assert apart.max() <= 1e-5


@needs_torch111
def test_pytorch_1_11_runs_every_test_time_option_in_one_file_also_on_large_images(tmp_path):
    model = Submission([clip(width=64), vit('eva02_tiny_patch14_224', 28)], flip=True, sizes=(1, 1.5)).eval()
    export_submission(model, tmp_path / 'all.zip')
    images = images_of([*SIZES, (1200, 1600), (4000, 6000)])
    found = replay_on_host(tmp_path / 'all.zip', images, tmp_path)
    torch.testing.assert_close(found, outputs(model, images), rtol=0, atol=1e-5)


@needs_torch111
def test_the_operators_that_a_file_may_use_are_those_of_pytorch_1_11():
    tool = Path('tools/host_operators.py').resolve()
    program = (f'import json, runpy, torch; found = runpy.run_path({str(tool)!r})["operators"]; '
               'print(json.dumps(found(torch._C._jit_get_all_schemas())))')
    known = json.loads(OUTPUT.read_text())
    assert json.loads(run_on_host('-c', program).splitlines()[-1]) == known
    assert not {'aten::scaled_dot_product_attention', 'aten::pad', 'aten::rms_norm'} & set(known)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

class Answer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, image):
        return self.function(image.float())


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.RMSNorm(8))

    def forward(self, image):
        return F.normalize(self.inner(F.adaptive_avg_pool2d(image.float(), 2)))


def broken_clip():
    member = clip()
    with torch.no_grad():
        member.tower.conv1.weight[0, 0, 0, 0] = float('nan')
    return member


UNUSABLE = {
    'too wide': (lambda: clip(dim=65), 'has 65 dimensions, more than 64'),
    'NaN weights': (broken_clip, 'float32 of length nan, not float32 of length 1'),
    'no batch axis': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)))[0]), r'has shape \[3\]'),
    'not a tensor': (lambda: Answer(lambda x: {'vector': x}), r'has shape \[\], not \(1, dim\)'),
    'double': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)).double())), 'float64 of length 1, not float32'),
    'not normalised': (lambda: Answer(lambda x: x.mean((2, 3))), r'float32 of length [\de+.]*, not float32 of length 1'),
    'newer operator': (Norm, 'no operator rms_norm, which inner.2 uses'),
    'newer arguments': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3), True).squeeze((2, 3)))), 'no operator squeeze'),
    'frozen decision': (lambda: Answer(lambda x: F.normalize(x.mean((2, 3)) - (9 if x.shape[2] < 9 else 900))),
                        'a trace freezes'),
    'no images': (lambda: nn.Linear(3, 3), r'uint8 image \(1, 3, 37, 53\) stops it with'),
}


@pytest.mark.parametrize('case', UNUSABLE)
def test_an_unusable_model_is_one_sentence_and_an_existing_submission_stays(case, tmp_path):
    build, sentence = UNUSABLE[case]
    path = tmp_path / 'submission.zip'
    path.write_bytes(b'the last good one')
    with pytest.raises(ValueError, match=sentence) as error:
        export_submission(build(), path)
    assert '\n' not in str(error.value)
    assert path.read_bytes() == b'the last good one' and list(tmp_path.iterdir()) == [path]


def test_a_file_of_a_newer_version_than_the_host_reads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, 'HOST_ARCHIVE', 2)
    with pytest.raises(ValueError, match='has version . and PyTorch 1.11 reads up to 2'):
        export_submission(clip(), tmp_path / 'submission.zip')
    assert not list(tmp_path.iterdir())


def full_disk(module, file):
    Path(file).write_bytes(b'half of it')
    raise RuntimeError('PytorchStreamWriter failed writing file data/3\nno stack')


def no_rename(source, target):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('owner, name, fails, words', [
    (torch.jit, 'save', full_disk, 'PytorchStreamWriter failed writing file data/3'),
    (os, 'replace', no_rename, 'No space left on device')])
def test_a_disk_that_refuses_is_one_sentence_and_the_submission_that_was_there_stays(
        owner, name, fails, words, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, fails)
    (tmp_path / 'submission.zip').write_bytes(b'the last good one')
    with pytest.raises(OSError, match=rf'submission.zip could not be written \({words}\): free some space'):
        export_submission(clip(), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'the last good one']


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file/submission.zip could not be written .*choose another folder'):
        export_submission(clip(), tmp_path / 'file' / 'submission.zip')


# ── The host's score ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A submission and splits of images in two sizes, four objects; one file is greyscale, one has alpha."""
    folder, rows = tmp_path_factory.mktemp('world'), []
    for i in range(24):
        image = waves([(40, 30), (25, 60)][i % 2], seed=i % 4)[0].permute(1, 2, 0).numpy()
        noisy = Image.fromarray(np.clip(image + np.random.default_rng(i).integers(0, 90, image.shape), 0, 255)
                                .astype(np.uint8))
        noisy = noisy.convert({5: 'L', 6: 'RGBA'}.get(i, 'RGB'))
        noisy.save(folder / f'{i}.png')
        rows.append({'path': str(folder / f'{i}.png'), 'label': f'object {i % 4}', 'domain': 'test'})
    frame = pd.DataFrame(rows)
    export_submission(clip(dim=8), folder / 'submission.zip', reference=frame)
    return folder / 'submission.zip', frame.iloc[:8], frame.iloc[8:]


def vectors_of(member, frame):
    """Unit vectors of a table's images, made one by one."""
    images = [np.array(Image.open(path).convert('RGB')) for path in frame['path']]
    return np.stack([expected(member, torch.tensor(image).permute(2, 0, 1)[None])[0].numpy() for image in images])


def test_the_score_is_that_of_vectors_made_one_by_one(world, capsys):
    zip_path, query, index = world
    report = evaluate_submission(zip_path, query, index)
    vectors = [vectors_of(clip(dim=8), frame) for frame in (query, index)]
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
    assert float(re.findall(r'([\d.]+) images/s', printed)[-1]) == pytest.approx(report['images_per_second'], abs=.1)


def test_the_reference_holds_a_few_images_and_what_the_file_returns_for_them(world, tmp_path):
    zip_path, query, index = world
    with np.load(zip_path.with_name('reference.npz')) as reference:
        images, vectors = torch.from_numpy(reference['images']), reference['vectors']
    assert images.shape == (16, 3, 96, 96) and vectors.shape == (16, 8)
    first = np.asarray(read_image(query['path'].iloc[0], 96))
    assert np.array_equal(images[0].permute(1, 2, 0), first)
    np.testing.assert_allclose(outputs(load(zip_path, tmp_path), images.split(1)), vectors, atol=1e-5)


@pytest.mark.parametrize('objects', [2, None])
def test_a_replay_stands_beside_the_score_of_the_notebooks_own_vectors(world, objects, capsys):
    zip_path, query, index = world
    splits = {'query': query.reset_index(drop=True), 'index': index.reset_index(drop=True)}
    member, projection = clip(dim=8), lambda wide: 2 * wide[:, 5:]
    wide = {part: np.concatenate([np.full((len(splits[part]), 5), 9, np.float32), vectors_of(member, splits[part])], 1)
            for part in splits}
    few, replay = replay_submission(zip_path, splits, wide, projection, objects=objects)
    first = splits['query']['label'].unique()[:objects]
    for part in splits:
        wanted = splits[part][splits[part]['label'].isin(first)]
        assert few[part]['path'].tolist() == wanted['path'].tolist()
        np.testing.assert_allclose(replay[part], wide[part][wanted.index, 5:], atol=1e-5)
    mp5 = mean_precision_at_5(replay['query'], few['query']['label'], replay['index'], few['index']['label'])
    assert f'of the file {mp5:.3f}, of the notebook {mp5:.3f}, on {len(few["query"])} queries' in capsys.readouterr().out


def test_a_file_that_is_no_submission_is_one_sentence(world, tmp_path):
    _, query, index = world
    (tmp_path / 'text.zip').write_text('no zip')
    for name, member in (('other.zip', 'other.pt'), ('wrong.zip', 'saved_model.pt')):
        with zipfile.ZipFile(tmp_path / name, 'w') as archive:
            archive.writestr(member, 'no TorchScript')
    for name in ('text.zip', 'other.zip', 'wrong.zip'):
        with pytest.raises(ValueError, match=f'{name} is not a submission: .*saved_model.pt at its root'):
            evaluate_submission(tmp_path / name, query, index)


UNFIT = {  # what a stranger's file returns for float (1, 3, h, w), what the sentence says
    'too wide': (lambda x: x.mean((2, 3)).repeat(1, 30), r'returns the shape \[1, 90\]'),
    'NaN': (lambda x: x.mean((2, 3)) / 0 * 0, 'returns NaN or infinite values'),
    'no batch axis': (lambda x: x.mean((0, 2, 3)), r'returns the shape \[3\]'),
    'a dictionary': (lambda x: {'vector': x.mean((2, 3))}, 'returns dict'),
    'two vectors': (lambda x: x.mean((2, 3)).repeat(2, 1), r'returns the shape \[2, 3\]'),
    'an error': (lambda x: x.view(7, -1), 'stops with ".*shape'),
}


def zipped(module, path):
    """A stranger's compiled module as a submission."""
    module.save(str(path.with_name('saved_model.pt')))
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(path.with_name('saved_model.pt'), 'saved_model.pt')
    return path


@pytest.mark.parametrize('case', UNFIT)
def test_a_submission_that_the_host_cannot_use_is_one_sentence(case, world, tmp_path):
    _, query, index = world
    function, sentence = UNFIT[case]
    traced = torch.jit.trace(Answer(function), waves((5, 7)), strict=False, check_trace=False)
    with pytest.raises(ValueError, match=f'unfit.zip {sentence}.* at most 64 finite numbers') as error:
        evaluate_submission(zipped(traced, tmp_path / 'unfit.zip'), query, index)
    assert '\n' not in str(error.value) and query['path'].iloc[0] in str(error.value)


def test_vectors_whose_length_follows_the_image_are_refused(world, tmp_path):
    class Column(nn.Module):
        def forward(self, image: torch.Tensor):
            return image[:, 0, :, 0].float()

    path = zipped(torch.jit.script(Column()), tmp_path / 'unfit.zip')
    with pytest.raises(ValueError, match='unfit.zip gives vectors of different lengths'):
        evaluate_submission(path, *world[1:])


def test_an_absent_submission_is_named(world, tmp_path):
    for path in (tmp_path / 'none.zip', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'no submission {path}: check the path'):
            evaluate_submission(path, *world[1:])


UNREADABLE = {'torn.jpg': b'\xff\xd8\xff', 'absent.jpg': None, 'cut.png': 500, 'empty.jpg': b'', 'text.png': b'no image'}


def spoiled(name, folder, whole):
    """An image file that cannot be read."""
    content = UNREADABLE[name]
    content = Path(whole).read_bytes()[:-content] if isinstance(content, int) else content
    (folder / name).unlink(missing_ok=True) if content is None else (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize('name', UNREADABLE)
def test_an_unreadable_image_is_left_out_of_a_replay_and_named_once(world, tmp_path, name, capsys):
    zip_path, query, index = world
    path = spoiled(name, tmp_path, index['path'].iloc[0])
    bad = pd.DataFrame([{'path': path, 'label': 'object 1', 'domain': 'test'}])
    report, whole = evaluate_submission(zip_path, pd.concat([bad, query, bad]), pd.concat([index, bad])), \
        evaluate_submission(zip_path, query, index)
    assert capsys.readouterr().out.count(f'1 images could not be read and were left out, first {path}\n') == 1
    assert report['unreadable'] == [path] and whole['unreadable'] == [] and report['mp5'] == whole['mp5']
    assert all(np.array_equal(report[part], whole[part]) for part in ('query', 'index'))


def test_a_replay_compares_with_the_notebooks_vectors_of_the_same_images(world, tmp_path, capsys):
    zip_path, query, index = world
    bad = pd.DataFrame([{'path': str(tmp_path / 'absent.jpg'), 'label': 'object 1', 'domain': 'test'}])
    splits = {'query': pd.concat([bad, query], ignore_index=True), 'index': pd.concat([bad, index], ignore_index=True)}
    own = {part: np.concatenate([np.full((1, 8), 8 ** -.5, np.float32), vectors_of(clip(dim=8), splits[part].iloc[1:])])
           for part in splits}
    few, replay = replay_submission(zip_path, splits, own, lambda wide: wide)
    assert [len(few[part]) == len(replay[part]) == len(splits[part]) - 1 for part in few] == [True, True]
    of_file, of_notebook = re.search(r'of the file ([.\d]+), of the notebook ([.\d]+)', capsys.readouterr().out).groups()
    assert of_file == of_notebook


def test_too_many_or_only_unreadable_images_are_one_sentence(world, tmp_path):
    zip_path, query, index = world
    bad = query.assign(path=[str(tmp_path / f'{i}.jpg') for i in range(len(query))])
    for frames, options, words in (
            ((bad, index), {}, 'None of 8 images can be read, first .*0.jpg: check the data folder.'),
            ((query, bad), {}, 'None of 8 images can be read'),
            ((query.head(0), index), {}, 'None of 0 images can be read: check the data folder.'),
            ((query, index.head(0)), {}, 'None of 0 images can be read: check the data folder.'),
            ((pd.concat([query, bad]), index), {'max_unreadable': 7},
             'More than 7 images .max_unreadable. cannot be read; the last: .*7.jpg is not a readable image')):
        with pytest.raises(OSError, match=words) as error:
            evaluate_submission(zip_path, *frames, **options)
        assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_the_reference_is_of_the_first_images_that_can_be_read(world, tmp_path, capsys):
    _, query, index = world
    bad = pd.DataFrame([{'path': spoiled(name, tmp_path, query['path'].iloc[0])} for name in UNREADABLE])
    frame = pd.concat([bad, query, index], ignore_index=True)[['path']]
    export_submission(clip(dim=8), tmp_path, reference=frame)
    with np.load(tmp_path / 'reference.npz') as reference:
        assert reference['images'].shape == (16, 3, 96, 96) and reference['vectors'].shape == (16, 8)
        assert np.array_equal(reference['images'][0].transpose(1, 2, 0), read_image(query['path'].iloc[0], 96))
    assert f'5 images could not be read and were left out, first {bad["path"].iloc[0]}' in capsys.readouterr().out
    for images, count in ((bad, 5), (bad.head(0), 0)):
        with pytest.raises(OSError, match=f'None of {count} images can be read'):
            export_submission(clip(dim=8), tmp_path, reference=images)


def test_a_submission_that_cannot_be_unpacked_is_told_apart_from_one_that_is_none(world, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(zipfile.ZipFile, 'extract', full)
    with pytest.raises(OSError, match=r'submission.zip could not be unpacked into .* \(No space left on device\): free'):
        evaluate_submission(*world)
