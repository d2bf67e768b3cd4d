"""Begin: parameters become settings, data and folders, and what will be done is printed before it starts."""
import re

import pytest

import demo
from guie import begin
from guie.begin import begin_run, begin_soups, begin_zero_shot, data_in_words, kaggle_limits
from guie.checkpoints import save_run
from guie.recipes import follow_recipe
from guie.splits import Splits
from tests.runs import CONFIG, is_one_sentence, new_model
from tests.worlds import table, write_files

PETS = {'cat': 6, 'dog': 6, 'owl': 6}


@pytest.fixture
def pets(tmp_path):
    """A folder of three classes of six images each."""
    folder = tmp_path / 'data' / 'pets'
    write_files(folder, [f'{name}/{name}{number}.jpg' for name, count in PETS.items() for number in range(count)])
    return folder


@pytest.mark.parametrize('given, options, name', [
    ('pets', {}, 'vit_h_224_none_pets'), ('pets', {'recipe': 'lp-ft'}, 'vit_h_224_none_lp-ft_pets'),
    ('dict', {}, 'vit_h_224_none_pets'), ('named', {}, 'vit_h_224_none_mine'), ('nameless', {}, 'vit_h_224_none'),
    ('pets', {'run': 'mine'}, 'mine')])
def test_a_run_is_named_after_what_it_is_made_of(pets, tmp_path, capsys, given, options, name):
    data = {'pets': str(pets), 'dict': {'train': str(pets)}, 'named': {'train': str(pets), 'name': 'mine'},
            'nameless': {'train': str(pets), 'name': ''}}[given]
    config, splits, folder = begin_run(CONFIG, 'vit_h_224', data, tmp_path, **options)
    assert folder == tmp_path / name and config == follow_recipe(CONFIG, options.get('recipe'))
    assert set(splits['train']['label']) == set(PETS)
    said = capsys.readouterr().out
    assert f'result: {folder}\n' in said and f'data:   {len(splits["train"])} images of 3 classes (pets)' in said
    assert re.search(r'tower:  vit_h_224: local-dir:media/miniature / miniature, 32 px, 3 million parameters\n', said)
    assert re.search(r'device: CPU, \d+ cores, no GPU\ntime:   about [\d.]+ (s|min) for the towers\n', said)


def test_overrides_and_choices_change_a_run_but_not_what_its_recipe_sets(pets, tmp_path):
    config, _, folder = begin_run(CONFIG, 'vit_h_224', str(pets), tmp_path, recipe='frozen-head', augmentation='flip',
                                  seed=9, overrides="{'epochs': 2, 'max_grad_norm': 3}")
    assert (config.augmentation, config.seed, config.max_grad_norm, config.epochs) == ('flip', 9, 3, 40)
    assert folder.name == 'vit_h_224_flip_frozen-head_pets'
    for recipe, name in (('frozen-head', 'head_lr'), ('lp-ft', 'scale'), ('direct-64', 'embedding_dim')):
        with pytest.raises(ValueError, match=f"recipe '{recipe}' sets {name} itself: leave it out of OVERRIDES") as error:
            begin_run(CONFIG, 'vit_h_224', '/no/such/data', tmp_path, recipe=recipe, overrides={name: 32})
        assert is_one_sentence(error)
    kept = begin_run(CONFIG, 'vit_h_224', str(pets), tmp_path, recipe='overlap', overrides={'overlap': .25})[0]
    assert [stage.overlap for stage in kept.each_stage()] == [.25, .5]  # the recipe sets that of its second stage alone


@pytest.mark.parametrize('recipe, folder, file', [
    (None, 'run', 'state/step-00000001/position.json'), (None, 'run', 'model.safetensors'),
    ('lp-ft', 'run', 'model.safetensors'), ('lp-ft', 'run/run-stage-1', 'stage.safetensors')])
def test_a_run_with_other_settings_is_refused_before_data_are_read(pets, tmp_path, recipe, folder, file):
    there = tmp_path / folder
    write_files(there, [file])
    stage = {'run': -1, 'run/run-stage-1': 0}[folder]
    follow_recipe(CONFIG, recipe).each_stage()[stage].save(there / 'config.json')
    begin_run(CONFIG, 'vit_h_224', str(pets), tmp_path, run='run', recipe=recipe)
    other = CONFIG.override(seed=6)
    with pytest.raises(ValueError, match=f'{there} holds a run with another configuration .seed: 5, now 6') as error:
        begin_run(other, 'vit_h_224', '/no/such/data', tmp_path, run='run', recipe=recipe)
    assert is_one_sentence(error)
    (there / file).unlink()
    (there / file).parent.rmdir() if 'state' in file else None
    begin_run(other, 'vit_h_224', str(pets), tmp_path, run='run', recipe=recipe)  # it had not begun


@pytest.mark.parametrize('start', [
    lambda out: begin_run(CONFIG, 'vit_h_224', '/no/such/data', out),
    lambda out: begin_zero_shot(demo.zero_shot(), '/no/such/data', out)], ids=['training', 'zero-shot'])
def test_a_place_that_cannot_be_written_is_refused_before_data_are_read(tmp_path, start):
    (tmp_path / 'file').touch()
    told = rf'^{tmp_path}/file/out\S* cannot be written [(]Not a directory[)]: choose another OUT_DIR.$'
    with pytest.raises(OSError, match=told) as error:
        start(tmp_path / 'file' / 'out')
    assert is_one_sentence(error)


