"""Card: what it says is what the run's files hold, and nothing in them is taken for markup."""
import json
from html import unescape

import mistune
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from runs import CONFIG, new_model

from guie.card import NONE, escaped, hub_name, markdown_table, model_card
from guie.checkpoints import Checkpoint, open_checkpoint, save_run
from guie.files import file_hash
from guie.scores import intervals
from guie.soups import average_states, save_soup

ODD = ['a|b', '<b>x</b> & y', '`code`', '*x* _y_ ~~z~~', '[a](http://b) ![c](d)', 'two\nlines', '# no title', '$x$',
       'back\\slash', '苹果 🍎', 'bad\udcff bytes', '| --- |', '---', '<!-- comment -->', '\\|', '']
SPEC = {'model_name': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79k', 'image_size': 224, 'mean': [0, 0, 0], 'std': [1, 1, 1],
        'activation': 'gelu', 'width': 1024, 'architecture': {}}


def bare(tmp_path, **metadata):
    """A Checkpoint of nothing but metadata."""
    (tmp_path / 'model.safetensors').write_bytes(b'weights')
    return Checkpoint({}, {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()},
                      tmp_path / 'model.safetensors', 'run')


def card(checkpoint, **facts):
    """The card of a Checkpoint."""
    usual = {'dim': 64, 'library': 'open_clip', 'licence': None, 'text': 'a text half'}
    return model_card(checkpoint, 'pass\n', **usual | facts)


def text_of(node):
    """The text of a node of mistune's tree."""
    return node.get('raw', '') + ''.join(map(text_of, node.get('children', ())))


def tables_in(text):
    """[[[node of a cell] of each row] of each table], as a reader of Markdown sees them, heads first."""
    tree = mistune.create_markdown(renderer='ast', plugins=['table', 'strikethrough', 'math'])(text)
    return [[head['children'], *(row['children'] for row in body['children'])]
            for head, body in (node['children'] for node in tree if node['type'] == 'table')]


def facts_of(text, title='What is recorded'):
    """{first cell: the others} of the table below a title."""
    rows, = tables_in(text.partition(f'## {title}')[2].split('\n## ')[0])
    cells = [[text_of(cell) for cell in row] for row in rows[1:]]
    return {first: rest[0] if len(rest) == 1 else rest for first, *rest in cells}


def write_queries(folder, precisions, labels, domains):
    """A queries.csv with these columns, as save_results writes it."""
    table = pd.DataFrame({'path': 'x.jpg', 'label': labels, 'domain': domains, 'precision': precisions, 'relevant': 5})
    for rank in range(1, 6):
        table[f'path_{rank}'], table[f'label_{rank}'], table[f'distance_{rank}'] = 'y.jpg', 'y', .5
    table.to_csv(folder / 'queries.csv', index=False, errors='surrogateescape')


@pytest.mark.parametrize('text', ODD)
def test_nothing_in_a_cell_is_taken_for_markup_and_a_row_stays_a_row(text):
    rows, = tables_in(markdown_table(['a', 'b'], [(text, 7), ('end', '')]))
    assert [len(row) for row in rows] == [2, 2, 2] and {node['type'] for node in rows[1][0]['children']} <= {'text'}
    assert unescape(text_of(rows[1][0])) == ' '.join(text.encode(errors='backslashreplace').decode().split())


def test_a_card_holds_what_was_recorded(tmp_path):
    config = CONFIG.override(seed=9, pretrained='/home/me/secret/weights.bin')
    save_run(tmp_path / 'run', new_model(), config, data='72 images of 12 classes (12 emoji), hash 01ab', step=7, score=.25)
    rng = np.random.default_rng(0)
    labels, precisions = np.repeat(np.arange(8), 3).astype(str), rng.integers(0, 6, 24) / 5
    precisions[3] = np.nan
    write_queries(tmp_path / 'run', precisions, labels, np.repeat(['one', 'two'], 12))
    checkpoint = open_checkpoint(tmp_path / 'run')
    text = card(checkpoint, licence='mit')
    facts = facts_of(text)
    assert facts['method'].startswith('training') and facts['image size'] == '32 px'
    assert facts['training data'] == '72 images of 12 classes (12 emoji), hash 01ab'
    assert facts['licence of the weights'] == 'mit'
    assert facts['SHA-256 of the run'] == file_hash(tmp_path / 'run/model.safetensors')
    assert (facts['step'], facts['score']) == ('7', '0.25') and facts['base model'] == 'local-dir:miniature'
    settings = facts_of(text, 'Settings')
    assert settings['seed'] == ['9', '5'] and settings['pretrained'] == ['weights.bin', 'laion2b_s32b_b79k']
    assert 'secret' not in text and 'epochs' in settings and 'margin_min' not in settings
    scores = facts_of(text, 'Scores')
    for name, part in (('all', slice(None)), ('one', slice(12)), ('two', slice(12, None))):
        kept = ~np.isnan(precisions[part])
        (low, high), = intervals([precisions[part][kept]], labels[part][kept])
        assert scores[name] == [f'{precisions[part][kept].mean():.4f}', f'{low:.4f} to {high:.4f}', str(kept.sum()),
                                str(len(set(labels[part][kept])))]


