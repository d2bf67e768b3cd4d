"""Weights that people really have: every writer's file is one tower, and what is no weights is told as what it is."""
import argparse
import io
import json
import logging
import os
import pickle
import warnings
import zipfile

import open_clip
import pytest
import timm
import torch
from runs import is_one_sentence
from safetensors.torch import save, save_file

from guie.checkpoints import find_ingredients, load_run, open_checkpoint
from guie.model import Embedder, SubcenterHead
from guie.soups import average_states, save_soup
from guie.text import load_text_tower
from guie.towers import load_image_tower, load_open_clip
from guie.weights import read_weights

MODEL = {'embed_dim': 16, 'vision_cfg': {'image_size': 32, 'patch_size': 8, 'layers': 2, 'width': 32, 'head_width': 16},
         'text_cfg': {'context_length': 8, 'vocab_size': 50, 'width': 32, 'heads': 2, 'layers': 3}}
TIMM = MODEL | {'vision_cfg': {'timm_model_name': 'test_vit', 'timm_pool': 'token', 'timm_proj': 'linear',
                               'image_size': 160}}
COCA = MODEL | {
    'custom_text': True, 'multimodal_cfg': MODEL['text_cfg'] | {'layers': 1}, 'vision_cfg': MODEL['vision_cfg'] | {
        'attentional_pool': True, 'attn_pooler_heads': 2, 'output_tokens': True}}
RESNET = MODEL | {'vision_cfg': {'image_size': 64, 'layers': [1, 1, 1, 1], 'width': 16, 'patch_size': None}}
MODELS = {'tiny': MODEL, 'tiny-custom': MODEL | {'custom_text': True}, 'tiny-timm': TIMM, 'tiny-coca': COCA,
          'tiny-resnet': RESNET}
FACTS = {'mean': (.5, .5, .5), 'std': (.5, .5, .5), 'url': 'nowhere'}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The small models under their names, each with the tag 'own'."""
    for name, model in MODELS.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, model)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {'own': FACTS})


def new_clip(name='tiny', seed=0):
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)
    clip = open_clip.create_model(name).eval()
    logging.disable(logging.NOTSET)
    for parameter in clip.parameters():
        parameter.data += .1 * torch.randn_like(parameter)
    return clip


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


# Every writer's file

def saved(wrap):
    """Writes what wrap makes of a CLIP by torch.save."""
    def write(clip, folder):
        torch.save(wrap(clip), folder / 'file')
        return folder / 'file'
    return write


def as_safetensors(name):
    """Writes safetensors under any name."""
    def write(clip, folder):
        save_file(prefixed('module.', clip.state_dict()), folder / name)
        return folder / name
    return write


def save_pretrained(clip, folder):
    """As open_clip pushes to the hub, with both formats."""
    (folder / 'open_clip_config.json').write_text(json.dumps({'model_cfg': MODEL, 'preprocess_cfg': {}}))
    save_file(clip.state_dict(), folder / 'open_clip_model.safetensors')
    torch.save(clip.state_dict(), folder / 'open_clip_pytorch_model.bin')
    (folder / 'tokenizer.json').write_text('{}')
    return folder


def folder_of_one_file(clip, folder):
    torch.save(clip.state_dict(), folder / 'epoch_1.pt')
    (folder / 'params.txt').write_text('lr: 1')
    return folder


def script(clip, folder):
    """As OpenAI published its models: TorchScript in half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        visual = torch.jit.trace(clip.visual, torch.zeros(1, 3, 32, 32), check_trace=False)
        outer = torch.nn.Module()
        outer.visual, outer.logit_scale = visual, clip.logit_scale
        outer.register_buffer('input_resolution', torch.tensor(32))
        torch.jit.save(torch.jit.script(outer), folder / 'ViT-B-32.pt')
    return folder / 'ViT-B-32.pt'


def authors(clip, **head):
    return prefixed('vit_backbone.', clip.state_dict()) | {f'head.{name}.weight': tensor for name, tensor in head.items()}