def test_the_data_are_told_in_numbers():
    splits = Splits(train=table({'a': 1200, 'b': 3}), query=table({'c': 2, 'd': 1}), index=table({'c': 4, 'x': 9}))
    assert data_in_words(splits) == ('1,203 images of 2 classes (things); to report on, 3 queries of 2 objects among 13 '
                                     'images')


@pytest.mark.parametrize('out_dir', [None, 'somewhere'])
def test_soups_of_ones_own_data_have_a_folder_of_their_own_but_where_one_is_given(pets, tmp_path, monkeypatch, out_dir):
    monkeypatch.chdir(tmp_path)
    config = CONFIG.override(model_name=f'local-dir:{demo.MEDIA}/miniature')
    save_run(tmp_path / (out_dir or 'runs') / 'vit_h_224_none_pets', new_model(config, 3), config)
    ingredients, splits, folder, _ = begin_soups(str(pets), out_dir, ['vit_h_224'])
    assert [run.name for run in ingredients['vit_h_224']] == ['vit_h_224_none_pets'] and splits.name == 'pets'
    assert str(folder) == (out_dir or 'runs/pets')


def test_runs_of_two_recipes_make_no_soup_but_those_that_are_named_do(pets, tmp_path):
    config = CONFIG.override(model_name=f'local-dir:{demo.MEDIA}/miniature')
    for name, one in (('none', config), ('flip', config), ('none_best', config.override(image_size=48))):
        save_run(tmp_path / f'vit_h_224_{name}', new_model(one, 3), one)
    with pytest.raises(ValueError, match='image_size .* against .*: leave one of them out, .* as INGREDIENTS') as error:
        begin_soups(str(pets), tmp_path, ['vit_h_224'])
    assert is_one_sentence(error)
    named = {'vit_h_224': [str(tmp_path / f'vit_h_224_{name}') for name in ('none', 'flip')]}
    ingredients, *_ = begin_soups(str(pets), tmp_path, ['vit_h_224'], named)
    assert [run.path.parent.name for run in ingredients['vit_h_224']] == ['vit_h_224_none', 'vit_h_224_flip']


VALUES = {'model_name': CONFIG.model_name, 'pretrained': 'miniature', 'image_size': 64, 'templates': None, 'dim': 64}


def test_settings_of_the_zero_shot_notebook_are_changed_by_name(pets, tmp_path):
    values, splits, mine, folder = begin_zero_shot(VALUES, str(pets), tmp_path, photos=str(pets / 'cat'), pretrained=None,
                                                   image_size=32, overrides="{'dim': 8}")
    assert values == VALUES | {'image_size': 32, 'dim': 8} and folder == tmp_path / 'zero_shot'
    assert len(mine) == 6 and set(splits['query']['label']) <= set(PETS)
    with pytest.raises(ValueError, match="OVERRIDES has 'dims'. Did you mean dim. The settings are model_name, ") as error:
        begin_zero_shot(VALUES, str(pets), tmp_path, overrides={'dims': 8})
    assert is_one_sentence(error)


def test_without_images_of_ones_own_the_zero_shot_notebook_searches_the_queries(pets, tmp_path):
    _, splits, mine, folder = begin_zero_shot(VALUES, str(pets), None)
    assert mine['path'].tolist() == splits['query']['path'].tolist() and str(folder) == 'runs/zero_shot/pets'


@pytest.mark.parametrize('on_kaggle, given, expected', [
    (True, None, 8.5), (True, 2, 2), (True, 0, 0), (False, None, None), (False, 2, 2)])
def test_on_kaggle_a_run_stops_before_the_session_does_and_says_so(tmp_path, capsys, on_kaggle, given, expected):
    working = tmp_path / 'working'
    if on_kaggle:
        working.mkdir()
    config = kaggle_limits(CONFIG.replace({'max_hours': given}), working)
    assert config == CONFIG.replace({'max_hours': expected})
    assert ('the run stops 8.5 hours after this notebook began, everything saved (max_hours).'
            in capsys.readouterr().out) == (expected == 8.5)


def test_a_run_begins_within_kaggles_limits(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(begin, 'kaggle_limits', lambda config: config.override(max_hours=3))
    assert begin_run(CONFIG, 'vit_h_224', str(pets), tmp_path)[0] == CONFIG.override(max_hours=3)


@pytest.mark.parametrize('name', ['a/b', '../up', '..', '/abs'])
def test_a_runs_name_has_no_folders(tmp_path, name):
    with pytest.raises(ValueError, match='give a name without folders') as error:
        begin_run(CONFIG, 'vit_h_224', '/no/such/data', tmp_path / 'out', run=name)
    assert is_one_sentence(error) and not (tmp_path / 'out').exists()


def test_the_weights_of_one_tower_are_not_asked_of_another(pets, tmp_path):
    values = {'model_name': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79k', 'image_size': 32}
    choices = {'model_name': CONFIG.model_name}
    assert begin_zero_shot(values, str(pets), tmp_path, **choices)[0] == values | choices | {'pretrained': ''}
    choices['pretrained'] = 'miniature'
    assert begin_zero_shot(values, str(pets), tmp_path, **choices)[0] == values | choices
