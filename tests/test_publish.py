"""Publish: what others load from the folder, by open_clip or timm alone, gives the run's own vectors."""
import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from runs import CONFIG, contents, is_one_sentence, new_model, small_model
from safetensors.torch import load_file

from guie import publish as room
from guie.checkpoints import load_run, open_checkpoint, save_run, save_state
from guie.embedding import embed, embed_all
from guie.files import file_hash, write_text
from guie.model import Embedder, SubcenterHead, resize
from guie.projection import concatenate, fit_pca
from guie.publish import publish
from guie.results import save_ensemble, save_results
from guie.scores import score_table
from guie.splits import Splits
from guie.text import load_text_tower
from guie.towers import load_image_tower

TIMM = CONFIG.override(model_name='timm:test_vit', pretrained='random', image_size=48, head_norm=True)


def changed(model, seed):
    """The model after something like training: every weight moved a little, and a head's norm with statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (value for value in model.state_dict().values() if value.is_floating_point()):
            tensor += .02 * torch.randn(tensor.shape, generator=generator).abs() * (tensor.abs().mean() + .1)
    return model.eval()


@pytest.fixture(scope='module')
def splits(tiny_world):
    """12 objects, two queries each, in two domains."""
    table = pd.read_csv(tiny_world / 'train.csv')
    table = table.assign(path=[str(tiny_world / name) for name in table['path']], domain='emoji')
    table.loc[36:, 'domain'] = 'pictures | of <emoji>'
    query = table[table.groupby('label').cumcount() < 2]
    return Splits({name: part.reset_index(drop=True) for name, part in
                   (('query', query), ('index', table.drop(query.index)), ('pca', table))})


def complete(run, model, splits):
    """Saves the results of a run as a notebook does; returns its vectors."""
    vectors = embed_all(model, splits)
    save_results(run, score_table('ingredient', run.name, vectors, splits), vectors, splits)
    return vectors


@pytest.fixture(scope='module')
def runs(splits, tmp_path_factory):
    """A folder of two finished runs, clip and timm, and their ensemble."""
    folder, vectors = tmp_path_factory.mktemp('runs'), {}
    for name, config in (('clip', CONFIG), ('timm', TIMM)):
        model = changed(new_model(config), seed=len(name))
        save_run(folder / name, model, config, data='72 images of 12 classes (12 emoji), hash 01ab', step=7)
        vectors[name] = complete(folder / name, model, splits)
    joined = {part: concatenate([vectors[name][part] for name in vectors]) for part in splits}
    projection = fit_pca(joined['pca'], 12)
    save_ensemble(folder / 'both', [folder / 'clip', folder / 'timm'], projection)
    save_results(folder / 'both', score_table('ensemble', 'both', joined, splits, projection=projection), joined, splits,
                 projection)
    return folder


@pytest.fixture(scope='module')
def published(runs, tmp_path_factory):
    """Folder of each of them, published."""
    folder = tmp_path_factory.mktemp('published')
    return {name: publish(runs / name, folder / name) for name in ('clip', 'timm', 'both')}


def random_image(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


IMAGE = pd.DataFrame({'path': ['image.jpg'], 'label': ['']})


def save_image(pixels):
    """Saves image.jpg without a loss, whatever its name says."""
    Image.fromarray(pixels).save('image.png')
    Path('image.png').replace('image.jpg')


def snippet(folder):
    """The Python of a card."""
    return re.search('```python\n(.*?)```', (folder / 'README.md').read_text(), re.S).group(1)


# What others load

def test_open_clip_alone_gives_the_towers_vectors(runs, published):
    folder = published['clip']
    assert {path.name for path in folder.iterdir()} == {
        'README.md', 'open_clip_config.json', 'open_clip_model.safetensors', 'projection.safetensors', 'model.safetensors'}
    clip, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{folder}')
    images = [random_image(32, seed) for seed in range(3)]
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        found = clip.eval().encode_image(pixels, normalize=True)
        expected = load_run(runs / 'clip', tower=True)(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert torch.allclose(found, expected, atol=1e-5)
    pretrained = load_file('media/miniature/open_clip_model.safetensors')
    assert not torch.equal(clip.visual.conv1.weight, pretrained['visual.conv1.weight'])


def test_the_text_half_is_the_pretrained_one_with_its_words(published):
    texts = ['a red apple', 'a dog']
    folders = published['clip'], 'media/miniature'
    found, expected = (load_text_tower(f'local-dir:{folder}')(texts) for folder in folders)
    assert np.array_equal(found, expected)
    whole = load_file(published['clip'] / 'open_clip_model.safetensors')
    pretrained = load_file('media/miniature/open_clip_model.safetensors')
    assert whole.keys() == pretrained.keys()
    assert all(torch.equal(whole[name], pretrained[name]) for name in whole if not name.startswith('visual.'))


def test_timm_alone_gives_the_towers_vectors(runs, published):
    assert {path.name for path in published['timm'].iterdir()} == {'README.md', 'config.json', 'model.safetensors', 'run'}
    model = timm.create_model(f'local-dir:{published["timm"]}', pretrained=True).eval()
    facts = timm.data.resolve_model_data_config(model)
    image = random_image(48)
    pixels = timm.data.create_transform(**facts)(Image.fromarray(image))[None]
    with torch.inference_mode():
        expected = load_run(runs / 'timm', tower=True)(torch.from_numpy(image).permute(2, 0, 1)[None])
        assert torch.allclose(F.normalize(model(pixels)), expected, atol=1e-5)


@pytest.mark.parametrize('name, side', [('clip', 32), ('timm', 48), ('both', None)])
def test_the_code_of_the_card_gives_the_runs_own_vector(runs, published, monkeypatch, tmp_path, name, side):
    """Of a square of the tower's side exactly; of any other image up to how two libraries resize."""
    folder = tmp_path / name
    shutil.copytree(published[name], folder)
    monkeypatch.chdir(folder)
    for pixels in filter(None, (side, 200)):
        save_image(random_image(pixels) if pixels == side else np.repeat(np.repeat(random_image(10), 20, 0), 40, 1))
        exec(snippet(folder), made := {})
        expected = embed(load_run(runs / name), IMAGE)
        assert made['vector'].shape == expected.shape == (1, {'clip': 32, 'timm': 32, 'both': 12}[name])
        if pixels == side:
            assert np.abs(made['vector'].numpy() - expected).max() < 1e-5
        else:
            assert (made['vector'].numpy() * expected).sum() > .98
    lines = [line for line in snippet(folder).splitlines() if line.startswith('    ')]
    assert len(lines) == {'clip': 7, 'timm': 8, 'both': 16}[name]


