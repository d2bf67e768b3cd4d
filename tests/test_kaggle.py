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
    """The first three code cells of a notebook: its parameters, what finds the repository, the imports."""
    code = [cell for cell in nbformat.read(ROOT / f'{name}.ipynb', 4).cells if cell.cell_type == 'code']
    assert 'parameters' in code[0].metadata['tags']
    return [cell.source for cell in code[:3]]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder; returns run(**names) -> the folder that modules are now imported from first."""
    inputs, working = tmp_path / 'input', tmp_path / 'working'
    inputs.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)

    def run(**names):
        monkeypatch.setattr(sys, 'path', ['elsewhere'])
        cell = first_cells('soup')[1].replace('/kaggle/input', str(inputs))
        exec(cell.replace('/tmp/general-image-embeddings', str(tmp_path / 'clone')), names)
        assert sys.path[1:] == ['elsewhere']
        return Path(sys.path[0])

    return run


def repository(folder):
    """A folder with what tells a copy of the repository apart."""
    (folder / 'guie').mkdir(parents=True)
    for name in ('utilities.py', 'guie/packages.py'):
        (folder / name).touch()
    return folder


def commit(folder):
    """Makes a folder a git repository with all that is in it."""
    for command in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'all']):
        subprocess.run(['git', *command], cwd=folder, check=True)


def test_the_first_cells_are_alike_short_and_install_before_anything_is_imported():
    cells = [first_cells(name) for name in NAMES]
    assert len({setup for _, setup, _ in cells}) == 1
    assert len([line for line in cells[0][1].splitlines() if line]) <= 8
    for parameters, _, imports in cells:
        assert "REPOSITORY = 'https://github.com/USERNAME/general-image-embeddings'" in parameters
        first, second, *rest = [line for line in imports.splitlines() if line]
        assert (first, second) == ('from guie.packages import install_missing', 'install_missing()')
        assert 'import utilities' in rest


@pytest.mark.parametrize('place', ['a', 'datasets/somebody/repository', 'notebooks/somebody/run/x/y/main'])
def test_a_lone_notebook_takes_an_attached_copy_where_it_lies(alone, tmp_path, place):
    home = repository(tmp_path / 'input' / place)
    assert alone(REPOSITORY='never asked for') == home and not list(Path().iterdir())


def test_of_two_attached_copies_the_less_deep_one_is_taken(alone, tmp_path):
    repository(tmp_path / 'input/a/deep')
    home = repository(tmp_path / 'input/z')
    assert alone(REPOSITORY=None) == home


def test_what_is_attached_can_be_imported_from_anywhere(tmp_path):
    home = repository(tmp_path / 'input/datasets/me/copy')
    (home / 'utilities.py').write_text('print(__file__)')
    cell = first_cells('soup')[1].replace('/kaggle/input', str(tmp_path / 'input'))
    run = subprocess.run([sys.executable, '-I', '-c', f'{cell}\nimport os; os.chdir("/"); import utilities'],
                         capture_output=True, text=True, cwd=tmp_path)
    assert (run.stdout, run.stderr) == (f'{home}/utilities.py\n', '')


def test_another_ones_utilities_are_not_taken(alone, tmp_path):
    (tmp_path / 'input' / 'other').mkdir()
    (tmp_path / 'input' / 'other' / 'utilities.py').touch()
    with pytest.raises(SystemExit):
        alone(REPOSITORY=None)


def test_a_lone_notebook_clones_the_address_that_it_is_given_once(alone, tmp_path):
    commit(source := repository(tmp_path / 'source'))
    assert alone(REPOSITORY=str(source)) == tmp_path / 'clone'
    assert (tmp_path / 'clone/guie/packages.py').exists() and not list(Path().iterdir())
    assert alone(REPOSITORY='gone by now') == tmp_path / 'clone'


@pytest.mark.parametrize('address', [None, '', 'file:///nowhere/at/all'])
def test_a_lone_notebook_that_cannot_have_the_files_says_in_one_sentence_what_to_attach(alone, tmp_path, address):
    with pytest.raises(SystemExit) as stopped:
        alone(REPOSITORY=address)
    assert str(stopped.value) == ('Attach the repository as a dataset, or turn the internet on and set REPOSITORY to its '
                                  'address.')
    assert not list(Path().iterdir()) and not (tmp_path / 'clone').exists()  # the next try finds nothing in its way


def test_half_a_clone_is_not_taken_for_a_whole_one(alone, tmp_path):
    (tmp_path / 'clone/guie').mkdir(parents=True)
    (tmp_path / 'clone/guie/packages.py').touch()  # files come in the order of their names
    with pytest.raises(SystemExit):
        alone(REPOSITORY='file:///nowhere/at/all')


def test_where_the_repository_is_whole_it_is_taken_and_nothing_else_looked_at(alone, tmp_path):
    repository(tmp_path / 'input' / 'old')
    Path('utilities.py').write_text('mine')
    assert alone(REPOSITORY=None) == tmp_path / 'working' and [*Path().iterdir()] == [Path('utilities.py')]


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
        assert hours.cost(name, size)[0] / 1e9 == pytest.approx(2 * published, rel=.02)
    one, two = (hours.training_hours('ViT-H-14', 224, hours.RATES['T4'] * count) for count in (1, 2))
    assert one == pytest.approx(2 * two) and 1 < one < 24


def test_the_hours_in_kaggles_readme_are_what_the_script_prints(capsys):
    hours.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    readme = (ROOT / 'kaggle/README.md').read_text()
    assert len(rows) >= 5 and all(row in readme for row in rows)


README = (ROOT / 'kaggle/README.md').read_text()


def test_the_page_names_no_parameter_that_the_notebooks_do_not_have():
    parameters = set(re.findall(r'(?m)^([A-Z_]+) =', '\n'.join(first_cells(name)[0] for name in NAMES)))
    named = set(re.findall(r'`([A-Z][A-Z_]+)(?:` | = |`)', README)) | set(re.findall(r'(?m)^\| ([A-Z_]{3,}) \|', README))
    assert 'DATA' in named and named <= parameters | {'KAGGLE_API_TOKEN', 'DATASETS', 'USERNAME'}


def test_the_pages_sed_puts_two_names_into_every_file_that_holds_none(tmp_path):
    lines = [line.partition('  #')[0] for line in README.splitlines() if line.startswith(('sed -i', 'find '))]
    assert len(lines) == 3 and all(line.startswith('sed -i.bak ') for line in lines[:2])  # as BSD's sed wants it
    for file in [*ROOT.glob('*.ipynb'), *ROOT.glob('*.md'), *(ROOT / 'kaggle').rglob('*.*')]:
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(ROOT)).write_bytes(b'USERNAME/a USERNAME/b')
    subprocess.run(['bash', '-ec', '\n'.join(lines)], cwd=tmp_path, check=True)
    left = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob('*') if file.is_file()}
    written = {str(file.relative_to(ROOT)): json.loads(file.read_text()) for file in (ROOT / 'kaggle').rglob('*.json')}
    assert all(left[name] == 'your-kaggle-name/a your-kaggle-name/b' for name in written)
    assert all(left[name] == 'your-github-name/a your-github-name/b'
               for name in ['README.md', 'kaggle/README.md', *(f'{name}.ipynb' for name in NAMES)])
    assert not [name for name in left if name.endswith('.bak')]


def test_the_page_says_what_the_metadata_attach():
    for name in NAMES:
        metadata = json.loads((ROOT / 'kaggle' / name / 'kernel-metadata.json').read_text())
        assert all(source.partition('/')[2] in README for source in metadata['dataset_sources'])
        assert all(source in README for source in metadata['competition_sources'])
        assert f'blob/main/{name}.ipynb' in README


def test_the_disk_that_a_soup_takes_is_counted_from_the_towers_parameters():
    gigabytes = {}
    for name, (model, size) in {'H': ('ViT-H-14', 224), 'L': ('ViT-L-14', 336)}.items():
        gigabytes[name] = 4e-9 * hours.cost(model, size)[1]
    head = 4e-9 * (1024 * 512 + 2 * 9_691 * 3 * 512)  # at most: a map and three centres of each class of two data sets
    soups = sum(gigabytes.values()) + 2 * head
    submission = sum(gigabytes.values())
    assert f'| both soups, float32 | {soups:.1f} |' in README and f'| the submission | {submission:.1f} |' in README
    assert f'| at most, while it is written | {soups + 2 * submission:.1f} |' in README and soups + 2 * submission < 20
