"""What a user waits for before the first result: `import utilities`, and the first picture of a training notebook.

    python benchmarks/waiting.py

Each import has a fresh process, which ends at once. The reference imports what the rooms import of other packages, and
nothing else. The notebook is train_vit_h_224.ipynb in DEMO, run once, from the start of its kernel to the end of the first
cell that shows a picture. The emoji world's images are drawn before.
"""
import ast
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import demo  # noqa: E402

PARAMETERS = '''
import demo, pathlib
demo.RUNS = pathlib.Path({folder!r})  # where its world is
DEMO, OUT_DIR = True, {folder!r}
'''


def python(code):
    """Runs `code` in a fresh process, which keeps compiled modules as usual."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    subprocess.run([sys.executable, '-c', code], cwd=timing.ROOT, env=environment, check=True)


def load(statements):
    python('\n'.join([*statements, 'import os', 'os._exit(0)']))  # at once: unloading torch would take two seconds


def imports_of(files):
    """The statements at the top of Python files that import what is neither Python's nor theirs, each once."""
    tops = [node for file in files for node in ast.parse(file.read_text()).body]
    own = {'guie', *sys.stdlib_module_names}
    return sorted({ast.unparse(node) for node in tops if isinstance(node, ast.Import) and node.names[0].name not in own
                   or isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] not in own})


def seconds_to_picture(name, folder):
    """Seconds until a notebook in DEMO shows its first picture. `folder` has the world and takes what it writes."""
    notebook = nbformat.read(timing.ROOT / f'{name}.ipynb', as_version=4)
    tags = [cell.metadata.get('tags', []) for cell in notebook.cells]
    place = next(place for place, of_cell in enumerate(tags) if 'parameters' in of_cell)
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(PARAMETERS.format(folder=folder)))
    client = NotebookClient(notebook, kernel_name='python3', shutdown_kernel='immediate',
                            extra_arguments=['--log-level=ERROR'],  # else it warns that it uses TCP
                            resources={'metadata': {'path': str(timing.ROOT)}})
    start = time.perf_counter()
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)  # its outputs replace the published ones
            if any('image/png' in output.get('data', {}) for output in cell.get('outputs', [])):
                return time.perf_counter() - start
    raise SystemExit(f'{name}.ipynb shows no picture.')


def main():
    options = timing.arguments(__doc__, repeats=3)
    os.environ['OMP_NUM_THREADS'] = str(options.threads)
    module = 'guie.losses' if options.quick else 'utilities'
    rooms = [timing.ROOT / 'guie' / 'losses.py'] if options.quick else (timing.ROOT / 'guie').glob('*.py')
    libraries = imports_of(rooms)
    works = {'ours': lambda: load([f'import {module}']), 'libraries': lambda: load(libraries)}
    seconds, _ = timing.interleaved(works, options.repeats)
    sizes = {'training': 4, 'query': 1, 'index': 1, 'size': 48} if options.quick else {}
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            demo.make_world(Path(folder, 'world'), **sizes)
        picture = seconds_to_picture('train_vit_h_224', folder)
    timing.print_table(
        f'Waiting, {options.threads} threads: {len(libraries)} imports of libraries, median of {options.repeats} '
        f'interleaved imports; one notebook',
        [timing.Row(f'import {module}, against its libraries', seconds['ours'], seconds['libraries'], 's',
                    '≤ 1.1'),
         timing.Row('first picture of train_vit_h_224.ipynb in DEMO, against 12 s', picture, 12, 's', '≤ 1.0')])


if __name__ == '__main__':
    main()
