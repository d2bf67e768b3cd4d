"""Config: every value is checked, and every configuration that was saved loads, those of earlier versions too."""
import dataclasses
import json
import math
import re
from html import escape, unescape

import numpy as np
import open_clip
import pytest

from guie.config import LIMITS, NOT_TRAINED, Config, different_fields
from tests.worlds import notebook_config

FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}
STAGED = Config(epochs=3, stages=({'trains': 'head'}, {'trains': 'last 2', 'image_size': 280, 'head_lr': 1e-3}))
OUT_OF_RANGE = [  # of every field with limits: below, above, and no number
    (name, value) for name, (low, high) in LIMITS.items()
    for value in (low - 1, high + 1, -math.inf, math.nan, '1', True, [1])
] + [(name, 1.5) for name in LIMITS if not isinstance(1., FIELDS[name])] + [
    ('layer_lrs', value) for value in (
        (), ((5, 1.), (3, 1.)), ((5, 1.), (5, 2.)), ((5, -1.),), ((5, math.nan),), ((5, math.inf),), ((0, 1.),), (5, 1.),
        ((5,),), (('a', 'b'),), 'layers', 7)
] + [(name, value) for name in ('model_name', 'pretrained', 'trains', 'tracker') for value in (7, ['ViT'], True)] + [
    ('stages', value) for value in ('art', 7, [7], None)] + [
    ('trains', 'tail'), ('trains', 'last 0'), ('trains', 'cached'), ('class_lr', -1), ('class_lr', '1e-2'),
    ('head_norm', 1), ('head_norm', None),
    ('model_name', ''), ('augmentation', 'mixup'), ('augmentation', 7), ('precision', 'fp8'), ('precision', 16),
    ('checkpoint_activations', 'yes'), ('checkpoint_activations', 1), ('shard', None), ('shard', 'yes'),
    ('effective_batch', 12)]


def test_every_field_of_the_configuration_has_values_out_of_range():
    assert {name for name, _ in OUT_OF_RANGE} == set(FIELDS)


@pytest.mark.parametrize('name, value', OUT_OF_RANGE, ids=[f'{name}-{value}' for name, value in OUT_OF_RANGE])
def test_a_value_out_of_range_is_one_sentence_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=f'^Config.{name} is .*; (it must be|give|choose) ') as error:
        dataclasses.replace(Config(batch_size=8), **{name: value})
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


@pytest.mark.parametrize('name', [name for name in LIMITS if name != 'effective_batch'])
def test_the_limits_themselves_are_accepted(name):
    low, high = LIMITS[name]
    for value in (low, high if name != 'batch_size' else 32):
        assert getattr(dataclasses.replace(Config(), **{name: value}), name) == value


def test_a_normalised_head_needs_more_than_one_image_a_batch():
    with pytest.raises(ValueError, match='head_norm compares the images of a batch: give more'):
        Config(batch_size=1, head_norm=True)
    assert Config(batch_size=1).batch_size == 1


def test_an_unknown_field_is_one_sentence_with_the_one_that_was_meant():
    for change, words in (({'epoch': 1}, "no field 'epoch'. Did you mean epochs"),
                          ({'n_clases': None}, "no field 'n_clases'. Did you mean n_classes"),
                          ({'learn': 1}, "no field 'learn'. Its fields are model_name, pretrained, ")):
        with pytest.raises(ValueError, match=f'^Config has {words}') as error:
            Config().override(**change)
        assert '\n' not in str(error.value)


def test_an_override_of_none_keeps_the_value_and_a_replacement_by_none_does_not():
    config = Config(n_classes=7)
    assert config.override(n_classes=None) == config and config.override(n_classes=9).n_classes == 9
    assert config.replace({'n_classes': None}).n_classes is None and config.n_classes == 7


# What a notebook's OVERRIDES hold

OVERRIDES = {  # as given: a dict, JSON, Python
    'a seed': ({'seed': 6}, '{"seed": 6}', "{'seed': 6}"),
    'none': ({'n_classes': None, 'workers': None}, '{"n_classes": null, "workers": null}',
             "{'n_classes': None, 'workers': None}"),
    'flags': ({'head_norm': True, 'shard': False}, '{"head_norm": true, "shard": false}',
              "{'head_norm': True, 'shard': False}"),
    'pairs': ({'layer_lrs': ((5, 1e-4), (9, 1e-3))}, '{"layer_lrs": [[5, 1e-4], [9, 1e-3]]}',
              "{'layer_lrs': ((5, 0.0001), (9, 0.001))}", {'layer_lrs': '((5, 0.0001), (9, 0.001))'}),
    'stages': ({'stages': ({'trains': 'head'}, {'epochs': 2})}, '{"stages": [{"trains": "head"}, {"epochs": 2}]}',
               "{'stages': ({'trains': 'head'}, {'epochs': 2})}", {'stages': "({'trains': 'head'}, {'epochs': 2})"}),
    'nothing': ({}, '{}', None, '')}


