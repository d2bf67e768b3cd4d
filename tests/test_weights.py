"""Weights in every format: a tower comes back with the outputs, activation and normalisation that it was saved with."""
import json
import tempfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import utilities

MODEL = {'embed_dim': 16, 'vision_cfg': {'image_size': 32, 'patch_size': 16, 'layers': 2, 'width': 32, 'head_width': 16},
         'text_cfg': {'context_length': 8, 'vocab_size': 50, 'width': 32, 'heads': 2, 'layers': 1}}
FACTS = {'gelu': {'mean': (.5, .5, .5), 'std': (.5, .5, .5)},
         'quick_gelu': {'mean': (.48, .46, .41), 'std': (.27, .26, .28), 'quick_gelu': True}}


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """The tiny model under the name ViT-Tiny, its tags named for their activations."""
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'ViT-Tiny', MODEL)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'ViT-Tiny', {
        tag: {'url': 'nowhere', **facts} for tag, facts in FACTS.items()})


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
    return utilities.load_image_tower('ViT-Tiny', activation)


def from_pickled_file_of_a_tag(clip, folder, activation, _):
    torch.save(clip.state_dict(), folder / 'weights')
    return utilities.load_image_tower('ViT-Tiny', f'{activation}@{folder}/weights')


def from_safetensors_file_of_a_tag(clip, folder, activation, _):
    save_file(clip.state_dict(), folder / 'weights.safetensors')
    return utilities.load_image_tower('ViT-Tiny', f'{activation}@{folder}/weights.safetensors')


def from_file_where_all_tags_agree(clip, folder, activation, monkeypatch):
    tags = open_clip.pretrained._PRETRAINED['ViT-Tiny']
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, 'ViT-Tiny', {activation: tags[activation]})
    torch.save(clip.state_dict(), folder / 'weights.pt')
    return utilities.load_image_tower('ViT-Tiny', str(folder / 'weights.pt'))


def from_local_folder(clip, folder, activation, _):
    return utilities.load_image_tower(f'local-dir:{local_folder(clip, folder, activation)}')


def from_hub(clip, folder, activation, monkeypatch):
    local_folder(clip, folder, activation)
    monkeypatch.setattr(open_clip.factory, 'download_pretrained_from_hf', lambda _, filename=None, **__: str(
        folder / (filename or 'open_clip_model.safetensors')))
    return utilities.load_image_tower('hf-hub:someone/tiny')


def from_our_run(clip, folder, activation, monkeypatch):
    tower = from_pickled_file_of_a_tag(clip, folder, activation, monkeypatch)
    utilities.save_run(folder / 'run', utilities.Embedder(tower), utilities.Config())
    return utilities.load_run(folder / 'run').tower


def from_authors_file_and_a_tower(clip, folder, activation, _):
    tower = utilities.load_image_tower('ViT-Tiny', f'{activation}@random')
    return utilities.load_run(authors_file(clip, folder / '0_0.688'), tower).tower


def from_authors_file_as_ingredient(clip, folder, activation, _):
    architecture = {'model_name': 'ViT-Tiny', 'pretrained': activation, 'image_size': 32}
    run, = utilities.link_files('tiny', [authors_file(clip, folder / '0_0.688')], architecture)
    return utilities.load_run(run).tower


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
    run, = utilities.link_files('tiny', authors_file(clip, tmp_path / '0_0.688'), {
        'model_name': 'ViT-Tiny', 'pretrained': 'quick_gelu', 'image_size': 32})
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(FACTS['quick_gelu'][name]).view(3, 1, 1) for name in ('mean', 'std'))
    saved = torch.load(tmp_path / '0_0.688', weights_only=True)
    with torch.inference_mode():
        expected = clip.visual((images / 255 - mean) / std) @ saved['head.emb.weight'].T
        found = utilities.load_run(run)(images)
    assert torch.allclose(found, torch.nn.functional.normalize(expected), atol=1e-5)


def test_a_runs_folder_and_texts_beside_checkpoints_are_understood(registered, tmp_path):
    architecture = {'model_name': 'ViT-Tiny', 'pretrained': 'quick_gelu', 'image_size': 32}
    (tmp_path / 'files').mkdir()
    authors_file(tiny_clip('quick_gelu'), tmp_path / 'files/0_0.688')
    (tmp_path / 'files/README.md').write_text('weights')
    run, = utilities.link_files('tiny', tmp_path / 'files', architecture)
    again, = utilities.link_files('tiny', run, architecture)
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs/one').symlink_to(run)
    third, = utilities.link_files('tiny', tmp_path / 'runs', architecture)
    for other in (again, third):
        assert torch.equal(utilities.load_run(other).tower.proj, utilities.load_run(run).tower.proj)


