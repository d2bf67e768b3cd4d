"""What a user can mend is one sentence, without a traceback in a notebook, and still the kind of error that it is."""
import subprocess
import sys

import pytest
from jupyter_client.manager import start_new_kernel

from guie import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize('kind', KINDS)
def test_an_error_keeps_its_kind_and_shows_its_sentence_alone(kind):
    error = kind('The folder is empty: give another one.')
    assert str(error) == 'The folder is empty: give another one.'
    assert error._render_traceback_() == [f'{kind.__name__}: The folder is empty: give another one.']


@pytest.mark.parametrize('builtin', [ValueError, FileNotFoundError, OSError, MemoryError, FloatingPointError, RuntimeError])
def test_whoever_catches_the_builtin_kind_catches_ours(builtin):
    assert any(issubclass(kind, builtin) for kind in KINDS)


def test_a_notebooks_cell_fails_with_one_line():
    manager, client = start_new_kernel(kernel_name='python3')
    try:
        reply = client.execute_interactive('import utilities; utilities.Config(scale="wide")', timeout=120,
                                           output_hook=lambda message: None)['content']
        assert reply['status'] == 'error' and reply['traceback'] == [f'InputError: {reply["evalue"]}']
        reply = client.execute_interactive('utilities.no_such_name', timeout=60, output_hook=lambda message: None)['content']
        assert len(reply['traceback']) > 1  # a fault of the code keeps its traceback
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_script_keeps_its_traceback():
    command = [sys.executable, '-c', 'import utilities; utilities.Config(scale="wide")']
    written = subprocess.run(command, capture_output=True, text=True).stderr
    assert 'Traceback' in written and written.strip().splitlines()[-1].startswith('guie.errors.InputError: Config.scale')
