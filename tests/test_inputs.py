"""Malformed configurations and checkpoints, and what strangers' files cannot do: one sentence, nothing written.

Malformed photographs stand in test_images.py, malformed CSVs in test_data.py.
"""
import ast
import dataclasses
import json
import math
import zipfile
from pathlib import Path

import nbformat
import pytest
import test_data
import test_images
import torch
from safetensors.torch import save_file
from test_training import CONFIG, new_model

import utilities

FIELDS = {field.name: field.type for field in dataclasses.fields(utilities.Config)}
OUT_OF_RANGE = [  # of every field with limits: below, above, and no number
    (name, value) for name, (low, high) in utilities.Config.LIMITS.items()
    for value in (low - 1, high + 1, -math.inf, math.nan, '1', True, [1])
] + [(name, 1.5) for name in utilities.Config.LIMITS if not isinstance(1., FIELDS[name])] + [
    ('bands', value) for value in (
        (), ((5, 1.), (3, 1.)), ((5, 1.), (5, 2.)), ((5, -1.),), ((5, math.nan),), ((5, math.inf),), ((0, 1.),), (5, 1.),
        ((5,),), (('a', 'b'),), 'bands', 7)
] + [(name, value) for name in ('model_name', 'pretrained', 'teacher', 'trains') for value in (7, ['ViT'], True)] + [
    (name, value) for name in ('domains', 'stages') for value in ('art', 7, [7], None)] + [
    ('trains', 'tail'), ('trains', 'last 0'), ('head_norm', 1), ('head_norm', None),
    ('model_name', ''), ('augmentation', 'mixup'), ('augmentation', 7), ('precision', 'fp8'), ('precision', 16),
    ('sampling', 'uniform'),
    ('checkpoint_activations', 'yes'), ('checkpoint_activations', 1), ('shard', None), ('shard', 'yes'),
    ('effective_batch', 12)]


def test_every_field_of_the_configuration_has_values_out_of_range():
    assert {name for name, _ in OUT_OF_RANGE} == set(FIELDS)


@pytest.mark.parametrize('name, value', OUT_OF_RANGE, ids=[f'{name}-{value}' for name, value in OUT_OF_RANGE])
def test_a_value_out_of_range_is_one_sentence_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=f'^Config.{name} is .*; (it must be|give|choose) ') as error:
        dataclasses.replace(utilities.Config(), **{name: value})
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


@pytest.mark.parametrize('name', [name for name in utilities.Config.LIMITS if name != 'effective_batch'])
def test_the_limits_themselves_are_accepted(name):
    low, high = utilities.Config.LIMITS[name]
    for value in (low, high if name != 'batch_size' else 32):
        assert getattr(dataclasses.replace(utilities.Config(), **{name: value}), name) == value


CONFIG_FILES = {  # text of config.json, what the sentence says
    'empty': ('', 'is not a configuration'),
    'cut': (json.dumps(dataclasses.asdict(CONFIG))[:100], 'is not a configuration'),
    'no object': ('[1, 2]', 'is not a configuration'),
    'a number': ('7', 'is not a configuration'),
    'bytes of a photograph': (b'\xff\xd8\xff\xe0', 'is not a configuration'),
    'an unknown field': ('{"learning_rate": 1}', "no field 'learning_rate'"),
    'a value out of range': ('{"epochs": -1}', 'Config.epochs is -1'),
    'NaN': ('{"scale": NaN}', 'Config.scale is nan'),
}