def first_place(clip):
    head = {'fc1.weight': torch.zeros(64, 16), 'fc1.bias': torch.zeros(64), 'fc2.weight': torch.zeros(9, 64)}
    return prefixed('module.', prefixed('backbone.', clip.visual.state_dict()) | head)


def model_soups(clip):
    kept = {name: x for name, x in clip.state_dict().items() if not name.startswith('transformer.')}
    return prefixed('model.', kept) | {'classification_head.weight': torch.zeros(9, 16)}


def lightning(clip, prefix):
    return {'epoch': 1, 'pytorch-lightning_version': '2', 'state_dict': prefixed(prefix, clip.state_dict()) | {
        'criterion.weight': torch.zeros(9, 16)}, 'optimizer_states': [{'state': {0: {'step': torch.ones(())}}}]}


def distributed(clip):
    state = prefixed('module.', clip.state_dict())
    return {'epoch': 1, 'name': 'run', 'state_dict': state, 'optimizer': {'state': {0: {'exp_avg': torch.zeros(2)}}},
            'scaler': {'scale': 1.}}


WRITERS = {
    'open_clip training': saved(distributed),
    'open_clip': saved(lambda clip: clip.state_dict()),
    'DDP': saved(lambda clip: prefixed('module.', clip.state_dict())),
    'torch.compile': saved(lambda clip: prefixed('_orig_mod.', clip.state_dict())),
    'torch.compile of DDP': saved(lambda clip: {'state_dict': prefixed('_orig_mod.module.', clip.state_dict())}),
    'compiled blocks': saved(lambda clip: {name.replace('resblocks.1.', 'resblocks.1._orig_mod.'): x
                                           for name, x in clip.state_dict().items()}),
    'Lightning model.': saved(lambda clip: lightning(clip, 'model.')),
    'Lightning net.': saved(lambda clip: lightning(clip, 'net.')),
    'Lightning any': saved(lambda clip: lightning(clip, 'student.clip_model.')),
    'model-soups': saved(model_soups),
    'model-soups in DataParallel': saved(lambda clip: prefixed('module.', model_soups(clip))),
    '1st place': saved(first_place),
    'authors': saved(lambda clip: authors(clip, emb=torch.ones(8, 16), arc=torch.ones(12, 8))),
    "authors' soup": saved(lambda clip: authors(clip, emb=torch.ones(8, 16))),
    'a tower alone': saved(lambda clip: clip.visual.state_dict()),
    'a wrapped tower': saved(lambda clip: {'model_state_dict': prefixed('encoder.', clip.visual.state_dict())}),
    'averaged beside': saved(lambda clip: {'state_dict': new_clip(seed=7).state_dict(), 'best_acc1': torch.ones(()),
                                           'state_dict_ema': clip.state_dict()}),
    'options beside': saved(lambda clip: {'state_dict': clip.state_dict(), 'args': argparse.Namespace(lr=1.)}),
    'half precision': saved(lambda clip: {name: x.half() for name, x in clip.state_dict().items()}),
    'safetensors': as_safetensors('x.safetensors'),
    'safetensors named .bin': as_safetensors('pytorch_model.bin'),
    'safetensors named .pt': as_safetensors('x.pt'),
    'save_pretrained': save_pretrained,
    'a folder of one file': folder_of_one_file,
    'TorchScript': script,
}
LEFT_OUT = {'1st place': 'module.fc1.weight, module.fc1.bias, module.fc2.weight',
            'model-soups': 'classification_head.weight', 'Lightning net.': 'criterion.weight'}


def from_pretrained(path, name='tiny'):
    return load_image_tower(name, f'own@{path}')


def from_run(path, name='tiny'):
    return load_run(path, load_image_tower(name, 'own@random')).tower


def from_ingredient(path, name='tiny', size=32):
    architecture = {'model_name': name, 'pretrained': 'own', 'image_size': size}
    run, = find_ingredients('', ['t'], {'t': [path]}, {'t': architecture}, search=())['t']
    return load_run(run).tower


