"""A small world of images, made once a test session. Only test_gpu.py sees a GPU: what the others compare is exact."""
import os
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import runs

import demo
import utilities
from guie.distributed import launch
from guie.embedding import selection_score
from guie.splits import Splits
from guie.training import fit

matplotlib.use('Agg')
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # here and in the processes that tests start
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='session')
def tiny_world(tmp_path_factory):
    """12 objects, 6 images each, as a CSV."""
    folder = tmp_path_factory.mktemp('world')
    rows = []
    for row in demo.objects().query("split == 'training'").head(12).itertuples(name=None):
        rows += [(name, row[2]) for name in demo.write_object(row, folder, 6, 64, .8, 5)]
    pd.DataFrame(rows, columns=['path', 'label']).to_csv(folder / 'train.csv', index=False)
    return folder


@pytest.fixture
def train(tiny_world):
    return utilities.read_dataset(tiny_world / 'train.csv')


@pytest.fixture(scope='session')
def launched(tiny_world, tmp_path_factory):
    """Folder of the runs that two processes trained (tests/launched.py), and the run `one` that must come to the same."""
    folder = tmp_path_factory.mktemp('launched')
    train = utilities.read_dataset(tiny_world / 'train.csv')
    splits = Splits(train=train, selection_query=train[::6], selection_index=train.drop(train.index[::6]))
    splits.save(folder / 'splits.csv')
    (folder / 'task').write_text('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        launch('tests.launched', folder, 2)
        runs.without_dropout(patch)
        config = runs.CONFIG.override(augmentation='cutout', validate_every=4)
        fit(config, runs.new_model(), train, folder / 'one', partial(selection_score, splits=splits))
    return folder


@pytest.fixture
def photos_folder():
    """A folder of real images, named by the environment variable PHOTOS."""
    folder = os.environ.get('PHOTOS')
    if not folder:
        pytest.skip('PHOTOS does not name a folder with train.csv, query.csv and index.csv: real images are untested')
    return Path(folder)