def test_bare_checkpoints_become_a_soup_that_says_how_it_is_built(registered, tmp_path, caplog):
    folder = tmp_path / 'attached'
    folder.mkdir()
    for seed in (0, 1):
        authors_file(tiny_clip('quick_gelu', seed), folder / f'{seed}_0.688', seed)
    before = sorted(path.name for path in folder.iterdir())
    architectures = {'tiny': {'model_name': 'ViT-Tiny', 'pretrained': 'quick_gelu', 'image_size': 32}}
    found = utilities.find_ingredients(tmp_path / 'runs', ['tiny'], {'tiny': folder}, architectures, search=())
    assert [run.name for run in found['tiny']] == ['tiny_1_0_0.688', 'tiny_2_1_0.688']
    assert not caplog.records  # open_clip warns of random weights, which here are only a place for the file's own
    table = utilities.list_runs(found['tiny'])
    assert table['model_name'].tolist() == ['ViT-Tiny'] * 2 and table['digest'].nunique() == 2
    utilities.save_soup(utilities.average_states(found['tiny']), tmp_path / 'soup', found['tiny'], 'uniform')
    soup, states = utilities.load_run(tmp_path / 'soup'), [
        torch.load(folder / name, weights_only=True) for name in before]
    assert soup.spec.activation == 'quick_gelu' and soup.spec.mean == FACTS['quick_gelu']['mean']
    mean = sum(state['vit_backbone.visual.proj'].double() for state in states) / 2
    assert torch.equal(soup.tower.proj, mean.float())
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_pretrained_tower_that_is_not_here_is_named_and_left_out(registered, tmp_path, capsys):
    files = {name: [authors_file(tiny_clip('gelu'), tmp_path / f'{name}.pt')] for name in ('here', 'absent')}
    torch.save(tiny_clip('gelu').state_dict(), tmp_path / 'weights')
    architectures = {name: {'model_name': 'ViT-Tiny', 'pretrained': f'gelu@{tmp_path}/{file}', 'image_size': 32}
                     for name, file in (('here', 'weights'), ('absent', 'no_such_file'))}
    bases = utilities.base_states(utilities.find_ingredients(tmp_path, files, files, architectures, search=()))
    assert list(bases) == ['here'] and 'tower.proj' in bases['here']
    said = capsys.readouterr().out
    assert 'absent: its pretrained weights are not here' in said and 'no_such_file' in said


def test_bare_checkpoints_of_an_unknown_tower_ask_for_its_architecture(tmp_path):
    with pytest.raises(ValueError, match='INGREDIENTS names mine, of which .* in ARCHITECTURES') as error:
        utilities.find_ingredients(tmp_path, ['mine'], {'mine': [tmp_path / 'file']}, search=())
    assert '\n' not in str(error.value)


def test_finished_runs_of_attached_outputs_are_ingredients_too_and_nothing_is_written_there(registered, tmp_path, capsys):
    own, attached = tmp_path / 'runs', tmp_path / 'input'
    tower = utilities.load_image_tower('ViT-Tiny', 'gelu@random')
    places = [own / 'tiny_none', attached / 'notebook-1/runs/tiny_none', attached / 'a/b/notebook-2/runs/tiny_cutout',
              attached / 'a/b/notebook-2/runs/tiny_cutout/tiny_cutout-stage-1', attached / 'notebook-3/runs/other_none',
              attached / 'too/deep/for/us/runs/tiny_flip']
    for place in places:
        utilities.save_run(place, utilities.Embedder(tower), utilities.Config())
        utilities.Config().save(place / 'config.json')
        (place / 'state').mkdir()
        (place / 'vectors').mkdir()
        (place / 'vectors' / 'query.npz').touch()
        (place / 'state' / 'large').touch()
    before = sorted(attached.rglob('*'))
    found = utilities.find_ingredients(own, ['tiny'], search=(attached,))
    assert [run.name for run in found['tiny']] == ['tiny_none', 'tiny_cutout'] and found['tiny'][0] == places[0]
    assert 'tiny_cutout: taken from' in capsys.readouterr().out
    linked = found['tiny'][1]
    assert utilities.Config.load(linked / 'config.json') == utilities.Config()
    assert {path.name for path in linked.iterdir()} == {'model.safetensors', 'config.json', 'vectors'}
    assert (linked / 'vectors' / 'query.npz').is_symlink()
    assert utilities.state_digest(utilities.open_checkpoint(linked)) == utilities.state_digest(
        utilities.open_checkpoint(places[2]))
    utilities.write_text(linked / 'scores.csv', 'dim,mp5\n64,.5\n')
    assert sorted(attached.rglob('*')) == before
