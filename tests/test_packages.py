"""Packages: what is missing is installed from attached wheels or the index, nothing else is touched, a failure says why."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from guie import packages
from tests.runs import is_one_sentence

ROOT = Path(__file__).resolve().parent.parent
TINY = 'guie_tiny'


def make_wheel(folder, package, code=''):
    """A wheel of one empty module, as pip reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    info, path = f'{package}-1.0.dist-info', folder / f'{package}-1.0-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(f'{package}.py', code)
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: torch<1\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')
    return path


@pytest.fixture
def lacking(tmp_path, monkeypatch):
    """A machine that lacks a package of ours, and whose pip installs beside, not among, its packages; returns that place."""
    monkeypatch.setattr(packages, 'NEEDED', {TINY: TINY})
    (tmp_path / 'requirements.txt').write_text(f'# lower bounds\ntorch>=99\n\n{TINY}>=0.5\nscikit-learn>=99\n')
    monkeypatch.setattr(packages, 'REQUIREMENTS', tmp_path / 'requirements.txt')
    monkeypatch.setenv('PIP_TARGET', str(tmp_path / 'site'))
    (tmp_path / 'site').mkdir()
    monkeypatch.syspath_prepend(tmp_path / 'site')
    return tmp_path / 'site'


@pytest.fixture
def commands(monkeypatch):
    """What would be run, which succeeds but installs nothing."""
    run = []
    monkeypatch.setattr(subprocess, 'run', lambda command, **options: run.append(command) or subprocess.CompletedProcess(
        command, 1, stderr='WARNING: Retrying\nERROR: No matching distribution found for it.\nERROR: and more\n'))
    return run


@pytest.mark.parametrize('place', ['wheels', 'datasets/me/wheels', 'datasets/me/a/b/c/wheels'])
def test_a_missing_package_is_installed_from_attached_wheels_without_its_dependencies(lacking, tmp_path, place, capfd):
    wheels = tmp_path / 'input' / place
    make_wheel(wheels, TINY)
    make_wheel(wheels, 'torch', 'raise ImportError')  # which is there already
    assert not packages.is_installed(TINY)
    packages.install_missing([tmp_path / 'absent', tmp_path / 'input'])
    assert packages.is_installed(TINY) and (lacking / f'{TINY}.py').exists() and not (lacking / 'torch.py').exists()
    said = capfd.readouterr()
    assert said.out == f'Installing {TINY}-1.0-py3-none-any.whl\n' and not said.err
    packages.install_missing([tmp_path / 'input'])
    assert not capfd.readouterr().out


def test_wheels_deeper_than_six_folders_or_of_another_package_are_not_taken(tmp_path):
    make_wheel(tmp_path / 'a/b/c/d/e/f/g', TINY)
    make_wheel(tmp_path / 'a', 'another')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / f'{TINY}-1.0.tar.gz').touch()
    assert packages.attached_wheels([TINY], [tmp_path]) == []
    named = [packages.is_wheel_of(f'{name}-1-py3-none-any.whl', 'scikit-learn') for name in (
        'scikit_learn', 'Scikit.Learn', 'scikit_learn_extra', 'scikit')]
    assert named == [True, True, False, False]


def test_of_several_folders_the_first_is_taken_that_has_all_of_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, 'NEEDED', {'one': 'one', 'two': 'two'})
    make_wheel(tmp_path / 'a', 'one')
    wanted = [make_wheel(tmp_path / 'b/wheels', name) for name in ('one', 'two', 'three')]
    make_wheel(tmp_path / 'b/wheels', 'four')
    assert packages.attached_wheels(['three', 'two', 'one'], [tmp_path]) == [str(wanted[number]) for number in (2, 1, 0)]


def test_without_wheels_the_missing_lines_of_the_requirements_come_from_the_index_and_no_others(
        lacking, tmp_path, commands):
    with pytest.raises(RuntimeError):
        packages.install_missing([tmp_path])
    command, = commands
    assert command[:4] == [sys.executable, '-m', 'pip', 'install'] and '--upgrade' not in command
    assert [word for word in command[4:] if word[0] != '-'] == [f'{TINY}>=0.5', ]  # torch stays, though it is too old


def test_a_failure_names_what_is_missing_what_pip_said_and_what_to_attach(lacking, tmp_path, commands):
    with pytest.raises(RuntimeError) as error:
        packages.install_missing([tmp_path])
    assert is_one_sentence(error)
    assert str(error.value) == (
        f'{TINY} could not be installed (No matching distribution found for it): turn the internet on, or attach a dataset '
        f'with the folder that `pip download --no-deps -d wheels {TINY}` makes.')


def test_a_pip_that_ends_well_and_installs_something_else_is_a_failure_too(lacking, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda command, **options: subprocess.CompletedProcess(command, 0, stderr=''))
    with pytest.raises(RuntimeError, match=f'^{TINY} could not be installed .pip installed something else.: turn'):
        packages.install_missing([tmp_path])


def test_where_all_is_there_nothing_is_run(commands):
    packages.install_missing()
    assert not commands


def test_every_requirement_is_found_by_its_module_where_all_are_installed():
    assert packages.missing_requirements() == []
    lines = [line for line in (ROOT / 'requirements.txt').read_text().splitlines() if line and line[0] != '#']
    assert len(lines) >= 18 and all(packages.package_of(line).replace('-', '').replace('_', '').isalnum() for line in lines)


def test_it_runs_before_any_package_is_there(tmp_path):
    code = ('import sys; from guie.packages import install_missing; '
            'print([name for name in ("torch", "numpy", "pandas", "PIL") if name in sys.modules])')
    run = subprocess.run([sys.executable, '-I', '-S', '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}); {code}'],
                         capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ('[]\n', '')
