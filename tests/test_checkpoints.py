"""Checkpoints: weights of every format come back as they were saved, and strangers' files cannot do harm."""
import json
import logging
import os
import pickle
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from runs import CONFIG, contents, is_one_sentence, new_model, same
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from guie import checkpoints
from guie.checkpoints import (
    bare_checkpoints,
    base_state,
    find_ingredients,
    load_run,
    open_checkpoint,
    save_run,
    save_state,
)
from guie.config import Config
from guie.embedding import cached_vectors, embed, vectors_hash
from guie.files import state_hash
from guie.model import Embedder, SubcenterHead, resize
from guie.results import list_runs
from guie.soups import average_states, greedy_soup, save_soup
from guie.towers import load_image_tower

MODEL = {'embed_dim': 16, 'vision_cfg': {'image_size': 32, 'patch_size': 16, 'layers': 2, 'width': 32, 'head_width': 16},
         'text_cfg': {'context_length': 8, 'vocab_size': 50, 'width': 32, 'heads': 2, 'layers': 1}}
FACTS = {'gelu': {'mean': (.5, .5, .5), 'std': (.5, .5, .5)},
         'quick_gelu': {'mean': (.48, .46, .41), 'std': (.27, .26, .28), 'quick_gelu': True}}
ARCHITECTURE = {'model_name': 'ViT-Tiny', 'pretrained': 'quick_gelu', 'image_size': 32}
SPEC = {'model_name': 'ViT-T', 'pretrained': 'x', 'image_size': 64, 'mean': [.5, .5, .5], 'std': [.5, .5, .5],
        'activation': 'gelu', 'width': 8, 'architecture': {}}


@pytest.fixture
def registered(monkeypatch):
    """The tiny model under the name ViT-Tiny, its tags named for their activations."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'ViT-Tiny', MODEL)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'ViT-Tiny', {
        tag: {'url': 'nowhere', **facts} for tag, facts in FACTS.items()})


def random_state(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {'tower.proj': (8, 4), 'tower.bias': (), 'head.embedding.weight': (5, 8), 'head.centers': (6, 4)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def as_authors(state):
    """The state under the names of the original authors' files, with their text tower."""
    ours = {'head.embedding.weight': 'head.emb.weight', 'head.centers': 'head.arc.weight'}
    theirs = {ours.get(name, name.replace('tower.', 'vit_backbone.visual.')): x for name, x in state.items()}
    text = ('transformer.resblocks.0.ln_1.weight', 'token_embedding.weight', 'positional_embedding',
            'ln_final.weight', 'text_projection', 'logit_scale')
    return theirs | {f'vit_backbone.{name}': torch.ones(3) for name in text}


# A tower of every format

def tiny_clip(activation, seed=0):
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**MODEL, quick_gelu=activation == 'quick_gelu').eval()
    for parameter in clip.parameters():
        parameter.data += .1 * torch.randn_like(parameter)  # biases begin at 0, where activations hardly differ
    return clip


def local_folder(clip, folder, activation):
    facts = {name: list(FACTS[activation][name]) for name in ('mean', 'std')}
    config = {'model_cfg': MODEL | {'quick_gelu': activation == 'quick_gelu'}, 'preprocess_cfg': facts}
    (folder / 'open_clip_config.json').write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in clip.state_dict().items()}, folder / 'open_clip_model.safetensors')
    return folder


def authors_file(clip, path, head_seed=0):
    """As the original authors saved a model: pickled, the text tower and the buffers with it."""
    torch.manual_seed(head_seed)
    state = {f'vit_backbone.{name}': tensor for name, tensor in clip.state_dict().items()}
    torch.save(state | {'head.emb.weight': torch.randn(8, 16), 'head.arc.weight': torch.randn(4 * 3, 8)}, path)
    return path


def from_tag(clip, folder, activation, monkeypatch):
    torch.save(clip.state_dict(), folder / 'downloaded.pt')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', lambda *_, **__: str(folder / 'downloaded.pt'))
    return load_image_tower('ViT-Tiny', activation)


def from_pickled_file_of_a_tag(clip, folder, activation, _):
    torch.save(clip.state_dict(), folder / 'weights')
    return load_image_tower('ViT-Tiny', f'{activation}@{folder}/weights')


def from_safetensors_file_of_a_tag(clip, folder, activation, _):
    save_file(clip.state_dict(), folder / 'weights.safetensors')
    return load_image_tower('ViT-Tiny', f'{activation}@{folder}/weights.safetensors')