def test_the_hub_reads_its_metadata(tmp_path):
    run = tmp_path / '苹果🍎: "run"'
    save_run(run, new_model(), CONFIG, data='7 images of 3 classes (2 products-10k, 1 my own), hash 01')
    write_queries(run, [1., .6], ['a', 'b'], ['x: y', 'x: y'])
    text = card(open_checkpoint(run), licence='cc-by-sa-4.0')
    read = ModelCard(text).data
    assert (read.library_name, read.license, read.pipeline_tag) == ('open_clip', 'cc-by-sa-4.0', 'image-feature-extraction')
    assert read.model_name == run.name and read.datasets is None  # a run knows domains, not the Hub's names
    result, = read.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ('mP@5', .8, 'all')
    assert 'base_model' not in read.to_dict()


def test_what_is_missing_is_named_as_not_recorded(tmp_path):
    text = card(bare(tmp_path), text=None)
    facts = facts_of(text)
    assert [facts[name] for name in ('base model', 'image size', 'training data')] == [NONE] * 3
    assert facts['licence of the weights'].startswith('unknown') and 'text half' not in facts
    assert f'mP@5 is {NONE}.' in text and f'They are {NONE}.' in text
    read = ModelCard(text).data
    assert read.license == 'unknown' and read.eval_results is None and 'datasets' not in read.to_dict()
    (tmp_path / 'scores.csv').write_text('stage,model,dim,mp5,seconds\ningredient,run,1024,.9,1\ningredient,run,64,.5,1\n')
    assert f'mP@5 is 0.5000; its queries and interval are {NONE}.' in card(bare(tmp_path))


def test_a_single_object_has_no_interval(tmp_path):
    write_queries(tmp_path, [1., .6], ['a', 'a'], ['x', 'x'])
    assert facts_of(card(bare(tmp_path)), 'Scores') == {'all': ['0.8000', 'needs several objects', '2', '1']}


def test_a_soup_names_its_ingredients_with_hash_and_score(tmp_path):
    for name in ('a|b', 'c'):
        save_run(tmp_path / name, new_model(), CONFIG.override(seed=len(name)))
    (tmp_path / 'c/scores.csv').write_text('stage,model,dim,mp5,seconds\ningredient,c,64,.125,1\n')
    runs = [tmp_path / 'a|b', tmp_path / 'c']
    save_soup(average_states(runs), tmp_path / 'soup', runs, 'uniform', selection=.5)
    text = card(open_checkpoint(tmp_path / 'soup'))
    hashes = [file_hash(run / 'model.safetensors') for run in runs]
    assert facts_of(text, 'Ingredients') == {'a|b': [hashes[0], NONE], 'c': [hashes[1], '0.1250']}
    assert facts_of(text)['method'] == 'uniform: average of the ingredients' and facts_of(text)['selection'] == '0.5'
    assert '## Settings of the first ingredient that differ' in text


@pytest.mark.parametrize('name, weights, known', [
    ('ViT-H-14', 'laion2b_s32b_b79k', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'),
    ('ViT-H-14', 'laion2b_s32b_b79k@/data/file.bin', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'),
    ('ViT-H-14', 'laion2b_s32b_b79k@random', None), ('ViT-H-14', 'random', None), ('ViT-H-14', '/data/file.bin', None),
    ('hf-hub:owner/model', '', 'owner/model'), ('timm:vit_tiny_patch16_224', '', None), ('local-dir:x', '', None)])
def test_the_base_model_is_named_for_the_hub_only_where_it_is_known(tmp_path, name, weights, known):
    checkpoint = bare(tmp_path, spec=SPEC | {'model_name': name, 'pretrained': weights})
    assert hub_name(checkpoint) == known
    assert ModelCard(card(checkpoint)).data.to_dict().get('base_model') == (known and [known])


def test_an_escaped_name_can_be_a_title():
    assert escaped('# a *b*\nc') == '\\# a \\*b\\* c'