@pytest.mark.parametrize('kind', ['turned', 'transparent', 'grey'])
def test_the_code_of_the_card_reads_images_as_the_run_does(runs, published, monkeypatch, tmp_path, kind):
    shutil.copytree(published['clip'], tmp_path / 'clip')
    monkeypatch.chdir(tmp_path / 'clip')
    image = Image.fromarray(random_image(32))
    if kind == 'turned':
        exif = Image.Exif()
        exif[274] = 6
        image.save('image.png', exif=exif)
    elif kind == 'transparent':
        image.putalpha(Image.fromarray(random_image(32, 1)[..., 0]))
        image.save('image.png')
    else:
        image.convert('L').save('image.png')
    Path('image.png').replace('image.jpg')
    exec(snippet(tmp_path / 'clip'), made := {})
    assert np.abs(made['vector'].numpy() - embed(load_run(runs / 'clip'), IMAGE)).max() < .02


@pytest.mark.parametrize('name', ['clip', 'timm', 'both'])
def test_load_run_takes_the_folder_too_wherever_it_is(runs, published, tmp_path, name, splits):
    shutil.copytree(published[name], tmp_path / 'moved')
    found = embed(load_run(tmp_path / 'moved' / ('run' if name == 'timm' else '')), splits['query'])
    assert np.array_equal(found, embed(load_run(runs / name), splits['query']))


def test_the_run_itself_takes_no_space_twice_and_stays_when_its_folder_goes(runs, published):
    assert (published['clip'] / 'model.safetensors').samefile(runs / 'clip/model.safetensors')


def test_a_run_without_head_or_projection_is_published_as_what_it_is(tmp_path, monkeypatch):
    model = Embedder(changed(new_model(), 3).tower).eval()
    save_run(tmp_path / 'tower', model, CONFIG)
    folder = publish(tmp_path / 'tower', tmp_path / 'out')
    assert 'unit vectors of 128 numbers' in (folder / 'README.md').read_text()
    assert not (folder / 'projection.safetensors').exists()
    monkeypatch.chdir(folder)
    save_image(random_image(32))
    exec(snippet(folder), made := {})
    assert np.allclose(made['vector'], embed(load_run(tmp_path / 'tower'), IMAGE), atol=1e-5)


