"""On Kaggle: a notebook uploaded alone finds or fetches the rest; the metadata that pushes it; the estimate of hours."""
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import utilities
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / 'kaggle'))
import hours  # noqa: E402  (a script's folder)

NAMES = ['train_vit_h_224', 'train_vit_l_336', 'soup', 'zero_shot_pca']


def first_cells(name):
    """The two code cells between a notebook's parameters and its imports: what finds the files, what installs packages."""
    code = [cell for cell in nbformat.read(ROOT / f'{name}.ipynb', 4).cells if cell.cell_type == 'code']
    start = next(number for number, cell in enumerate(code) if 'parameters' in cell.metadata.get('tags', []))
    assert start == 0 and 'import utilities' in code[3].source
    return [cell.source for cell in code[1:3]]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder; returns run(cell number, **names) -> the names that the cells define."""
    inputs, working = tmp_path / 'input', tmp_path / 'working'
    inputs.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)

    def run(cells=1, **names):
        for cell in first_cells('soup')[:cells]:
            exec(cell.replace('/kaggle/input', str(inputs)), names)
        return names

    return run


def repository(folder, words):
    """A folder with the names of the repository, and what tells it apart."""
    for part in ('media', 'guie'):
        (folder / part).mkdir(parents=True)
    for name in ('train_vit_h_224.ipynb', 'soup.ipynb', 'demo.py', 'requirements.txt', 'media/vocabulary.json',
                 'guie/files.py'):
        (folder / name).write_text('{}')
    (folder / 'utilities.py').write_text(f'WORDS = {words!r}\n')
    return folder


def test_the_first_cells_are_the_same_in_all_notebooks():
    assert len({tuple(first_cells(name)) for name in NAMES}) == 1


@pytest.mark.parametrize('place', ['a', 'datasets/somebody/repository', 'notebooks/somebody/run/x/y/main'])
def test_a_lone_notebook_takes_the_files_of_an_attached_copy(alone, tmp_path, place):
    repository(tmp_path / 'input' / place, 'attached')
    (tmp_path / 'working' / 'soup.ipynb').write_text('my own')
    alone(REPOSITORY='never asked for')
    assert Path('utilities.py').read_text() == "WORDS = 'attached'\n"
    for name in ('guie/files.py', 'media/vocabulary.json', 'demo.py', 'requirements.txt'):
        assert Path(name).exists()
    assert Path('soup.ipynb').read_text() == 'my own'


def test_another_ones_utilities_are_not_taken(alone, tmp_path):
    (tmp_path / 'input' / 'other').mkdir()
    (tmp_path / 'input' / 'other' / 'utilities.py').touch()
    with pytest.raises(SystemExit):
        alone(REPOSITORY=None)


def test_a_lone_notebook_clones_the_address_that_it_is_given(alone, tmp_path):
    source = repository(tmp_path / 'source', 'cloned')
    for command in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'all']):
        subprocess.run(['git', *command], cwd=source, check=True)
    alone(REPOSITORY=str(source))
    assert Path('utilities.py').read_text() == "WORDS = 'cloned'\n" and not Path('.git').exists()


@pytest.mark.parametrize('address', [None, 'file:///nowhere/at/all'])
def test_a_lone_notebook_that_cannot_have_the_files_says_in_one_sentence_what_to_attach(alone, address):
    with pytest.raises(SystemExit) as stopped:
        alone(REPOSITORY=address)
    words = str(stopped.value)
    assert 'attach them as a dataset' in words and 'REPOSITORY' in words and '\n' not in words
    assert not list(Path().iterdir())


def test_where_the_repository_is_whole_nothing_is_copied(alone, tmp_path):
    repository(tmp_path / 'input' / 'old', 'attached')
    Path('utilities.py').write_text('mine')
    alone(REPOSITORY=None)
    assert Path('utilities.py').read_text() == 'mine' and len(list(Path().iterdir())) == 1


@pytest.mark.parametrize('wheels, status', [(True, 0), (False, 0), (False, 1), (True, 1)])
def test_a_missing_open_clip_is_installed_from_attached_wheels_or_else_the_package_index(
        alone, tmp_path, monkeypatch, wheels, status):
    Path('utilities.py').touch()
    if wheels:
        (tmp_path / 'input' / 'datasets' / 'wheels').mkdir(parents=True)
        (tmp_path / 'input' / 'datasets' / 'wheels' / 'open_clip_torch-3.3.0-py3-none-any.whl').touch()
    commands = []
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    monkeypatch.setattr(subprocess, 'run', lambda command: commands.append(command) or subprocess.CompletedProcess(
        command, status))
    if status:
        with pytest.raises(SystemExit, match='turn the internet on, or attach a dataset with the wheels'):
            alone(2, REPOSITORY=None)
    else:
        alone(2, REPOSITORY=None)
    command, = commands
    assert command[:4] == [sys.executable, '-m', 'pip', 'install']
    offline = ['--no-index', '--find-links', str(tmp_path / 'input' / 'datasets' / 'wheels'), 'open_clip_torch']
    assert command[5:] == (offline if wheels else ['-r', 'requirements.txt'])


FIELDS = {  # of kernel-metadata.json, as the documentation of the kaggle command lists them
    'id': str, 'title': str, 'code_file': str, 'language': str, 'kernel_type': str, 'is_private': bool, 'enable_gpu': bool,
    'enable_internet': bool, 'machine_shape': str, 'dataset_sources': list, 'competition_sources': list,
    'kernel_sources': list, 'model_sources': list}


@pytest.mark.parametrize('name', NAMES)
def test_each_notebook_has_metadata_that_the_kaggle_command_accepts(name):
    folder = ROOT / 'kaggle' / name
    metadata = json.loads((folder / 'kernel-metadata.json').read_text())
    assert {key: type(value) for key, value in metadata.items()} == FIELDS
    assert (folder / metadata['code_file']).resolve() == ROOT / f'{name}.ipynb'
    slug = metadata['id'].partition('/')[2]
    assert slug == metadata['title'].lower().replace(' ', '-') and 5 <= len(metadata['title']) <= 50
    assert (metadata['language'], metadata['kernel_type']) == ('python', 'notebook') and metadata['enable_gpu']
    assert metadata['machine_shape'] == 'NvidiaTeslaT4'  # two; Highmem is Kaggle's own (kaggle-cli #1198)
    assert set(metadata['competition_sources']) - {'google-universal-image-embedding'} == {
        'products-10k', 'landmark-recognition-2020'} <= set(utilities.DATASETS)  # what a notebook asks read_dataset for
    made = {json.loads(file.read_text())['id'] for file in (ROOT / 'kaggle').glob('*/kernel-metadata.json')}
    assert set(metadata['kernel_sources']) <= made
    assert all(re.fullmatch('USERNAME/[a-z-]+', source) for source in metadata['dataset_sources'])


def test_every_notebook_has_its_folder_and_what_trains_has_internet_for_the_weights():
    files = sorted((ROOT / 'kaggle').glob('*/kernel-metadata.json'))
    assert {file.parent.name for file in files} == set(NAMES)
    online = {file.parent.name for file in files if json.loads(file.read_text())['enable_internet']}
    assert online == set(NAMES) - {'soup'}  # which needs none of them to write a submission


def test_the_estimate_counts_the_published_floating_point_operations():
    for name, size, published in (('ViT-H-14', 224, 167.4), ('ViT-L-14', 336, 191.1)):  # 1e9 multiply-adds, timm's table
        assert hours.forward_flops(name, size) / 1e9 == pytest.approx(2 * published, rel=.02)
    one, two = (hours.training_hours('ViT-H-14', 224, hours.RATES['T4'] * count) for count in (1, 2))
    assert one == pytest.approx(2 * two) and 1 < one < 24


def test_the_hours_in_kaggles_readme_are_what_the_script_prints(capsys):
    hours.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    readme = (ROOT / 'kaggle/README.md').read_text()
    assert len(rows) >= 5 and all(row in readme for row in rows)
