"""The house: order and size of its rooms, a documented front door, and nothing private of any library."""
import ast
from pathlib import Path
from statistics import median

import pytest

import utilities

ROOT = Path(__file__).resolve().parent.parent
# A room imports from rooms before it.
ORDER = ['errors', 'packages', 'files', 'inputs', 'tables', 'distributed', 'weights', 'images', 'listing', 'config',
         'datasets', 'sources', 'splits', 'testsets', 'losses', 'projection', 'retrieval', 'scores', 'towers', 'text',
         'model', 'checkpoints', 'embedding', 'results', 'protocols', 'memory', 'estimate', 'sharding', 'resume',
         'heads', 'trackers', 'training', 'recipes', 'soups', 'begin', 'submission', 'onnx_export', 'card', 'publish',
         'cells', 'pictures', 'maps', 'comparison', 'collection', 'search', 'shards', 'plots', 'thumbnails', 'explore']
ROOMS = {name: ROOT / 'guie' / f'{name}.py' for name in ORDER}
FRONT_DOOR = ROOT / 'utilities.py'


def tree(path):
    return ast.parse(path.read_text())


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node):
    return node.end_lineno - node.lineno + 1


def lines(path):
    return len(path.read_text().splitlines())


def imports(path):
    """[(module, name or None)] of every import, also of those inside functions."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports name their room in full'
            found += [(node.module, alias.name) for alias in node.names]
    return found


def test_every_room_has_its_place_and_its_tests():
    assert sorted(ORDER) == sorted(path.stem for path in (ROOT / 'guie').glob('*.py') if path.stem != '__init__')
    assert [name for name in ORDER if not (ROOT / 'tests' / f'test_{name}.py').exists()] == []


@pytest.mark.parametrize('room', ORDER)
def test_a_room_imports_only_from_rooms_above_it(room):
    used = [module.partition('.')[2] for module, _ in imports(ROOMS[room]) if module.split('.')[0] == 'guie']
    assert [name for name in used if name not in ORDER[:ORDER.index(room)]] == []
    assert 'utilities' not in {module for module, _ in imports(ROOMS[room])}


def test_a_room_is_read_in_one_sitting():
    sizes = {name: lines(path) for name, path in ROOMS.items()}
    assert {name: size for name, size in sizes.items() if size > 350} == {}
    assert median(sizes.values()) <= 200


def test_functions_are_short():
    lengths = {f'{path.stem}.{node.name}': length(node) for path in ROOMS.values() for node in functions(path)}
    assert {name: size for name, size in lengths.items() if size > 60} == {}
    assert median(length(node) for path in ROOMS.values() for node in functions(path)) <= 9


def test_the_front_door_is_a_map_with_documented_names():
    assert lines(FRONT_DOOR) <= 120 and len(utilities.__all__) <= 75
    assert functions(FRONT_DOOR) == [] and len(set(utilities.__all__)) == len(utilities.__all__)
    tables = {'AUGMENTATIONS', 'DATASETS', 'RECIPES'}  # a dict has no docstring of its own
    undocumented = [name for name in utilities.__all__ if name not in tables and not (
        getattr(utilities, name).__doc__ or '').strip()]
    assert undocumented == []
    imported = {name for module, name in imports(FRONT_DOOR)}
    assert imported == set(utilities.__all__)
    assert {f'guie.{room}' for room in ORDER} >= {module for module, _ in imports(FRONT_DOOR)}


@pytest.mark.parametrize('room', ORDER)
def test_nothing_private_of_a_library_is_imported_or_assigned(room):
    private = [f'{module}.{name or ""}' for module, name in imports(ROOMS[room])
               if any(part.startswith('_') for part in [*module.split('.'), name or ''])]
    assert private == []
    assigned = [target.attr for node in ast.walk(tree(ROOMS[room])) if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Attribute)]
    assert '__class__' not in assigned
    read = {node.attr for node in ast.walk(tree(ROOMS[room])) if isinstance(node, ast.Attribute)
            and node.attr.startswith('_') and not node.attr.startswith('__')}
    assert read <= {'_repr_html_', '_exit'}, 'attributes with a leading underscore are their library\'s own'


@pytest.mark.parametrize('room', ORDER)
def test_every_function_and_class_says_what_it_is(room):
    nodes = [node for node in tree(ROOMS[room]).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in nodes if not ast.get_docstring(node)] == []


def test_a_file_is_replaced_in_one_place():
    """Whole files or none: nobody but files.whole_file calls os.replace."""
    assert [name for name, path in ROOMS.items() if 'os.replace' in path.read_text()] == ['files']