def test_without_the_text_half_the_folder_is_smaller_and_says_so(runs, tmp_path):
    folder = publish(runs / 'clip', tmp_path / 'out', text=False)
    clip, images = open_clip.create_model(f'local-dir:{folder}').eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(clip.encode_image(images), load_run(runs / 'clip').tower(images), atol=1e-5)
    assert not clip.token_embedding.weight.any()
    assert '| text half | none, but zeros in its place' in (folder / 'README.md').read_text()


def test_a_text_half_that_cannot_be_loaded_is_one_sentence_and_nothing_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no media/miniature
    monkeypatch.setattr('guie.towers.REPOSITORY', tmp_path)
    with pytest.raises(ValueError, match='text half .* is missing .*: turn the internet on, or pass text=False') as error:
        publish(runs / 'clip', tmp_path / 'out')
    assert is_one_sentence(error) and list(tmp_path.iterdir()) == []
    publish(runs / 'clip', tmp_path / 'out', text=False)


def test_patches_that_overlap_are_refused_with_the_way_out(tmp_path):
    model = new_model()
    resize(model, 32, overlap=.5)
    save_run(tmp_path / 'run', model, CONFIG)
    words = 'stride 8, side 16.*open_clip cannot build: share .* or export it by export_onnx'
    with pytest.raises(ValueError, match=words) as error:
        publish(tmp_path / 'run', tmp_path / 'out')
    assert is_one_sentence(error) and not (tmp_path / 'out').exists()


def test_a_tower_of_your_own_is_refused(tmp_path, monkeypatch):
    save_run(tmp_path / 'run', small_model(), CONFIG)
    monkeypatch.setattr(room, 'load_run', lambda checkpoint: small_model())
    with pytest.raises(ValueError, match='tower of your own') as error:
        publish(tmp_path / 'run', tmp_path / 'out')
    assert is_one_sentence(error)


def test_a_folder_from_which_a_library_builds_another_tower_is_refused(runs, tmp_path, monkeypatch):
    def other(*arguments, **options):
        return changed(made(*arguments, **options), 9)

    made = open_clip.create_model
    monkeypatch.setattr(open_clip, 'create_model', lambda name, **options: (
        other if '/.part-' in name else made)(name, **options))
    with pytest.raises(ValueError, match='open_clip .* builds another tower') as error:
        publish(runs / 'clip', tmp_path / 'out')
    assert is_one_sentence(error) and list(tmp_path.iterdir()) == []


# Where it is written

def test_a_folder_with_something_else_in_it_is_left_alone(runs, tmp_path):
    for name in ('mine', 'README.md'):
        folder = tmp_path / f'with {name}'
        write_text(folder / name, 'mine')
        before = contents(folder)
        with pytest.raises(FileExistsError, match='holds something that publish did not write') as error:
            publish(runs / 'clip', folder)
        assert is_one_sentence(error) and contents(folder) == before
    with pytest.raises(FileExistsError):
        publish(runs / 'clip', runs / 'clip')
    with pytest.raises(FileExistsError):
        publish(runs / 'clip', tmp_path / 'with mine/mine')


