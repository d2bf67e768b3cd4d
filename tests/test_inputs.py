"""Malformed checkpoints: one sentence, nothing written."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import utilities
from tests.runs import CONFIG, new_model


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