@pytest.mark.parametrize('same', OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_are_a_dict_or_its_text_with_any_field(same):
    wanted = Config(augmentation='cutout').replace(same[0])
    for given in same:
        assert Config().override(given, augmentation='cutout', seed=None) == wanted, given


@pytest.mark.parametrize('given', ['epochs=1', '{"epochs": ', "{'epochs'}", '{epochs: 1}', 'dict(epochs=1)', [1], 7,
                                   [('a', 1)], '__import__("os").getcwd()'], ids=str)
def test_overrides_that_are_no_dict_are_one_sentence(given):
    with pytest.raises(ValueError, match=r'^OVERRIDES is .*; give {field: value}, for example') as error:
        Config().override(given)
    assert '\n' not in str(error.value) and repr(given) in str(error.value)


def test_a_value_given_twice_is_one_sentence_unless_it_is_the_same():
    assert Config().override({'seed': 6}, seed=6).seed == 6
    with pytest.raises(ValueError, match='^seed is given twice, as 7 and in OVERRIDES as 6: give it once.$'):
        Config().override({'seed': 6}, seed=7)


@pytest.mark.parametrize('change, words', [
    ({'epoch': 2}, "no field 'epoch'. Did you mean epochs"), ("{'sead': 2}", "no field 'sead'. Did you mean seed"),
    ({'augmentation': 'cutuot'}, 'Did you mean cutout'), ({'augmentation': 'Flip'}, 'Did you mean flip'),
    ({'precision': 'bf-16'}, 'Did you mean bf16'), ({7: 1}, 'no field 7'),
    ({'layer_lrs': '((5, 1e-4)'}, r"layer_lrs is '\(\(5, 1e-4\)'; give"),  # a text looks like one
    ({'layer_lrs': '((5.5, 0.1),)'}, r'layer_lrs is \(\(5.5, 0.1\),\); give'), ({'stages': "({'epoch': 1},)"}, "'epoch'")])
def test_a_wrong_override_names_what_was_meant(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config().override(change)
    assert '\n' not in str(error.value)


def test_numpys_numbers_are_numbers_and_saved_as_pythons(tmp_path):
    given = {'n_classes': np.int64(5), 'scale': np.float32(16), 'head_lr': np.float64(.5), 'epochs': np.uint8(2),
             'head_norm': np.bool_(True), 'trains': np.str_('head'), 'layer_lrs': [(np.int32(3), np.float32(.25))],
             'stages': ({'epochs': np.int64(1)},)}
    config = Config().override(given)
    config.save(tmp_path / 'config.json')
    assert Config.load(tmp_path / 'config.json') == config
    assert {type(value) for value in dataclasses.asdict(config).values()} <= {int, float, bool, str, tuple, type(None)}
    for name, value in (('epochs', np.bool_(True)), ('epochs', np.float64(1)), ('scale', np.float32('nan')), ('seed', True)):
        with pytest.raises(ValueError, match=f'^Config.{name} is .*; it must be'):
            Config().override({name: value})


# The file of a configuration


@pytest.mark.parametrize('config', [
    Config(), Config(augmentation='cutout', layer_lrs=((3, 1e-3), (6, 1e-2))), Config(n_classes=None, workers=2), STAGED,
], ids=['default', 'pairs', 'none', 'stages'])
def test_a_configuration_survives_its_file(tmp_path, config):
    config.save(tmp_path / 'new/config.json')
    assert Config.load(tmp_path / 'new/config.json') == config == Config.read(json.dumps(dataclasses.asdict(config)))
    assert len((tmp_path / 'new/config.json').read_text().splitlines()) >= len(FIELDS)  # for people too


def test_each_stage_is_the_configuration_with_values_of_its_own():
    stages = STAGED.each_stage()
    assert [(stage.trains, stage.image_size, stage.head_lr, stage.epochs) for stage in stages] == [
        ('head', 224, 3e-4, 3), ('last 2', 280, 1e-3, 3)]
    assert [stage.each_stage() for stage in stages] == [[stage] for stage in stages]
    assert Config().each_stage() == [Config()]


@pytest.mark.parametrize('stages, words', [
    (({}, {'epochs': -1}), 'Stage 2 .*Config.epochs is -1'), (({'epoch': 1},), "Stage 1 .*'epoch'"),
    (({'stages': ()},), "Stage 1 .*cannot set 'stages'"),
    (({}, {'embedding_dim': 64}), "Stage 2 .*cannot set 'embedding_dim'"),
    (({'trains': 'last'},), "for example, 'last 4'"),
])
def test_a_wrong_stage_is_one_sentence(stages, words):
    with pytest.raises(ValueError, match=words) as error:
        Config().override(stages=stages)
    assert '\n' not in str(error.value)


CONFIG_FILES = {  # text of config.json, what the sentence says
    'empty': ('', 'is not a configuration'),
    'cut': (json.dumps(dataclasses.asdict(Config()))[:100], 'is not a configuration'),
    'no object': ('[1, 2]', 'is not a configuration'),
    'pairs': ('[[1, 2]]', 'is not a configuration'),
    'a number': ('7', 'is not a configuration'),
    'null': ('null', 'is not a configuration'),
    'bytes of an image': (b'\xff\xd8\xff\xe0', 'is not a configuration'),
    'an unknown field': ('{"learning_rate": 1}', "no field 'learning_rate'"),
    'a value out of range': ('{"epochs": -1}', 'Config.epochs is -1'),
    'an earlier field out of range': ('{"clip_norm": -1}', 'Config.max_grad_norm is -1'),
    'NaN': ('{"scale": NaN}', 'Config.scale is nan'),
    'stages that are a text': ('{"stages": "art"}', "Config.stages is 'art'"),
    'a stage that is a number': ('{"stages": [7]}', r'Config.stages is \[7\]'),
}


@pytest.mark.parametrize('content, words', CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_malformed_configuration_file_is_one_sentence_and_stays_as_it_was(tmp_path, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        Config.load(tmp_path / 'config.json')
    assert str(error.value).startswith(f'{tmp_path}/config.json is not a configuration: ') and '\n' not in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_an_absent_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no configuration {tmp_path}/config.json: check the path'):
        Config.load(tmp_path / 'config.json')


# Configurations of earlier versions


EARLIER = {'layer_lrs': 'bands', 'head_weight_decay': 'head_decay', 'tower_weight_decay': 'tower_decay',
           'max_grad_norm': 'clip_norm'}
GONE = {'domains': [], 'sampling': 'photographs', 'partial_centers': 1., 'distil': 0., 'teacher': ''}


def earlier(config):
    """What an earlier version saved for it: today's fields under their names of then, and the fields that are gone."""
    return {EARLIER.get(name, name): value for name, value in dataclasses.asdict(config).items()} | GONE


CHANGED = Config(layer_lrs=((3, 1e-3), (6, 1e-2)), head_weight_decay=.1, tower_weight_decay=.2, max_grad_norm=3.)


def test_fields_are_loaded_by_their_earlier_names_and_gone_ones_at_their_defaults_without_a_word(tmp_path, capsys):
    (tmp_path / 'config.json').write_text(json.dumps(earlier(CHANGED)))
    assert Config.load(tmp_path / 'config.json') == CHANGED and not capsys.readouterr().out


def test_the_stages_of_an_earlier_configuration_are_loaded_by_its_names_too(capsys):
    stages = [{'bands': [[3, 1e-3]], 'clip_norm': 2., 'sampling': 'photographs'}, {'tower_decay': .3, 'partial_centers': 1.}]
    config = Config.read(json.dumps(earlier(Config()) | {'stages': stages}))
    expected = Config(stages=({'layer_lrs': ((3, 1e-3),), 'max_grad_norm': 2.}, {'tower_weight_decay': .3}))
    assert config.each_stage() == expected.each_stage() and len(config.stages) == 2
    assert not capsys.readouterr().out


@pytest.mark.parametrize('used', [{'sampling': 'classes'}, {'partial_centers': .3}, {'distil': 10.}, {'teacher': 'runs/h'},
                                  {'domains': ['art']}, {'distil': 1., 'teacher': 'runs/h'}], ids=', '.join)
def test_a_gone_field_that_was_used_is_named_and_the_rest_is_loaded(used, capsys):
    assert Config.read(json.dumps(earlier(CHANGED) | used)) == CHANGED
    assert capsys.readouterr().out == (
        f'This configuration is of an earlier version and used {", ".join(used)}, which is gone.\n')
    assert Config.read(json.dumps({'epochs': 2, 'stages': [{}, used]})) == Config(epochs=2, stages=({}, {}))
    assert f'used {", ".join(used)}, which is gone' in capsys.readouterr().out


# What is compared, shown and published


def test_configurations_differ_in_what_changes_the_weights_alone():
    assert different_fields(Config(), Config(seed=6, head_lr=1.)) == ['head_lr: 0.0003, now 1.0', 'seed: 5, now 6']
    free = Config(workers=2, save_minutes=1, max_hours=1, max_unreadable=1, max_skipped=1, batch_size=4, precision='no',
                  checkpoint_activations=True, stages=({},), tracker='tensorboard')
    assert different_fields(Config(), free) == []
    assert {name for name, value in vars(free).items() if value != getattr(Config(), name)} == NOT_TRAINED


def test_a_notebook_shows_what_differs_from_the_recipe_and_what_it_means():
    config = Config(augmentation='cutout', pretrained='tag@<b>file', batch_size=4)
    html = config._repr_html_()
    rows = [[unescape(cell) for cell in re.findall(r'<td[^>]*>(.*?)</td>', row)]
            for row in re.findall(r'<tr>(.*?)</tr>', html)]
    assert [row[:3] for row in rows[1:]] == [
        ['pretrained', 'tag@<b>file', 'laion2b_s32b_b79k'], ['augmentation', 'cutout', 'none'], ['batch_size', '4', 'None']]
    assert rows[2][3] == "what a soup's ingredients differ in, besides seed" and '<b>' not in html
    assert repr(config) == "Config(pretrained='tag@<b>file', augmentation='cutout', batch_size=4)"
    assert eval(repr(config)) == config
    assert repr(Config()) == 'Config()'


def test_a_notebook_shows_meanings_and_values_in_full():
    config = Config(model_name=f'timm:{"long" * 20}', batch_size=4, validate_every=9, checkpoint_activations=True)
    html = config._repr_html_()
    assert '…' not in html and config.model_name in html
    assert [meaning for meaning in config.table()['meaning'] if escape(meaning) not in html] == []


def test_every_field_says_what_it_means():
    assert [field.name for field in dataclasses.fields(Config) if len(field.metadata['meaning']) < 10] == []


@pytest.mark.parametrize('first, second, alike', [
    ('tag@/kaggle/input/w/file.bin', 'tag@/kaggle/input/datasets/me/w/file.bin', True),
    ('/kaggle/input/w/file.bin', '~/w/file.bin', True), ('file.bin', '/w/file.bin', True),
    ('/me@home/f.bin', '/you/f.bin', True),
    ('tag@/w/file.bin', 'other@/w/file.bin', False), ('tag@/w/file.bin', 'tag@/w/other.bin', False), ('tag', 'other', False),
    ('tag', 'random', False), ('tag@/w/file.bin', '/w/file.bin', False)])
def test_the_same_weights_in_another_folder_are_no_other_configuration(first, second, alike):
    found = different_fields(Config(pretrained=first), Config(pretrained=second))
    assert found == ([] if alike else [f'pretrained: {first}, now {second}'])
    towers = [Config(model_name=f'{kind}{name}') for kind in ('local-dir:', 'hf-hub:') for name in ('a/clip', 'b/clip')]
    assert not different_fields(*towers[:2]) and different_fields(*towers[2:])


TOWERS = {  # notebook: last block of each learning rate, image size, tower by default, tower of the published run
    'train_vit_h_224': ((10, 20, 26, 32), 224, ('ViT-H-14', 'laion2b_s32b_b79k'), ('ViT-H-14', 'laion2b_s32b_b79k')),
    'train_vit_l_336': ((8, 16, 20, 24), 336, ('ViT-L-14', 'laion2b_s32b_b82k'), ('ViT-L-14-336', 'openai'))}


@pytest.mark.parametrize('solution', [None, 'place4'])
@pytest.mark.parametrize('notebook', TOWERS)
def test_the_notebooks_configurations_are_the_published_recipe(notebook, solution):
    blocks, size, default, published = TOWERS[notebook]
    config = notebook_config(notebook).reproduce(solution, notebook.removeprefix('train_'))
    assert (config.model_name, config.pretrained) == (published if solution else default)
    assert config.image_size == size
    assert config.layer_lrs == tuple(zip(blocks, (1.25e-6, 2.5e-6, 5e-6, 1e-5)))
    assert (config.head_lr, config.head_weight_decay, config.tower_weight_decay) == (3e-4, 1e-5, 1e-3)
    assert (config.batch_size, config.effective_batch, config.epochs, config.warmup_steps) == (None, 32, 1, 1000)
    assert (config.subcenters, config.scale, config.margin_min, config.margin_width) == (3, 30, .05, .45)
    assert (config.n_classes, config.min_images, config.max_images) == (9691, 4, 50)
    assert (config.embedding_dim, config.seed, config.augmentation) == (512, 5, 'none')
    assert config.model_name in open_clip.list_models()
    assert config.pretrained in open_clip.list_pretrained_tags_by_model(config.model_name)


def test_an_unknown_solution_is_one_sentence():
    with pytest.raises(ValueError, match="no published solution 'place1'; choose place4 or None. Did you mean place4"):
        Config().reproduce('place1', 'vit_h_224')


def test_a_cached_head_takes_no_augmentation_but_flip():
    assert Config(trains='cached head', augmentation='flip').trains == 'cached head'
    with pytest.raises(ValueError, match="augmentation is 'cutout', but a cached head sees each image once: choose none"):
        Config(trains='cached head', augmentation='cutout')