@pytest.mark.parametrize('content, words', CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_malformed_configuration_file_is_one_sentence_and_stays_as_it_was(tmp_path, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        utilities.Config.load(tmp_path / 'config.json')
    assert str(error.value).startswith(f'{tmp_path}/config.json is not a configuration: ') and '\n' not in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_an_absent_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no configuration {tmp_path}/config.json: check the path'):
        utilities.Config.load(tmp_path / 'config.json')


# Checkpoints

def renamed(state, metadata):
    return {name.replace('tower.', 'backbone.'): value for name, value in state.items()}, metadata


def without(name):
    return lambda state, metadata: ({key: value for key, value in state.items() if key != name}, metadata)


def with_tensor(name, value):
    return lambda state, metadata: ({**state, name: value}, metadata)


def with_metadata(**texts):
    return lambda state, metadata: (state, {**metadata, **texts})


def with_spec(**values):
    return lambda state, metadata: (state, {**metadata, 'spec': json.dumps({**json.loads(metadata['spec']), **values})})


CHECKPOINTS = {  # what is done to a good checkpoint, what the sentence says
    'keys renamed': (renamed, 'does not fit the model in .*backbone'),
    'a tensor missing': (without('tower.proj'), 'tower.proj is missing'),
    'a tensor too many': (with_tensor('tower.extra', torch.zeros(2)), 'tower.extra is not in the model'),
    'a tensor of another shape': (with_tensor('tower.proj', torch.zeros(3, 3)), 'tower.proj has shape'),
    'another architecture': (lambda state, metadata: ({'layer1.weight': torch.zeros(2, 2)}, metadata), 'does not fit'),
    'another number of centres': (with_tensor('head.centers', torch.zeros(7, 32)), 'head.centers has shape'),
    'no centres': (without('head.centers'), 'cannot be built .*head.centers'),
    'an embedding that is no matrix': (with_tensor('head.embedding.weight', torch.zeros(4)), 'cannot be built'),
    'a projection that is no matrix': (with_tensor('projection.weight', torch.zeros(4)), 'cannot be built'),
    'no word on the tower': (lambda state, metadata: (state, {}), 'does not say which tower'),
    'a tower that is no JSON': (with_metadata(spec='{'), 'cannot be built'),
    'a tower without fields': (with_metadata(spec='{}'), 'cannot be built'),
    'a tower that is a list': (with_metadata(spec='[1]'), 'cannot be built'),
    'a tower of no library': (with_spec(architecture={}), 'cannot be rebuilt'),
    'a tower of no known shape': (with_spec(architecture={'library': 'open_clip'}), 'cannot be built .*embed_dim'),
    'a configuration that is no JSON': (with_metadata(config='{'), 'cannot be built'),
    'centres shared by none': (with_metadata(config='{"subcenters": 0}'), 'cannot be built'),
    'centres shared by a text': (with_metadata(config='{"subcenters": "three"}'), 'cannot be built'),
}


@pytest.fixture(scope='module')
def good():
    model = new_model()
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    return state, {'spec': json.dumps(dataclasses.asdict(model.spec)), 'config': json.dumps(dataclasses.asdict(CONFIG))}


@pytest.mark.parametrize('change, words', CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_malformed_checkpoint_is_one_sentence_and_stays_as_it_was(tmp_path, good, change, words):
    state, metadata = change(*good)
    save_file(state, tmp_path / 'model.safetensors', metadata)
    before = (tmp_path / 'model.safetensors').read_bytes()
    with pytest.raises(ValueError, match=words) as error:
        utilities.load_run(tmp_path / 'model.safetensors')
    assert '\n' not in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_at_least_sixty_malformed_inputs_stand_in_the_tables():
    csvs = [case for case in test_data.CSVS if not isinstance(case[2], dict)]
    tables = (test_images.UNREADABLE, csvs, CHECKPOINTS, CONFIG_FILES)
    assert all(len(table) >= 8 for table in tables) and sum(map(len, tables)) >= 60


# Security

SOURCES = {file: Path(file).read_text() for file in ('utilities.py', 'demo.py')} | {
    str(file): '\n'.join(cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == 'code')
    for file in sorted(Path().glob('*.ipynb'))}


def calls(text):
    """(dotted name of what is called, its keywords) for each call in a source."""
    return [(ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize('file', SOURCES)
def test_no_shell_is_used_and_nothing_is_unpickled(file):
    found = calls(SOURCES[file])
    names = [name for name, _ in found]
    forbidden = {'eval', 'exec', 'compile', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads', 'pd.read_pickle',
                 '__import__', 'joblib.load'}
    assert len(names) > 10 and not forbidden & set(names)
    assert not [name for name in names if name.startswith(('os.spawn', 'os.exec'))]
    assert not [name for name, keywords in found  # a list of words, never a shell's line
                if name.startswith('subprocess.') and (name != 'subprocess.run' or 'shell' in keywords)]
    assert not [line for line in SOURCES[file].splitlines() if line.lstrip().startswith(('!', '%'))]


@pytest.mark.parametrize('file', SOURCES)
def test_checkpoints_and_arrays_are_read_without_objects(file):
    for name, keywords in calls(SOURCES[file]):
        assert name != 'torch.load' or keywords.get('weights_only') == 'True'
        assert name != 'np.load' or 'allow_pickle' not in keywords
        assert not name.endswith(('.extractall', 'unpack_archive'))
        assert not name.endswith('.load_state') or 'weights_only' not in keywords


@pytest.mark.parametrize('member', ['../escaped.pt', '/tmp/escaped.pt', '../saved_model.pt', 'folder/../../saved_model.pt'])
def test_archive_members_cannot_leave_the_target_folder(tmp_path, member):
    with zipfile.ZipFile(tmp_path / 'submission.zip', 'w') as archive:
        archive.writestr(member, 'escaped')
    frame = test_data.frame_of({'a': 2})
    before = sorted(tmp_path.parent.rglob('*'))
    with pytest.raises(ValueError, match='is not a submission: .*saved_model.pt at its root'):
        utilities.evaluate_submission(tmp_path / 'submission.zip', frame, frame)
    assert sorted(tmp_path.parent.rglob('*')) == before and not Path('/tmp/escaped.pt').exists()