def test_a_published_folder_is_written_again_and_what_is_left_is_named(runs, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    publish(runs / 'timm', tmp_path / 'out')
    publish(runs / 'clip', tmp_path / 'out', text=False)
    assert '3 files are there from before, first config.json' in capsys.readouterr().out
    assert load_run(tmp_path / 'out').spec.model_name == CONFIG.model_name


def test_a_place_that_cannot_be_written_is_one_sentence(runs, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='could not be written .*: free some space or choose another folder') as error:
        publish(runs / 'clip', tmp_path / 'file/out', text=False)
    assert is_one_sentence(error)


# Upload

class Hub:
    """A stand-in for huggingface_hub.HfApi that notes its calls."""
    calls, fails = [], None

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(('create', repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path):
        if self.fails:
            raise self.fails
        self.calls.append(('upload', repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_nothing_is_uploaded_unless_asked_for(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    monkeypatch.setattr(Hub, 'calls', calls := [])
    publish(runs / 'clip', tmp_path / 'out', text=False)
    assert calls == [] and 'nothing was uploaded' in capsys.readouterr().out
    publish(runs / 'clip', tmp_path / 'out', text=False, to='huggingface', repo='me/model')
    assert calls == [('create', 'me/model', True, True), ('upload', 'me/model', sorted(
        path.name for path in (tmp_path / 'out').iterdir()))]
    assert 'uploaded to huggingface as me/model' in capsys.readouterr().out
    monkeypatch.setattr(Hub, 'fails', ConnectionError('401 Client Error\nmore'))
    with pytest.raises(RuntimeError, match=r'is complete, but was not uploaded .*\(401 Client Error\): log in') as error:
        publish(runs / 'clip', tmp_path / 'again', text=False, to='huggingface', repo='me/model')
    assert is_one_sentence(error) and (tmp_path / 'again/README.md').exists()


def test_kaggle_gets_the_folder_by_its_own_package(runs, tmp_path, monkeypatch):
    package = tmp_path / 'packages/kagglehub'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text('calls = []\ndef model_upload(handle, local_model_dir):\n'
                                         '    calls.append((handle, local_model_dir))\n')
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, 'kagglehub', raising=False)
    publish(runs / 'clip', tmp_path / 'out', text=False, to='kaggle', repo='me/model/pyTorch/h')
    assert sys.modules.pop('kagglehub').calls == [('me/model/pyTorch/h', str(tmp_path / 'out'))]


def test_a_missing_package_or_name_is_one_sentence_before_anything_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'find_spec', lambda name: None)
    for options, kind, words in (({'to': 'kaggle', 'repo': 'a/b/c/d'}, RuntimeError, 'needs the package kagglehub: run'),
                                 ({'to': 'huggingface', 'repo': 'a/b'}, RuntimeError, 'huggingface_hub: run `pip install'),
                                 ({'to': 'hf', 'repo': 'a/b'}, ValueError, "to is 'hf' and repo is 'a/b': give both"),
                                 ({'to': 'kaggle'}, ValueError, 'repo is None: give both to upload'),
                                 ({'repo': 'a/b'}, ValueError, 'to is None and repo')):
        with pytest.raises(kind, match=words) as error:
            publish(runs / 'clip', tmp_path / 'out', **options)
        assert is_one_sentence(error) and not (tmp_path / 'out').exists()


# Ensembles

def test_members_of_equal_names_have_folders_of_their_own(runs, tmp_path, splits):
    for tower in ('h', 'l'):
        shutil.copytree(runs / 'clip', tmp_path / tower / 'soup')
    other = tmp_path / 'l/soup/model.safetensors'
    save_state(load_file(other) | {'head.embedding.weight': torch.randn(32, 128)}, other, open_checkpoint(other).metadata,
               overwrite=True)
    members = [tmp_path / tower / 'soup' for tower in ('h', 'l')]
    joined = concatenate([embed(load_run(member, dim=None), splits['pca']) for member in members])
    save_ensemble(tmp_path / 'both', members, fit_pca(joined, 8))
    folder = publish(tmp_path / 'both', tmp_path / 'out', text=False)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {'soup_1', 'soup_2'}
    assert np.array_equal(embed(load_run(folder), splits['query']), embed(load_run(tmp_path / 'both'), splits['query']))


def test_an_ensemble_whose_member_is_gone_is_told_as_that(runs, tmp_path):
    (tmp_path / 'both').mkdir()
    shutil.copyfile(runs / 'both/model.safetensors', tmp_path / 'both/model.safetensors')
    with pytest.raises(FileNotFoundError, match='is an ensemble of .*clip, which is not there') as error:
        publish(tmp_path / 'both', tmp_path / 'out')
    assert is_one_sentence(error) and not (tmp_path / 'out').exists()


def test_the_card_of_an_ensemble_names_its_members_and_theirs_are_there(runs, published):
    card = (published['both'] / 'README.md').read_text()
    for row in ('clip | clip', 'timm | timm/run'):
        assert re.search(rf'\| {re.escape(row)} \| [0-9a-f]{{16}} \|', card)
    assert all((published['both'] / name / 'README.md').exists() for name in ('clip', 'timm'))
    assert file_hash(runs / 'timm/model.safetensors') in (published['both'] / 'timm/README.md').read_text()
    assert json.loads((published['both'] / 'timm/config.json').read_text())['architecture'] == 'test_vit'


def test_a_head_with_a_norm_is_folded_into_one_linear_map(published):
    head = SubcenterHead(64, 3, dim=32, norm=True)
    statistics = {'norm.running_mean': torch.randn(64), 'norm.running_var': torch.rand(64) + .1}
    head.load_state_dict(head.state_dict() | statistics)
    tower = load_image_tower('timm:test_vit', 'random', 32)
    maps, features = room.maps_of(Embedder(tower, head)), torch.randn(5, 64)
    assert torch.allclose(features @ maps['head.weight'].T + maps['head.bias'], head.eval()(features), atol=1e-5)
