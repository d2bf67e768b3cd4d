"""What strangers' files cannot do, by what the sources call; and how many malformed inputs the tests hold against them."""
import ast
import zipfile
from pathlib import Path

import nbformat
import pytest
import test_config
import test_datasets
import test_images

from guie.submission import evaluate_submission
from tests.worlds import ROOT, table

FILES = [ROOT / 'utilities.py', ROOT / 'demo.py', *(file for folder in ('guie', 'kaggle', 'tools')
                                                    for file in sorted((ROOT / folder).glob('*.py')))]
SOURCES = {str(file.relative_to(ROOT)): file.read_text() for file in FILES} | {
    file.name: '\n'.join(cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == 'code')
    for file in sorted(ROOT.glob('*.ipynb'))}
RUNS_CODE = ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads',
             'pd.read_pickle', 'pandas.read_pickle', 'joblib.load', 'torch.hub.load')
WITH_PREFIX = ('os.spawn', 'os.exec', 'dill.', 'cloudpickle.', 'shelve.', 'marshal.')


def calls(text):
    """(dotted name of what is called, its keywords) for each call in a source, whatever it was imported as."""
    tree = ast.parse(text)
    modules = {alias.asname or alias.name: f'{node.module}.{alias.name}' for node in ast.walk(tree)
               if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules |= {alias.asname: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names if alias.asname not in (None, 'np', 'pd')}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split('.')
            found.append(('.'.join([modules.get(first, first), *rest]),
                          {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}))
    return found


def dangers(text):
    """What a source does that could run a stranger's code or a shell's line, or write outside of a folder."""
    for name, keywords in calls(text):
        if name in RUNS_CODE or name.startswith(WITH_PREFIX):
            yield name
        plain = name.startswith('subprocess.') and '(' not in name  # else it is a method of what the call returned
        if plain and (name not in ('subprocess.run', 'subprocess.Popen', 'subprocess.call') or 'shell' in keywords):
            yield f'{name} with a shell'  # a list of words, never a shell's line
        unsafe = {'torch.load': keywords.get('weights_only') != 'True', 'np.load': 'allow_pickle' in keywords}
        if unsafe.get(name) or name.endswith('.load_state') and 'weights_only' in keywords:
            yield f'{name} of objects'
        if name.endswith(('.extractall', '.unpack_archive')):
            yield name
    yield from (line for line in text.splitlines() if line.lstrip().startswith(('!', '%')))


@pytest.mark.parametrize('file', SOURCES)
def test_no_shell_is_used_and_nothing_is_unpickled(file):
    assert not list(dangers(SOURCES[file]))


def test_every_source_that_a_user_runs_is_looked_through():
    assert {f'guie/{room}.py' for room in ('files', 'distributed', 'checkpoints', 'resume', 'submission', 'training')} | {
        'utilities.py', 'demo.py', 'soup.ipynb', 'train_vit_h_224.ipynb'} <= set(SOURCES)
    found = [name for text in SOURCES.values() for name, _ in calls(text)]
    assert {'torch.load', 'np.load', 'subprocess.Popen'} <= set(found) and len(found) > 1000


@pytest.mark.parametrize('text', [
    'eval(text)', 'import os\nos.system("ls")', 'import os as o\no.popen("ls")', 'from os import system as run\nrun("ls")',
    'import pickle\npickle.load(file)', 'from pickle import loads\nloads(text)', 'import pandas as pd\npd.read_pickle(file)',
    'import subprocess\nsubprocess.run("ls", shell=True)', 'import subprocess\nsubprocess.getoutput("ls")',
    'import subprocess\nsubprocess.run("ls", shell=True).stdout.strip()', 'zipfile.ZipFile(file).extractall(folder)',
    'torch.load(file)', 'torch.load(file, weights_only=False)', 'import numpy as np\nnp.load(file, allow_pickle=True)',
    'import os\nos.execv(a, b)', 'accelerator.load_state(folder, weights_only=False)', 'archive.extractall(folder)',
    'import dill\ndill.load(file)', 'from shutil import unpack_archive\nunpack_archive(file)',
    'subprocess.run(["ls"]).stdout.strip()'])
def test_each_danger_is_found_in_a_source_that_has_it(text):
    assert bool(list(dangers(text))) == ('["ls"]' not in text)


def test_a_shells_line_in_a_notebook_is_found():
    with pytest.raises(SyntaxError):
        list(dangers('!ls'))
    assert list(dangers('text = """\n%cd folder\n"""')) == ['%cd folder']


@pytest.mark.parametrize('member', ['../escaped.pt', '/tmp/escaped.pt', '../saved_model.pt', 'folder/../../saved_model.pt'])
def test_archive_members_cannot_leave_the_target_folder(tmp_path, member):
    with zipfile.ZipFile(tmp_path / 'submission.zip', 'w') as archive:
        archive.writestr(member, 'escaped')
    frame = table({'a': 2})
    before = sorted(tmp_path.parent.rglob('*'))
    with pytest.raises(ValueError, match='is not a submission: .*saved_model.pt at its root'):
        evaluate_submission(tmp_path / 'submission.zip', frame, frame)
    assert sorted(tmp_path.parent.rglob('*')) == before and not Path('/tmp/escaped.pt').exists()


def test_at_least_sixty_malformed_inputs_stand_in_the_tables():
    csvs = [case for case in test_datasets.CSVS if not isinstance(case[2], dict)]
    tables = (test_images.UNREADABLE, csvs, test_config.CONFIG_FILES)
    assert all(len(one) >= 8 for one in tables) and sum(map(len, tables)) >= 60