def from_file_where_all_tags_agree(clip, folder, activation, monkeypatch):
    tags = open_clip.pretrained._PRETRAINED['ViT-Tiny']
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'ViT-Tiny', {activation: tags[activation]})
    torch.save(clip.state_dict(), folder / 'weights.pt')
    return load_image_tower('ViT-Tiny', str(folder / 'weights.pt'))


def from_local_folder(clip, folder, activation, _):
    return load_image_tower(f'local-dir:{local_folder(clip, folder, activation)}')


def from_hub(clip, folder, activation, monkeypatch):
    local_folder(clip, folder, activation)
    monkeypatch.setattr(open_clip.factory, 'download_pretrained_from_hf', lambda _, filename=None, **__: str(
        folder / (filename or 'open_clip_model.safetensors')))
    return load_image_tower('hf-hub:someone/tiny')


def from_our_run(clip, folder, activation, monkeypatch):
    tower = from_pickled_file_of_a_tag(clip, folder, activation, monkeypatch)
    save_run(folder / 'run', Embedder(tower), Config())
    return load_run(folder / 'run').tower


def from_authors_file_and_a_tower(clip, folder, activation, _):
    tower = load_image_tower('ViT-Tiny', f'{activation}@random')
    return load_run(authors_file(clip, folder / '0_0.688'), tower).tower


def from_authors_file_as_ingredient(clip, folder, activation, _):
    run, = bare_checkpoints('tiny', [authors_file(clip, folder / '0_0.688')], ARCHITECTURE | {'pretrained': activation})
    return load_run(run).tower


FORMATS = [from_tag, from_pickled_file_of_a_tag, from_safetensors_file_of_a_tag, from_file_where_all_tags_agree,
           from_local_folder, from_hub, from_our_run, from_authors_file_and_a_tower, from_authors_file_as_ingredient]


@pytest.mark.parametrize('activation', FACTS)
@pytest.mark.parametrize('load', FORMATS, ids=lambda load: load.__name__)
def test_a_tower_of_every_format_has_the_outputs_of_the_model_that_was_saved(
        registered, tmp_path, monkeypatch, load, activation):
    clip = tiny_clip(activation)
    tower, images = load(clip, tmp_path, activation, monkeypatch).eval(), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(tower(images), clip.visual(images), atol=1e-6)
    assert tower.spec.activation == activation
    assert (tower.spec.mean, tower.spec.std) == (FACTS[activation]['mean'], FACTS[activation]['std'])


def test_the_activations_give_outputs_that_the_comparison_can_tell_apart():
    images, (one, other) = torch.randn(3, 3, 32, 32), map(tiny_clip, FACTS)
    other.load_state_dict(one.state_dict())
    with torch.inference_mode():
        assert (one.visual(images) - other.visual(images)).abs().max() > 1e-3


def test_an_authors_head_is_loaded_with_its_tower(registered, tmp_path):
    clip = tiny_clip('quick_gelu')
    run, = bare_checkpoints('tiny', authors_file(clip, tmp_path / '0_0.688'), ARCHITECTURE)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(FACTS['quick_gelu'][name]).view(3, 1, 1) for name in ('mean', 'std'))
    saved = torch.load(tmp_path / '0_0.688', weights_only=True)
    with torch.inference_mode():
        expected = clip.visual((images / 255 - mean) / std) @ saved['head.emb.weight'].T
        found = load_run(run)(images)
    assert torch.allclose(found, normalize(expected), atol=1e-5)


# Files

