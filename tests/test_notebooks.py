"""The notebooks: run, readable, small, the two training notebooks alike, outputs as new as the source."""
import json
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image

import demo
import utilities
from guie.checkpoints import save_state
from guie.embedding import embed
from guie.files import state_hash
from guie.results import read_queries
from tests.runs import is_one_sentence
from tests.test_submission import images_of, needs_torch111, replay_on_host

NAMES = ['train_vit_h_224', 'train_vit_l_336', 'soup', 'zero_shot_pca']


def cells(name, kind=None):
    return [cell for cell in nbformat.read(f'{name}.ipynb', 4).cells if kind in (None, cell.cell_type)]


def tags(cell):
    return cell.metadata.get('tags', [])


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_prose_and_short_cells(name):
    code, prose = cells(name, 'code'), cells(name, 'markdown')
    assert len(prose) >= .4 * len(code + prose)
    assert max(cell.source.count('\n') + 1 for cell in code) <= 15
    assert sum('parameters' in tags(cell) for cell in code) == 1
    assert Path(f'{name}.ipynb').stat().st_size < 1.5e6
    nbformat.validate(nbformat.read(f'{name}.ipynb', 4))


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_begins_with_few_parameters_a_short_setup_and_what_it_will_do(name):
    parameters, setup, imports, *others = (cell.source for cell in cells(name, 'code'))
    assert len(re.findall(r'(?m)^[A-Z_]+ *=', parameters)) <= 9
    assert len([line for line in setup.splitlines() if line]) <= 8
    decides, = (number for number, source in enumerate(others) if 'utilities.begin_' in source)
    assert decides <= 1  # at most the configuration comes before
    told = text_of(cells(name, 'code')[3 + decides])
    assert all(f'\n{word}:' in told for word in ('data', 'tower', 'device', 'time', 'result'))


def text_of(cell):
    """What a cell printed."""
    return '\n' + ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


@pytest.mark.parametrize('name', NAMES)
def test_saved_outputs_can_be_read_as_text_and_hold_a_line_for_each_bar(name):
    for cell in cells(name, 'code'):
        for output in cell.outputs:
            plain = output.get('data', {}).get('text/plain', output.get('text', ''))
            assert ' object at 0x' not in plain and 'Styler' not in plain and '\r' not in plain
            assert '%|' not in plain or '\n' not in plain.strip(), plain


@pytest.mark.parametrize('name', NAMES)
def test_a_picture_comes_before_the_first_long_cell(name):
    code = cells(name, 'code')
    pictures = [number for number, cell in enumerate(code)
                if any('image/png' in output.get('data', {}) for output in cell.outputs)]
    long = [number for number, cell in enumerate(code)
            if re.search(r'utilities\.(train|embed_all|plot_basin)\(', cell.source)]
    assert pictures[0] < long[0]


def test_the_readme_is_read_in_five_minutes():
    assert len(Path('README.md').read_text().split()) <= 900


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_has_outputs_without_errors_or_warnings(name):
    for cell in cells(name, 'code'):
        for output in cell.outputs:
            assert output.output_type != 'error' and output.get('name') != 'stderr', cell.source
    assert sum('image/png' in output.get('data', {}) for cell in cells(name, 'code') for output in cell.outputs) >= 3


@pytest.mark.parametrize('name', NAMES)
def test_the_outputs_belong_to_the_source(name):
    for cell in nbformat.read(f'{name}.ipynb', 4).cells:
        for output in cell.get('outputs', ()):
            assert output.get('execution_count', cell.execution_count) == cell.execution_count
    made_from = nbformat.read(f'{name}.ipynb', 4).metadata.get('outputs_of', {})
    assert made_from.get(f'{name}.ipynb') == demo.source_hash(f'{name}.ipynb'), \
        f'{name}.ipynb was changed after its outputs were made: run `make notebooks`.'
    if changed := [file for file in demo.ROOMS if made_from.get(file) != demo.source_hash(file)]:
        warnings.warn(f'Outputs of {name}.ipynb are older than {", ".join(changed)}: run `make notebooks`.', stacklevel=1)