READERS = [from_pretrained, from_run, from_ingredient]


@pytest.mark.parametrize('read', READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize('writer', WRITERS)
def test_every_writers_file_gives_the_tower_that_was_saved(tmp_path, capsys, writer, read):
    clip, images = new_clip(), torch.randn(2, 3, 32, 32)
    tower = read(WRITERS[writer](clip, tmp_path)).eval()
    tolerance = 2e-3 if writer == 'half precision' else 1e-6
    for name, tensor in clip.visual.state_dict().items():
        torch.testing.assert_close(tower.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    with torch.inference_mode():
        assert torch.allclose(tower(images), clip.visual(images), atol=10 * tolerance)
    said = capsys.readouterr().out
    if writer in LEFT_OUT:
        assert f'left out {LEFT_OUT[writer]}, of neither image tower nor head' in said
    assert ('holds state_dict, state_dict_ema: state_dict_ema is taken' in said) == (writer == 'averaged beside')


@pytest.mark.parametrize('name', ['tiny-custom', 'tiny-timm', 'tiny-coca', 'tiny-resnet'])
def test_towers_of_every_kind_come_with_their_text_from_a_checkpoint_of_training(tmp_path, name):
    clip, file = new_clip(name), tmp_path / 'epoch_1.pt'
    torch.save(distributed(clip), file)
    size = MODELS[name]['vision_cfg']['image_size']
    images, words = torch.randn(2, 3, size, size), torch.randint(50, (2, 8))
    with torch.inference_mode():
        expected = clip.visual(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        for read in (from_pretrained, from_run, lambda path, name: from_ingredient(path, name, size)):
            assert torch.allclose(read(file, name).eval()(images), expected, atol=1e-5)
        whole = load_open_clip(name, f'own@{file}').eval()
        assert torch.allclose(whole.encode_text(words), clip.encode_text(words), atol=1e-6)


@pytest.mark.parametrize('writer', ['open_clip training', 'torch.compile', 'Lightning any', 'half precision', 'authors',
                                    'safetensors named .bin', 'save_pretrained'])
def test_the_text_half_comes_from_every_writers_file_that_has_one(tmp_path, writer):
    clip, words, tolerance = new_clip(), torch.randint(50, (2, 8)), 1e-6 + 5e-3 * (writer == 'half precision')
    file = WRITERS[writer](clip, tmp_path)
    for name in ('tiny', 'tiny-custom'):  # open_clip's two ways to name a text tower
        whole = load_open_clip(name, f'own@{file}').eval()
        assert torch.allclose(whole.logit_scale, clip.logit_scale, atol=1e-2)
        with torch.inference_mode():
            assert torch.allclose(whole.encode_text(words), clip.encode_text(words), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('writer', ['a tower alone', '1st place', 'model-soups', 'TorchScript'])
def test_a_file_without_a_text_half_says_so_when_words_are_asked_for(tmp_path, writer):
    file = WRITERS[writer](new_clip(), tmp_path)
    with pytest.raises(ValueError, match='file holds no text tower|pt holds no text tower') as error:
        load_text_tower('tiny', f'own@{file}')
    assert is_one_sentence(error)


@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {'epoch': 1, 'args': argparse.Namespace(lr=1.), 'state_dict_ema': prefixed('module.', state),
                   'state_dict': {name: torch.zeros_like(x) for name, x in state.items()}},
    lambda state: {'state_dict': prefixed('model.', state)},
    lambda state: {'model': {'state_dict': prefixed('_orig_mod.', state)}},
    lambda state: {'teacher': prefixed('backbone.', state), 'optimizer': {'param_groups': []}},
], ids=['bare', 'timm training', 'Lightning', 'nested', 'DINO'])
@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'test_resnet', 'test_convnext', 'levit_128s'])
def test_timms_checkpoints_load_without_their_classifier(tmp_path, name, wrap):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    torch.save(wrap(model.state_dict()), tmp_path / 'last.pth.tar')
    expected = timm.create_model(name, num_classes=0).state_dict()
    expected = {part: model.state_dict()[part] for part in expected}
    size = timm.get_pretrained_cfg(name).input_size[-1]
    for read in (lambda path, name: load_image_tower(name, str(path)),
                 lambda path, name: load_run(path, load_image_tower(name, 'random')).tower,
                 lambda path, name: from_ingredient(path, name, size)):
        found = read(tmp_path / 'last.pth.tar', f'timm:{name}').state_dict()
        assert list(found) == list(expected) and all(torch.equal(found[part], expected[part]) for part in found)