@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {f'module.{name}': x for name, x in state.items()},
    lambda state: {'state_dict': state, 'epoch': 1},
    lambda state: {'model': {f'module.{name}': torch.nn.Parameter(x) for name, x in state.items()}},
], ids=['flat', 'module.', 'state_dict', 'model'])
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_the_original_authors_files_open_as_ours(tmp_path, wrap, zipped):
    torch.save(wrap(as_authors(random_state())), tmp_path / '0_0.688', _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(tmp_path / '0_0.688')
    assert list(opened) == list(random_state()) and same(opened, random_state())
    assert not any(tensor.requires_grad for tensor in opened.values())


def test_the_content_decides_how_a_file_is_read_and_not_its_name(tmp_path):
    state = random_state()
    save_file(state, tmp_path / 'a.pt', {'spec': json.dumps(SPEC)})
    torch.save(state, tmp_path / 'b.safetensors')
    (tmp_path / 'c').symlink_to('b.safetensors')
    for name, metadata in (('a.pt', {'spec': json.dumps(SPEC)}), ('b.safetensors', {}), ('c', {})):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.metadata == metadata and same(checkpoint, state) and checkpoint.name == name
        assert open_checkpoint(checkpoint) is checkpoint


def test_a_checkpoint_tells_its_runs_name_configuration_tower_and_score(tmp_path):
    model = new_model()
    save_run(tmp_path / 'none', model, CONFIG, step=3)
    opened = open_checkpoint(tmp_path / 'none')
    assert (opened.name, opened.path) == ('none', tmp_path / 'none/model.safetensors')
    assert (opened.config, opened.spec, opened.score, opened.metadata['step']) == (CONFIG, model.spec, None, '3')
    (tmp_path / 'none/scores.csv').write_text('stage,dim,mp5\nuntrained,64,.3\ningredient,512,.6\ningredient,64,.5\n')
    assert opened.score == .5
    save_state({'a': torch.zeros(1)}, tmp_path / 'bare.pt')
    assert open_checkpoint(tmp_path / 'bare.pt').config == Config()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / 'trap'
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # the trap does work
    trap.unlink()
    state = {'tower.proj': torch.zeros(2), 'config': Malicious(trap)}
    torch.save(state, tmp_path / 'zip')
    torch.save(state, tmp_path / 'legacy', _use_new_zipfile_serialization=False)
    (tmp_path / 'plain').write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    for name in ('zip', 'legacy', 'plain'):
        with pytest.raises(ValueError, match=f'{name} holds Python objects, which could run code'):
            open_checkpoint(tmp_path / name)
    assert not trap.exists()


def test_a_truncated_or_foreign_file_is_one_sentence(tmp_path):
    save_file(random_state(), tmp_path / 'a')
    torch.save(random_state(), tmp_path / 'b')
    for name in ('a', 'b'):
        whole = (tmp_path / name).read_bytes()
        for size in (1, 8, 9, 200, len(whole) // 2, len(whole) - 1):
            (tmp_path / 'cut').write_bytes(whole[:size])
            with pytest.raises(ValueError, match='cut is truncated, or neither') as error:
                open_checkpoint(tmp_path / 'cut')
            assert '\n' not in str(error.value)
    for content in (b'12345678{"a": 1}', b'\0' * 99, b'PK\3\4' * 9):
        (tmp_path / 'cut').write_bytes(content)
        with pytest.raises(ValueError, match='cut is truncated, or neither'):
            open_checkpoint(tmp_path / 'cut')


@pytest.mark.parametrize('content', [[torch.zeros(2)], {'epoch': 3}, torch.zeros(2),
                                     {'vit_backbone.logit_scale': torch.ones(1)}])
def test_a_file_without_named_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'a')
    with pytest.raises(ValueError, match='holds no tensors of a tower or head'):
        open_checkpoint(tmp_path / 'a')


def test_a_missing_file_or_a_folder_without_one_is_named(tmp_path):
    for path in (tmp_path / 'none.pt', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'no checkpoint {path}'):
            open_checkpoint(path)


def test_a_saved_state_comes_back_with_its_metadata_and_is_readable_by_others(tmp_path):
    state = random_state() | {'t': torch.arange(6.).view(2, 3).T}
    path = tmp_path / 'new' / 'model.safetensors'
    save_state(state, path, {'method': 'uniform'})
    checkpoint = open_checkpoint(path)
    assert state_hash(checkpoint) == state_hash(state)
    assert checkpoint.metadata == {'format': 'pt', 'method': 'uniform'}
    (tmp_path / 'plain').touch()
    assert path.stat().st_mode == (tmp_path / 'plain').stat().st_mode
    assert os.listdir(path.parent) == [path.name]


def test_saving_refuses_an_existing_file_unless_told_and_metadata_that_is_no_text(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_state(random_state(0), path)
    with pytest.raises(FileExistsError, match='overwrite=True'):
        save_state(random_state(1), path)
    with pytest.raises(ValueError, match='unlike alpha'):
        save_state(random_state(1), path, {'alpha': .5}, overwrite=True)
    assert same(load_file(path), random_state(0))
    save_state(random_state(1), path, overwrite=True)
    assert same(load_file(path), random_state(1))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'model.safetensors'
    save_state(random_state(0), path)

    def half(tensors, file, metadata):
        Path(file).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints, 'save_file', half)
    with pytest.raises(OSError, match=f'{path} could not be written .*free some space'):
        save_state(random_state(1), path, overwrite=True)
    assert same(load_file(path), random_state(0)) and os.listdir(tmp_path) == [path.name]


def test_a_mapped_checkpoint_survives_being_saved_over_itself(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_state(random_state(), path)
    save_state(open_checkpoint(path), path, overwrite=True)
    assert same(load_file(path), random_state())


# Runs

@pytest.mark.parametrize('changes', [{}, {'overlap': .5}, {'image_size': 48}, {'head_norm': True, 'subcenters': 2}],
                         ids=['plain', 'overlap', 'resized', 'head'])
def test_a_run_loads_again_with_its_vectors_and_cosines(tmp_path, changes):
    config = CONFIG.override(**changes)
    model = new_model(config)
    if config.head_norm:
        model.head.norm.running_mean.uniform_(-1, 1)
    model.projection = torch.nn.Linear(32, 8)
    save_run(tmp_path, model.eval(), config)
    loaded, images = load_run(tmp_path), torch.randint(256, (4, 3, config.image_size, config.image_size), dtype=torch.uint8)
    with torch.inference_mode():
        for classify in (False, True):
            assert torch.equal(loaded(images, classify), model(images, classify))
    assert loaded.spec == model.spec and not loaded.training


# Ingredients

@pytest.fixture
def nothing_temporary(tmp_path_factory, monkeypatch):
    """Fails when a test leaves anything in the folder of temporary files."""
    folder = tmp_path_factory.mktemp('temporary')
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    yield
    assert not list(folder.iterdir())


def test_finished_runs_are_found_by_their_towers_name_or_the_notebook_to_run_is_named(tmp_path, capsys):
    for name in ('h_none', 'h_flip', 'l_none', 'soup_h', 'h_run/h_run-stage-1'):
        save_state(random_state(), tmp_path / name / 'model.safetensors')
    (tmp_path / 'h_unfinished').mkdir()
    found = find_ingredients(tmp_path, ['h', 'l', 'm'], search=())
    assert {tower: [run.path.parent for run in runs] for tower, runs in found.items()} == {
        'h': [tmp_path / 'h_flip', tmp_path / 'h_none'], 'l': [tmp_path / 'l_none']}
    assert 'm: 0 ingredients' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='no finished run of m or n.*: run train_m.ipynb'):
        find_ingredients(tmp_path, ['m', 'n'], search=())
    deep = tmp_path / 'h_runs'  # a folder of runs may be called as they are
    save_state(random_state(), deep / 'h_none' / 'model.safetensors')
    assert [run.path.parent for run in find_ingredients(deep, ['h'], search=())['h']] == [deep / 'h_none']


def test_attached_runs_are_found_six_levels_deep_and_of_two_with_one_name_the_first_is_taken(
        tmp_path, capsys, nothing_temporary):
    own, attached = tmp_path / 'runs', tmp_path / 'input'
    places = [own / 'tiny_none', attached / 'notebook-1/runs/tiny_none', attached / 'notebook-2/runs/tiny_cutout',
              attached / 'a/notebook-2/runs/tiny_cutout', attached / 'notebook-2/runs/tiny_cutout/tiny_cutout-stage-1',
              attached / 'notebook-3/runs/other_none', attached / '1/2/3/4/5/tiny_deep',
              attached / '1/2/3/4/5/6/tiny_deeper']
    for seed, place in enumerate(places):
        save_state(random_state(seed), place / 'model.safetensors')
    before = contents(attached)
    found = find_ingredients(own, ['tiny'], search=(attached,))
    assert [run.path.parent for run in found['tiny']] == [places[0], places[2], places[6]]
    assert same(found['tiny'][1], random_state(2))
    assert f'tiny_cutout: taken from {places[2]}' in capsys.readouterr().out
    assert contents(attached) == before


def test_a_runs_folder_a_folder_of_runs_and_texts_beside_checkpoints_are_understood(registered, tmp_path):
    clip = tiny_clip('quick_gelu')
    for folder in ('files', 'runs/one', 'runs/two'):
        (tmp_path / folder).mkdir(parents=True)
    authors_file(clip, tmp_path / 'files/0_0.688')
    for name in ('one', 'two'):
        authors_file(clip, tmp_path / 'runs' / name / 'model.safetensors')
    for name in ('README.md', 'scores.csv', 'notes.TXT', 'train.ipynb', 'config.json', '.hidden'):
        (tmp_path / 'files' / name).write_text('no weights')
    (tmp_path / 'runs/README.md').write_text('no weights')
    for given, names in (('files', ['tiny_1_0_0.688']), ('runs/one', ['tiny_1_one']), ('runs', ['tiny_1_one', 'tiny_2_two']),
                         ('files/0_0.688', ['tiny_1_0_0.688'])):
        found = bare_checkpoints('tiny', tmp_path / given, ARCHITECTURE)
        assert [run.name for run in found] == names
        assert all(torch.equal(load_run(run).tower.proj, clip.visual.proj) and run.score is None for run in found)


def test_a_folder_of_ingredients_with_other_things_in_it_gives_what_are_weights(registered, tmp_path, capsys):
    clip, folder = tiny_clip('quick_gelu'), tmp_path / 'files'
    for name in ('.ipynb_checkpoints', 'logs', 'hub', 'run'):
        (folder / name).mkdir(parents=True)
    for name in ('0_0.688', '1_0.690'):
        authors_file(clip, folder / name)
    authors_file(clip, folder / 'run/model.safetensors')
    authors_file(clip, folder / '.ipynb_checkpoints/0_0-checkpoint.688')
    local_folder(clip, folder / 'hub', 'quick_gelu')
    torch.save(clip.state_dict(), folder / 'hub/open_clip_pytorch_model.bin')  # the same model again
    torch.save({'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': []}, folder / 'optimizer.pt')
    torch.save({'cpu': torch.ones(2), 'cuda': [torch.ones(2)]}, folder / 'rng_state.pth')
    (folder / 'cut.pt').write_bytes((folder / '0_0.688').read_bytes()[:999])
    (folder / 'curve.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(99))
    for name in ('README.md', 'config.json', 'args.yaml', '.gitattributes', 'logs/out.log'):
        (folder / name).write_text('{"a": 1}' if name.endswith('json') else 'a few words about it\n' * 9)
    before = contents(folder)
    runs = bare_checkpoints('tiny', folder, ARCHITECTURE)
    assert [run.path.relative_to(folder).as_posix() for run in runs] == [
        '0_0.688', '1_0.690', 'hub/open_clip_model.safetensors', 'run/model.safetensors']
    assert all(torch.equal(run['tower.proj'], clip.visual.proj) for run in runs)
    line, = capsys.readouterr().out.splitlines()
    assert line == (
        f'{folder}: skipped, since .gitattributes is hidden; .ipynb_checkpoints is hidden; README.md is text; args.yaml '
        'is text; config.json is text; curve.png is no file of PyTorch weights; cut.pt is truncated; logs holds no weights; '
        'optimizer.pt holds no tensors of a tower or head; rng_state.pth holds no image tower')
    assert contents(folder) == before


@pytest.mark.parametrize('fill, words', [
    (lambda folder: None, 'holds no weights .it is empty.: give'),
    (lambda folder: (folder / 'README.md').write_text('a few words about it'), 'holds no weights .README.md is text.'),
    (lambda folder: (folder / 'a.pt').touch(), 'holds no weights .a.pt is empty.'),
    (lambda folder: (folder / 'model.safetensors').write_text('version https://git-lfs'), 'is a Git LFS pointer'),
], ids=['nothing', 'text', 'an empty file', 'a pointer'])
def test_a_folder_of_ingredients_without_weights_is_one_sentence(registered, tmp_path, fill, words):
    fill(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        find_ingredients('', ['tiny'], {'tiny': tmp_path}, {'tiny': ARCHITECTURE}, search=())
    assert is_one_sentence(error)


DAMAGES = {
    'cut': lambda file: file.write_bytes(file.read_bytes()[:-1]), 'empty': lambda file: file.write_bytes(b''),
    'a web page': lambda file: file.write_text('<html>'), 'settings that are no JSON': lambda file: save_file(
        {'tower.a': torch.ones(1)}, file, {'config': '{'}), 'nothing in it': lambda file: save_file({}, file)}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_named_and_passed_over(tmp_path, capsys, damage):
    for name in ('h_a', 'h_b'):
        save_state(random_state(), tmp_path / name / 'model.safetensors')
    damage(tmp_path / 'h_a/model.safetensors')
    assert list_runs(tmp_path)['run'].tolist() == ['h_b']
    assert f'{tmp_path}/h_a/model.safetensors is skipped: ' in capsys.readouterr().out
    assert [run.name for run in find_ingredients(tmp_path, ['h'], search=())['h']] == ['h_b']
    assert f'{tmp_path}/h_a is skipped: ' in capsys.readouterr().out


@pytest.mark.parametrize('scores', ['', 'dim', 'a,b\n1,2\n', 'dim,mp5\n64,x\n', 'dim,mp5\n"64,'])
def test_a_damaged_table_of_scores_counts_as_none(tmp_path, capsys, scores):
    save_state(random_state(), tmp_path / 'model.safetensors')
    (tmp_path / 'scores.csv').write_text(scores)
    assert list_runs(tmp_path)['mp5'].isna().all()
    assert capsys.readouterr().out.count('scores.csv cannot be read, so') == 1


def test_bare_checkpoints_become_a_soup_that_says_how_it_is_built(registered, tmp_path, caplog, nothing_temporary):
    paths = [tmp_path / 'attached' / name for name in ('a/0_0.688', 'b/0_0.688')]  # of one name
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        authors_file(tiny_clip('quick_gelu', seed), path, seed)
    before = contents(tmp_path / 'attached')
    with caplog.at_level(logging.WARNING):
        found = find_ingredients(tmp_path / 'runs', ['tiny'], {'tiny': paths}, {'tiny': ARCHITECTURE}, search=())['tiny']
    assert [run.name for run in found] == ['tiny_1_0_0.688', 'tiny_2_0_0.688']
    assert not caplog.records  # open_clip warns of random weights, which here are only a place for the file's own
    table = list_runs(found)
    assert table['run'].tolist() == [run.name for run in found] and table['model_name'].tolist() == ['ViT-Tiny'] * 2
    assert table['hash'].nunique() == 2
    greedy, history = greedy_soup(found, lambda state: 1.)
    assert history['kept'].all() and history['path'].tolist() == list(map(str, paths))
    for method, state in (('uniform', average_states(found)), ('greedy', greedy)):
        save_soup(state, tmp_path / method, found, method)
        soup, states = load_run(tmp_path / method), [torch.load(path, weights_only=True) for path in paths]
        assert soup.spec.activation == 'quick_gelu' and soup.spec.mean == FACTS['quick_gelu']['mean']
        mean = sum(state['vit_backbone.visual.proj'].double() for state in states) / 2
        assert torch.equal(soup.tower.proj, mean.float())
        assert Config.load(tmp_path / method / 'config.json') == Config().override(**ARCHITECTURE)
    with pytest.raises(ValueError, match=f'{paths[0]} does not say how it is built'):
        save_soup(greedy, tmp_path / 'nameless', paths, 'greedy')
    assert contents(tmp_path / 'attached') == before and not (tmp_path / 'nameless').exists()


def test_bare_checkpoints_of_an_unknown_tower_ask_for_its_architecture(tmp_path):
    with pytest.raises(ValueError, match='INGREDIENTS names mine, of which .* in ARCHITECTURES') as error:
        find_ingredients(tmp_path, ['mine'], {'mine': [tmp_path / 'file']}, search=())
    assert '\n' not in str(error.value)


def test_the_pretrained_tower_of_a_run_has_the_size_and_overlap_of_the_run(tmp_path):
    model = new_model()
    resize(model, 48, .5)
    save_run(tmp_path, model, CONFIG.override(overlap=.5, image_size=48))
    with torch.no_grad():
        model.tower.proj += 1
    base = base_state(tmp_path)
    assert {name: tensor.shape for name, tensor in base.items()} == {
        f'tower.{name}': tensor.shape for name, tensor in model.tower.state_dict().items()}
    assert torch.equal(base['tower.proj'] + 1, model.tower.proj)


# Checkpoints of earlier versions

EARLIER_STATE, EARLIER_VECTORS = '81a1dffdd4434fa2', 'b4a3c5f98cf97dc0'  # what that version calls digests of earlier_run


def earlier_run(folder):
    """A run as the version before wrote it: names of Config's fields that are now others or gone, attention of open_clip's
    default blocks; its weights are no random ones, so that their hashes are known."""
    tower = open_clip.CLIP(**MODEL).visual
    state = {f'tower.{name}': tensor for name, tensor in tower.state_dict().items()}
    state |= {'head.embedding.weight': torch.zeros(8, 16), 'head.centers': torch.zeros(12, 8)}
    for number, name in enumerate(sorted(state)):
        state[name] = (torch.arange(state[name].numel()).view(state[name].shape) * (number + 3) % 101 - 50) / 256
    tower.load_state_dict({name.removeprefix('tower.'): x for name, x in state.items() if name.startswith('tower.')})
    spec = {'model_name': 'ViT-Tiny', 'pretrained': 'random', 'image_size': 32, 'mean': [.5, .5, .5], 'std': [.25, .25, .25],
            'activation': 'gelu', 'width': 16, 'architecture': {
                'library': 'open_clip', 'embed_dim': 16, 'quick_gelu': False,
                'vision_cfg': MODEL['vision_cfg'] | {'timm_model_pretrained': False}}}
    config = {'model_name': 'ViT-Tiny', 'pretrained': 'random', 'image_size': 32, 'bands': [[2, 1e-4]], 'head_decay': .25,
              'tower_decay': .5, 'clip_norm': 2.0, 'sampling': 'classes', 'distil': 0.0, 'teacher': '', 'domains': [],
              'partial_centers': 1.0, 'subcenters': 2, 'stages': [{'bands': [[2, 1e-5]], 'sampling': 'photographs'}]}
    folder.mkdir(parents=True)
    metadata = {'format': 'pt', 'spec': json.dumps(spec), 'config': json.dumps(config), 'step': '7'}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / 'model.safetensors', metadata)
    return tower.eval(), state


def test_a_run_of_the_version_before_loads_with_its_vectors_hashes_and_configuration(tmp_path, train, capsys):
    tower, state = earlier_run(tmp_path / 'run')
    model, images = load_run(tmp_path / 'run'), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        features = tower((images / 255 - .5) / .25)
        assert torch.allclose(model(images), normalize(features @ state['head.embedding.weight'].T), atol=1e-6)
    assert len(model.head.centers) == 12 and model.head.subcenters == 2
    assert list_runs(tmp_path)['hash'].tolist() == [EARLIER_STATE]
    paths = np.array(train['path'].tolist(), str)
    np.savez(tmp_path / 'query.npz', vectors=np.ones((72, 8), np.float32), paths=paths, digest=EARLIER_VECTORS)
    assert embed(model, train, cache=tmp_path / 'query.npz').all()  # not those of the images
    assert cached_vectors(tmp_path / 'query.npz', paths[::-1], vectors_hash(model), 32) is None
    config = open_checkpoint(tmp_path / 'run').config
    assert (config.layer_lrs, config.head_weight_decay, config.tower_weight_decay, config.max_grad_norm) == (
        ((2, 1e-4),), .25, .5, 2.)
    assert config.stages == ({'layer_lrs': [[2, 1e-5]]},)
    assert 'used sampling, which is gone' in capsys.readouterr().out


def test_a_soup_of_runs_of_the_version_before_is_saved_with_todays_names(tmp_path):
    for name in ('one', 'two'):
        earlier_run(tmp_path / name)
    runs = [tmp_path / 'one', tmp_path / 'two']
    save_soup(average_states(runs), tmp_path / 'soup', runs, 'uniform')
    assert state_hash(open_checkpoint(tmp_path / 'soup')) == EARLIER_STATE
    assert 'layer_lrs' in json.loads(open_checkpoint(tmp_path / 'soup').metadata['config'])
    assert len(load_run(tmp_path / 'soup').head.centers) == 12


# Malformed checkpoints

def renamed(state, metadata):
    return {name.replace('transformer.', 'backbone.'): value for name, value in state.items()}, metadata


def without(name):
    return lambda state, metadata: ({key: value for key, value in state.items() if key != name}, metadata)


def with_tensor(name, value):
    return lambda state, metadata: ({**state, name: value}, metadata)


def with_metadata(**texts):
    return lambda state, metadata: (state, {**metadata, **texts})


def with_spec(**values):
    return lambda state, metadata: (state, {**metadata, 'spec': json.dumps({**json.loads(metadata['spec']), **values})})


MALFORMED = {  # what is done to a good checkpoint, what the sentence says
    'keys renamed': (renamed, 'does not fit the model in .*backbone'),
    'a tensor missing': (without('tower.proj'), 'tower.proj is missing'),
    'a tensor too many': (with_tensor('tower.extra', torch.zeros(2)), 'tower.extra is not in the model'),
    'a tensor of another shape': (with_tensor('tower.proj', torch.zeros(3, 3)), 'tower.proj has shape'),
    'another architecture': (lambda state, metadata: ({'layer1.weight': torch.zeros(2, 2)}, metadata), 'does not fit'),
    'another number of centres': (with_tensor('head.centers', torch.zeros(7, 32)), 'head.centers has shape'),
    'no centres': (without('head.centers'), 'cannot be built .*head.centers'),
    'an embedding that is no matrix': (with_tensor('head.embedding.weight', torch.zeros(4)), 'cannot be built'),
    'a projection that is no matrix': (with_tensor('projection.weight', torch.zeros(4)), 'cannot be built'),
    'no word on the tower': (lambda state, metadata: (state, {}), 'does not say which tower'),
    'a tower that is no JSON': (with_metadata(spec='{'), 'cannot be built'),
    'a tower without fields': (with_metadata(spec='{}'), 'cannot be built'),
    'a tower that is a list': (with_metadata(spec='[1]'), 'cannot be built'),
    'a tower of no library': (with_spec(architecture={}), 'cannot be rebuilt'),
    'a tower of no known shape': (with_spec(architecture={'library': 'open_clip'}), 'cannot be built .*embed_dim'),
    'a configuration that is no JSON': (with_metadata(config='{'), 'cannot be built'),
    'centres shared by none': (with_metadata(config='{"subcenters": 0}'), 'cannot be built'),
    'centres shared by a text': (with_metadata(config='{"subcenters": "three"}'), 'cannot be built'),
}


@pytest.fixture(scope='module')
def good():
    model = new_model()
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    return state, {'spec': json.dumps(asdict(model.spec)), 'config': json.dumps(asdict(CONFIG))}


@pytest.mark.parametrize('change, words', MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_checkpoint_is_one_sentence_and_stays_as_it_was(tmp_path, good, change, words):
    state, metadata = change(*good)
    save_file(state, tmp_path / 'model.safetensors', metadata)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_run(tmp_path / 'model.safetensors')
    assert '\n' not in str(error.value) and contents(tmp_path) == before


def test_a_tower_of_ones_own_loads_when_it_is_passed_along(tmp_path):
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    tower.spec = load_image_tower(CONFIG.model_name).spec
    model = Embedder(tower, SubcenterHead(8, 4, dim=6)).eval()
    save_state(model.state_dict(), tmp_path / 'weights')
    images = torch.rand(3, 3, 2, 2)
    loaded = load_run(tmp_path / 'weights', tower)
    assert torch.equal(loaded(images), model(images)) and loaded.tower is not tower


def test_no_towers_to_look_for_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='TOWERS is empty') as error:
        find_ingredients(tmp_path, [])
    assert is_one_sentence(error)


def test_a_head_saved_without_a_configuration_keeps_its_number_of_centres(tmp_path):
    model = new_model()
    model.head = SubcenterHead(model.spec.width, 6, dim=16, subcenters=1)
    save_run(tmp_path, model)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.inference_mode():
        found, expected = (one.eval()(images, classify=True) for one in (load_run(tmp_path, dim=None), model))
    assert found.shape == (2, 6) and torch.equal(found, expected)
    save_soup(average_states([tmp_path, tmp_path]), tmp_path / 'soup', [tmp_path, tmp_path], 'uniform')
    assert load_run(tmp_path / 'soup', dim=None).head.subcenters == 1


@pytest.mark.parametrize('dim', [0, -1])
def test_a_model_gives_at_least_one_number(tmp_path, dim):
    save_run(tmp_path, new_model(), CONFIG)
    with pytest.raises(ValueError, match=f'dim is {dim}') as error:
        load_run(tmp_path, dim=dim)
    assert is_one_sentence(error)


def test_an_ingredient_was_trained_and_is_named_as_the_tower_or_begins_so(tmp_path, capsys):
    for name in ('tiny', 'tiny_none', 'tinier_none'):
        save_run(tmp_path / name, new_model(), CONFIG)
    save_soup(average_states([tmp_path / 'tiny']), tmp_path / 'tiny_soup', [tmp_path / 'tiny'], 'uniform')
    found = find_ingredients(tmp_path, ['tiny'], search=())
    assert [run.name for run in found['tiny']] == ['tiny', 'tiny_none']
    assert 'tiny_soup: left out, since it was not trained (method uniform)' in capsys.readouterr().out