def test_the_training_notebooks_differ_only_in_configuration_and_prose():
    first, second = cells('train_vit_h_224', 'code'), cells('train_vit_l_336', 'code')
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert tags(one) == tags(other)
        assert ('configuration' in tags(one)) == (one.source != other.source), one.source


MOST_NAMES = {'train_vit_h_224': 18, 'train_vit_l_336': 18, 'soup': 26, 'zero_shot_pca': 20}


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_needs_few_names_of_the_front_door(name):
    used = set(re.findall(r'\butilities\.([A-Za-z]\w*)', '\n'.join(cell.source for cell in cells(name, 'code')))) - {'py'}
    assert used <= set(utilities.__all__) and len(used) <= MOST_NAMES[name]


def run(name, folder, **parameters):
    output = folder / f'{name}.ipynb'
    papermill.execute_notebook(f'{name}.ipynb', output, parameters, kernel_name='python3', progress_bar=False,
                               shutdown_kernel='immediate')
    return nbformat.read(output, 4)


def text(notebook):
    return '\n'.join(json.dumps(output) for cell in notebook.cells for output in cell.get('outputs', []))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Every notebook run once, on a part of the emoji world: {name: executed notebook}, and the folder of the runs."""
    folder, world = tmp_path_factory.mktemp('runs'), Path(demo.sources()['train']).parent
    for name in ('train', 'query', 'index', 'selection_query', 'selection_index'):
        frame = pd.read_csv(world / f'{name}.csv')
        chosen = frame['label'].isin(sorted(frame['label'].unique())[:40])
        frame[chosen].to_csv(world / f'small_{name}.csv', index=False)
    small = {name: str(world / f'small_{name}.csv') for name in ('train', 'query', 'index')}
    selection = [str(world / f'small_selection_{part}.csv') for part in ('query', 'index')]
    shared = {'DEMO': True, 'OUT_DIR': str(folder), 'DATA': small | {'selection': selection}}
    training = shared | {'OVERRIDES': {'max_images': 6, 'workers': 0}}
    made = {name: run(name, folder, **training, AUGMENTATION='none') for name in NAMES[:2]}
    made['cutout'] = run('train_vit_h_224', folder, **training, AUGMENTATION='cutout')
    made['soup'] = run('soup', folder, **shared)
    made['zero_shot_pca'] = run('zero_shot_pca', folder, **shared)
    return made, folder


@pytest.mark.parametrize('name', [*NAMES, 'cutout'])
def test_every_notebook_runs_without_a_word_on_stderr(runs, name):
    made, _ = runs
    for cell in made[name].cells:
        for output in cell.get('outputs', []):
            assert output.get('name') != 'stderr', output['text']


def test_runs_leave_their_artifacts(runs):
    _, folder = runs
    for name in ('vit_h_224_none_small', 'vit_h_224_cutout_small', 'vit_l_336_none_small'):
        assert {path.name for path in (folder / name).iterdir()} >= {
            'model.safetensors', 'config.json', 'log.csv', 'scores.csv', 'queries.csv', 'vectors.npz', 'state', 'vectors'}
    assert utilities.load_run(folder / 'vit_l_336_none_small').spec.image_size == 96
    table = utilities.list_runs(folder)
    assert set(table['method']) == {'training', 'uniform', 'greedy', 'wise-ft', 'ensemble', 'zero-shot'} and len(table) == 11
    assert table[['mp5', 'low', 'high']].notna().all(axis=None)
    for name, scored in table.set_index('run')['mp5'].items():  # what is loaded is what was scored
        queries = read_queries(folder / name)
        assert scored == pytest.approx(queries['precision'].mean())
        assert embed(utilities.load_run(folder / name), queries.head(3)).shape[1] <= 64
    assert (folder / 'explore.html').stat().st_size < 3e6


def test_the_training_notebooks_report_each_kind_of_object(runs):
    made, _ = runs
    for name in NAMES[:2]:
        assert all(word in text(made[name]) for word in ('left_out', 'queries', 'emoji'))


def test_two_ingredients_with_different_data_order_share_the_initial_head_bit_for_bit(runs, tmp_path):
    made, _ = runs
    chosen = dict(made['train_vit_h_224'].metadata.papermill.parameters) | {'OUT_DIR': str(tmp_path)}
    chosen['OVERRIDES'] = chosen['OVERRIDES'] | {'epochs': 0}
    heads = []
    for seed, augmentation in ((1, 'none'), (2, 'cutout')):
        run('train_vit_h_224', tmp_path, **chosen | {'SEED': seed, 'AUGMENTATION': augmentation})
        state = utilities.open_checkpoint(tmp_path / f'vit_h_224_{augmentation}_small')
        heads.append({name: tensor for name, tensor in state.items() if name.startswith('head.')})
    assert heads[0].keys() == heads[1].keys() and len(heads[0]) >= 2
    assert all(np.array_equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_the_soup_is_the_mean_of_its_ingredients_and_none_of_them(runs):
    _, folder = runs
    none, cutout, soup = (utilities.open_checkpoint(folder / name / 'model.safetensors')
                          for name in ('vit_h_224_none_small', 'vit_h_224_cutout_small', 'soup_vit_h_224'))
    for name in soup:
        mean = (none[name].double() + cutout[name].double()) / 2
        assert np.allclose(soup[name], mean, atol=1e-7), name
    assert not np.allclose(soup['tower.proj'], cutout['tower.proj'], atol=1e-7)


def test_the_exported_ensemble_gives_the_eager_models_vectors_and_the_notebooks_score(runs, tmp_path):
    made, folder = runs
    with zipfile.ZipFile(folder / 'ensemble/submission.zip') as archive:
        loaded = torch.jit.load(archive.extract('saved_model.pt', tmp_path))
    with np.load(folder / 'ensemble/reference.npz') as reference:
        images, expected = reference['images'], reference['vectors']
    assert images.dtype == np.uint8 and expected.shape[1] == 64
    with torch.no_grad():
        found = np.concatenate([loaded(torch.from_numpy(image)[None]).numpy() for image in images])
    assert np.abs(found - expected).max() <= 1e-5
    # the host resizes in floats, the notebook's loader in bytes: scores agree to a few of some hundred neighbours
    scores = re.search(r'mP@5 of the file ([.\d]+), of the notebook ([.\d]+)', text(made['soup']))
    file, notebook = map(float, scores.groups())
    assert file == pytest.approx(notebook, abs=.02)


def as_authors_file(run_dir, path):
    """A run's weights as the original authors saved theirs: a pickled state dict, their names, a text tower with it."""
    names = {'head.embedding.weight': 'head.emb.weight', 'head.centers': 'head.arc.weight'}
    state = {names.get(name, name.replace('tower.', 'vit_backbone.visual.')): tensor.clone()
             for name, tensor in utilities.open_checkpoint(run_dir).items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(state | {'vit_backbone.transformer.resblocks.0.ln_1.weight': torch.ones(3)}, path)


def test_the_original_authors_bare_files_become_a_submission_without_training(runs, tmp_path):
    made, folder = runs
    for number, name in enumerate(('vit_h_224_none_small', 'vit_h_224_cutout_small')):
        as_authors_file(folder / name, tmp_path / 'attached' / f'{number}_0.688')
    as_authors_file(folder / 'vit_l_336_none_small', tmp_path / 'attached_l' / '0_0.670')
    tower = {'model_name': 'local-dir:media/miniature', 'pretrained': 'miniature', 'max_images': 6}  # as the runs
    executed = run('soup', tmp_path, **dict(made['soup'].metadata.papermill.parameters) | {
        'OUT_DIR': str(tmp_path / 'out'),
        'INGREDIENTS': {'vit_h_224': str(tmp_path / 'attached'), 'vit_l_336': [str(tmp_path / 'attached_l' / '0_0.670')]},
        'ARCHITECTURES': {'vit_h_224': {**tower, 'image_size': 64}, 'vit_l_336': {**tower, 'image_size': 96}}})
    assert all(output.get('name') != 'stderr' for cell in executed.cells for output in cell.get('outputs', []))
    ours, theirs = (utilities.open_checkpoint(place / 'soup_vit_h_224') for place in (folder, tmp_path / 'out'))
    assert state_hash(ours) == state_hash(theirs)
    scores = [pd.read_csv(place / 'soup_scores.csv').set_index('model')['mp5'] for place in (folder, tmp_path / 'out')]
    assert scores[0]['ensemble'] == pytest.approx(scores[1]['ensemble'], abs=.005)
    with zipfile.ZipFile(tmp_path / 'out/ensemble/submission.zip') as archive:
        assert archive.namelist() == ['saved_model.pt']


@needs_torch111
def test_pytorch_1_11_gives_the_demos_submission_the_same_vectors_on_50_odd_images(runs, tmp_path):
    _, folder = runs
    images = images_of(np.random.default_rng(0).integers(1, 400, (50, 2)))
    with zipfile.ZipFile(folder / 'ensemble/submission.zip') as archive:
        loaded = torch.jit.load(archive.extract('saved_model.pt', tmp_path))
    with torch.no_grad():
        expected = torch.cat([loaded(image) for image in images])
    found = replay_on_host(folder / 'ensemble/submission.zip', images, tmp_path)
    assert found.shape == (50, 64) and (found - expected).abs().max() <= 1e-5


def test_the_zero_shot_notebook_runs_on_data_of_ones_own(runs, tmp_path):
    world, names = Path(demo.sources()['train']).parent, demo.objects()['name'].head(100).tolist()
    (tmp_path / 'names.json').write_text(json.dumps({'things': names}))
    data = {name: str(world / f'small_{name}.csv') for name in ('train', 'query', 'index')}
    made = run('zero_shot_pca', tmp_path, DEMO=False, MODEL_NAME='local-dir:media/miniature', PRETRAINED='miniature',
               OVERRIDES={'image_size': 64}, VOCABULARY=str(tmp_path / 'names.json'), OUT_DIR=str(tmp_path), DATA=data)
    query, index = (pd.read_csv(data[name]) for name in ('query', 'index'))
    few = query['label'].drop_duplicates().head(10)
    judged = query['label'].isin(few).mul(query['label'].isin(index['label'])).sum()
    said = re.search(rf'mP@5 of the file ([.\d]+), of the notebook ([.\d]+), on {judged} queries', text(made))
    assert said and float(said[1]) == pytest.approx(float(said[2]), abs=.1)
    assert sum('image/png' in output.get('data', {}) for cell in made.cells for output in cell.get('outputs', [])) == 8


def test_soup_without_ingredients_says_what_to_run_first(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match='run train_vit_h_224.ipynb'):
        run('soup', tmp_path, DEMO=True, OUT_DIR=str(tmp_path))


# Data of one's own, from 2 classes of 2 images upwards

@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """A folder of two classes with two images each, and a training notebook executed on it: (folder, notebook, its runs)."""
    folder = tmp_path_factory.mktemp('mine')
    for name, image in zip(('cat/1', 'cat/2', 'dog/1', 'dog/2'), images_of([(48, 64)] * 4)):
        (folder / 'pets' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(folder / f'pets/{name}.jpg')
    made = run('train_vit_h_224', folder, DEMO=True, DATA=str(folder / 'pets'), OUT_DIR=str(folder / 'runs'))
    return folder / 'pets', made, folder / 'runs'


def test_a_head_on_a_frozen_tower_is_trained_by_a_recipe(pets, tmp_path):
    folder, _, _ = pets
    made = run('train_vit_h_224', tmp_path, DEMO=True, DATA=str(folder), RECIPE='frozen-head', OUT_DIR=str(tmp_path))
    trained = utilities.load_run(tmp_path / 'vit_h_224_none_frozen-head_pets')
    bare = utilities.load_image_tower('local-dir:media/miniature', 'miniature', 64).state_dict()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in trained.tower.state_dict().items())
    assert 'cached head' in text(made) and len(pd.read_csv(tmp_path / 'vit_h_224_none_frozen-head_pets/log.csv')) == 60


def test_a_training_notebook_runs_on_two_classes_of_two_images_and_says_what_gave_way(pets):
    folder, made, runs = pets
    assert all(output.get('name') != 'stderr' for cell in made.cells for output in cell.get('outputs', []))
    assert set(pd.read_csv(runs / 'vit_h_224_none_pets/scores.csv')['dim']) == {128, 512, 3}
    assert utilities.list_runs(runs)['mp5'].notna().all()
    for words in (f'DEMO: the settings of a miniature CLIP (small images, high rates) on {folder}',
                  '2 classes are too few to hold some out',
                  '4 images do not fill a step of 32', 'at most 3 dimensions instead of 64'):
        assert text(made).count(words) == 1, words


def begin(name, **parameters):
    """The code cells of a notebook up to the one that loads the data, in this process."""
    known = {}
    for cell in cells(name, 'code'):
        exec(cell.source, known)
        if 'parameters' in tags(cell):
            known |= parameters
        if 'begin_run' in cell.source:
            return known


@pytest.mark.parametrize('changes, sentence', [
    ({'SEED': 6}, 'vit_h_224_none_pets holds a run with another configuration (seed: 5, now 6)'),
    ({'DATA': 'more', 'RUN': 'vit_h_224_none_pets'}, 'vit_h_224_none_pets holds a run on other images (hash'),
    ({'DATA': '.'}, 'holds one class folder, pets, and in that are no images but folders of them: give'),
    ({'DATA': 'pets/cat'}, 'holds 2 images and no class folders: give')])
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(pets, tmp_path, changes, sentence):
    folder, _, runs = pets
    shutil.copytree(folder, tmp_path / 'pets')
    shutil.copytree(folder, tmp_path / 'more')
    shutil.copy(folder / 'cat/1.jpg', tmp_path / 'more/cat/3.jpg')
    if changes.get('DATA') != 'more':
        shutil.rmtree(tmp_path / 'more')
    data = str(Path(tmp_path, changes.get('DATA', 'pets')))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as error:
        begin('train_vit_h_224', **{'DEMO': True, 'OUT_DIR': str(runs)} | changes | {'DATA': data})
    assert is_one_sentence(error)


def test_soup_runs_on_an_ingredient_of_four_images_beside_one_of_other_data(pets, tmp_path):
    folder, _, runs = pets
    shutil.copytree(runs, tmp_path / 'runs')
    mine = utilities.open_checkpoint(runs / 'vit_h_224_none_pets')
    save_state(mine, tmp_path / 'runs/vit_h_224_none/model.safetensors', mine.metadata | {'data': '"others, hash 123"'})
    made = run('soup', tmp_path, DEMO=True, DATA=str(folder), OUT_DIR=str(tmp_path / 'runs'))
    assert 'vit_h_224_none was trained on other images' in text(made)
    assert set(pd.read_csv(tmp_path / 'runs/soup_scores.csv')['dim']) == {3}
    assert all(output.get('name') != 'stderr' for cell in made.cells for output in cell.get('outputs', []))


def test_the_zero_shot_notebook_runs_on_four_images(pets, tmp_path):
    made = run('zero_shot_pca', tmp_path, DEMO=True, DATA=str(pets[0]), PHOTOS=str(pets[0]), OUT_DIR=str(tmp_path))
    assert all(output.get('name') != 'stderr' for cell in made.cells for output in cell.get('outputs', []))
    assert pd.read_csv(tmp_path / 'zero_shot/scores.csv')['dim'].tolist() == [64]