# Image sizes

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('read', READERS, ids=lambda read: read.__name__)
def test_weights_of_another_image_size_are_interpolated_in_full_precision(tmp_path, capsys, dtype, read):
    clip = new_clip()
    torch.save({name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}, tmp_path / 'file')
    if read is from_pretrained:
        found = load_image_tower('tiny', f'own@{tmp_path}/file', 64)
    elif read is from_run:
        found = load_run(tmp_path / 'file', load_image_tower('tiny', 'own@random', 64)).tower
    else:
        found = from_ingredient(tmp_path / 'file', size=64)
    token, grid = clip.visual.positional_embedding.detach().to(dtype).float().split([1, 16])
    grid = torch.nn.functional.interpolate(grid.T.view(1, 32, 4, 4), size=(8, 8), mode='bicubic', antialias=True)
    expected = torch.cat([token, grid.flatten(2)[0].T])
    assert torch.allclose(found.positional_embedding, expected, atol=1e-6) and found.image_size == (64, 64)
    said = f'{tmp_path}/file: its position embeddings for 4 × 4 patches are interpolated to 8 × 8'
    assert (said in capsys.readouterr().out) == (read is not from_pretrained)  # to which the size was given


def test_a_tags_weights_in_half_precision_come_at_another_size_too(tmp_path, monkeypatch):
    clip = new_clip().half()
    torch.save(clip.state_dict(), tmp_path / 'downloaded.pt')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', lambda *_, **__: str(tmp_path / 'downloaded.pt'))
    tower, own = load_image_tower('tiny', 'own', 64), load_image_tower('tiny', f'own@{tmp_path}/downloaded.pt', 64)
    assert tower.spec.image_size == 64 and tower.positional_embedding.shape == (65, 32)
    assert torch.equal(tower.positional_embedding, own.positional_embedding)


@pytest.mark.parametrize('name, key', [('tiny', 'positional_embedding'), ('tiny-timm', 'trunk.pos_embed'),
                                       ('timm:test_vit', 'pos_embed')])
def test_weights_tuned_at_the_size_that_is_asked_for_are_taken_as_they_are(tmp_path, name, key):
    size = 64 if name == 'tiny' else 192
    tower = load_image_tower(name, 'random', size)
    tower.get_parameter(key).data.normal_()
    torch.save(tower.state_dict(), tmp_path / 'file')
    again = load_image_tower(name, f'{"own@" * (name != "timm:test_vit")}{tmp_path}/file', size)
    assert torch.equal(again.get_parameter(key), tower.get_parameter(key)) and again.spec.image_size == size


# What does not fit

def without(clip, *names):
    return {name: tensor for name, tensor in clip.visual.state_dict().items() if name not in names}


MISFITS = {
    'a tensor is missing': (lambda clip: without(clip, 'proj'), 'in 1 tensors: proj is missing: give the model that'),
    'many are': (lambda clip: without(clip, *[name for name in clip.visual.state_dict() if 'resblocks.1' in name]),
                 'in 12 tensors: transformer.resblocks.1.ln_1.weight, .*_1.bias, .* and 9 more are missing: it looks like 1 '
                 'blocks of width 32 over patches of 8 pixels, the model like tiny'),
    'one too many': (lambda clip: clip.visual.state_dict() | {'extra': torch.ones(1)}, 'extra is not in the model'),
    'another shape': (lambda clip: clip.visual.state_dict() | {'proj': torch.ones(32, 8)},
                      r'in 1 tensors: proj has shape \(32, 8\), not \(32, 16\)'),
    'ViT-B-32': (lambda clip: prefixed('module.visual.', big('ViT-B-32')), 'it looks like ViT-B-32, the model like tiny'),
    'ViT-L-14 of 336 pixels': (lambda clip: big('ViT-L-14-336'), 'it looks like ViT-L-14, the model like tiny'),
    'RN50': (lambda clip: prefixed('visual.', big('RN50')), 'it looks like RN50, the model like tiny'),
    'SigLIP': (lambda clip: prefixed('visual.', big('ViT-B-16-SigLIP')),
               'it looks like 12 blocks of width 768 over patches of 16 pixels, the model like tiny'),
    "timm's": (lambda clip: timm.create_model('test_vit').state_dict(), 'looks like 6 blocks of width 64 over patches of'),
    'nothing in common': (lambda clip: {'a': torch.ones(1)}, 'a is not in the model'),
}


def big(name):
    with torch.device('meta'):
        tower = load_image_tower(name, 'random')
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tower.state_dict().items()}


@pytest.mark.parametrize('read', [from_pretrained, from_run], ids=lambda read: read.__name__)
@pytest.mark.parametrize('wrap, words', MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_and_so_is_the_architecture_that_would(tmp_path, wrap, words, read):
    torch.save(wrap(new_clip()), tmp_path / 'file')
    with pytest.raises(ValueError, match=words.replace(' proj', ' (?:tower.)?proj').replace(
            'tensors: transformer', 'tensors: (?:tower.)?transformer')) as error:
        read(tmp_path / 'file')
    assert 'file does not fit the model in' in str(error.value) and is_one_sentence(error)


# What is no weights

class Stranger:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zipped(**contents):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name, content in contents.items():
            archive.writestr(name.replace('_', '/', 1) if '_' in name else name, content)
    return stream.getvalue()


WHOLE = pickled({'visual.proj': torch.zeros(9, 99)})
NO_WEIGHTS = {
    'empty': (b'', 'is empty: copy or download it again'),
    'Git LFS': (b'version https://git-lfs.github.com/spec/v1\nsize 1\n', 'is a Git LFS pointer .*: run git lfs pull'),
    'HTML': (b'\n<!DOCTYPE html><html>', 'is a web page, saved in place of the weights: download the file itself'),
    'HTML in small letters': (b'<html lang="en">', 'is a web page'),
    'JSON': (b'{"model_cfg": {"embed_dim": 512}}', r'is text \(JSON\), not weights: give the file of weights beside it'),
    'text': (b'# Model card\nThese weights are for you', 'is text, not weights'),
    'a picture': (b'\x89PNG\r\n\x1a\n' + bytes(99), 'is no file of PyTorch weights'),
    'Keras': (b'\x89HDF\r\n\x1a\n' + bytes(99), 'is no file of PyTorch weights'),
    'packed': (b'\x1f\x8b\x08' + bytes(99), 'is packed: unpack it and give the file of weights in it'),
    'a zip': (zipped(model=WHOLE), 'is a zip archive without a state dict: unpack it'),
    'cut': (WHOLE[:len(WHOLE) // 2], 'is truncated, or neither safetensors nor a PyTorch state dict'),
    'cut safetensors': (save({'visual.proj': torch.zeros(9, 99)})[:200], 'is truncated, or neither'),
    'noise': (bytes(range(128, 256)), 'is truncated, or neither'),
    'nothing in it': (pickled({}), 'holds no tensors of a tower or head: save model.state_dict'),
    'a list': (pickled([torch.zeros(2)]), 'holds no tensors of a tower or head'),
    'an optimizer': (pickled({'state': {0: {'step': torch.ones(1)}}, 'param_groups': []}), 'holds no tensors of a tower'),
    'a text tower': (pickled({'token_embedding.weight': torch.zeros(2), 'logit_scale': torch.ones(1)}), 'holds no tensors'),
    "transformers' CLIP": (pickled({'vision_model.embeddings.patch_embedding.weight': torch.zeros(2)}),
                           'has the names of the transformers library'),
    "transformers' DINOv2": (pickled({'embeddings.patch_embeddings.projection.weight': torch.zeros(2)}),
                             'has the names of the transformers library'),
    'a whole model': (pickled(torch.nn.Linear(2, 2)), 'holds Python objects, which could run code when loaded: ask for its'),
}
READ = READERS + [lambda path: load_image_tower('timm:test_vit', str(path)), lambda path: open_checkpoint(path)]


@pytest.mark.parametrize('name', ['file', 'open_clip_pytorch_model.bin', 'model.safetensors'])
@pytest.mark.parametrize('content, words', NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_is_no_weights_is_told_as_what_it_is(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    for read in READ:
        with pytest.raises(ValueError, match=f'{name} {words}') as error:
            read(tmp_path / name)
        assert is_one_sentence(error)


def test_a_folder_without_weights_or_with_several_is_one_sentence(tmp_path):
    for words in ('There is no checkpoint .*model.safetensors or other file of weights', 'holds several files of weights'):
        for read in READ:
            said = 'holds no weights' if read is from_ingredient else words
            with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
                read(tmp_path)
            assert is_one_sentence(error)
        for name in ('a.pt', 'b.bin'):
            (tmp_path / name).write_bytes(b'')


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    (tmp_path / 'file').touch()
    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(OSError, match=r'file cannot be read \(Permission denied\): give') as error:
        read_weights(tmp_path / 'file')
    assert is_one_sentence(error)


@pytest.mark.parametrize('pack', [pickled, lambda content: zipped(a_data=b'', **{'a_data.pkl': pickle.dumps(content),
                                                                                'a_constants.pkl': b''})],
                         ids=['torch.save', 'TorchScript'])
def test_no_strangers_code_runs_whatever_the_archive_says(tmp_path, pack):
    (tmp_path / 'file').write_bytes(pack({'visual.proj': torch.zeros(2), 'args': Stranger(tmp_path / 'trap')}))
    for read in READ:
        with pytest.raises(ValueError, match='file (holds Python objects|is truncated)'):
            read(tmp_path / 'file')
    assert not (tmp_path / 'trap').exists()


# Heads

def test_the_authors_own_soup_embeds_and_is_averaged_without_classes(tmp_path):
    files = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        files.append(saved(lambda clip: authors(clip, emb=torch.eye(8, 16)))(new_clip(seed=seed), tmp_path / str(seed)))
    architecture = {'model_name': 'tiny', 'pretrained': 'own', 'image_size': 32}
    runs = find_ingredients('', ['t'], {'t': files}, {'t': architecture}, search=())['t']
    save_soup(average_states(runs), tmp_path / 'soup', runs, 'uniform')
    soup, images = load_run(tmp_path / 'soup'), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        features = soup.tower((images - soup.mean) / soup.std)
        assert torch.allclose(soup(images), torch.nn.functional.normalize(features[:, :8]), atol=1e-6)
        assert soup(images, classify=True).shape == (2, 0)
    mean = (new_clip(seed=0).visual.proj + new_clip(seed=1).visual.proj) / 2
    assert torch.allclose(soup.tower.proj, mean)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'model.'])
def test_a_wrapped_run_of_ours_keeps_its_head(tmp_path, prefix):
    model = Embedder(load_image_tower('tiny', 'random'), SubcenterHead(16, 4, dim=8, norm=True), torch.nn.Linear(8, 4))
    torch.save(prefixed(prefix, model.state_dict()), tmp_path / 'file')
    again = load_run(tmp_path / 'file', load_image_tower('tiny', 'random'))
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
