"""Card: the README.md of a published model, from what its files record and nothing else."""
import html
import json
import re
from pathlib import Path

import numpy as np
import open_clip

from guie.config import without_folders
from guie.files import file_hash, printable
from guie.results import NEAREST, place_of, read_queries
from guie.scores import intervals

NONE = 'not recorded'
METHODS = {'training': 'fine-tuned by sub-centre ArcFace', 'uniform': 'average of the ingredients',
           'greedy': 'average of ingredients that were added as long as the selection score did not fall (greedy soup)',
           'wise-ft': 'interpolation between pretrained and fine-tuned weights (WiSE-FT)',
           'zero-shot': 'the pretrained tower under a PCA of text vectors', 'ensemble': 'joined vectors of several models'}
SHOWN_ELSEWHERE = {*'format spec config data ingredients members method subcenters'.split()}  # of a file's metadata


def escaped(value):
    """A value as text of a Markdown table's cell: nothing in it is taken for markup, and it stays one line."""
    text = html.escape(' '.join(printable(str(value)).split()), quote=False)
    return re.sub(r'([\\`*_\[\]|~#!$])', r'\\\1', text)


def markdown_table(columns, rows):
    """A Markdown table of texts; '' without rows."""
    lines = ['| ' + ' | '.join(map(escaped, row)) + ' |' for row in [columns, *rows]]
    return '\n'.join([lines[0], '|' + ' --- |' * len(columns), *lines[1:]]) + '\n' if rows else ''


def recorded(checkpoint, name):
    """A fact of a Checkpoint's metadata, read from JSON where it is that; None without it."""
    text = checkpoint.metadata.get(name)
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def method_of(checkpoint):
    """How a run came about, in words."""
    method = recorded(checkpoint, 'method') or 'training'
    return f'{method}: {METHODS[method]}' if method in METHODS else str(method)


def base_of(checkpoint):
    """What a run started from: 'model / weights', without folders of this machine."""
    if 'spec' not in checkpoint.metadata:
        return NONE
    spec = checkpoint.spec
    name, weights = (without_folders(field, getattr(spec, field)) for field in ('model_name', 'pretrained'))
    return f'{name} / {weights}' if weights and not name.startswith(('local-dir:', 'hf-hub:')) else name


def hub_name(checkpoint):
    """The Hub's 'owner/name' of what a run started from, by its own name or open_clip's table of tags; None if unknown."""
    if 'spec' not in checkpoint.metadata:
        return None
    spec = checkpoint.spec
    tag = spec.pretrained.partition('@')[0]
    known = tag in open_clip.list_pretrained_tags_by_model(spec.model_name) and not spec.pretrained.endswith('@random')
    named = (open_clip.get_pretrained_cfg(spec.model_name, tag) or {}).get('hf_hub') if known else None
    if spec.model_name.startswith('hf-hub:'):
        named = spec.model_name.removeprefix('hf-hub:').partition('@')[0]
    return '/'.join(named.strip('/').split('/')[:2]) if named else None


def score_rows(checkpoint):
    """[(images, mP@5, low, high, queries, objects)] of queries.csv: all of them, then each domain if there are several."""
    place = place_of(checkpoint)
    if not (place / 'queries.csv').is_file():
        return []
    queries = read_queries(place).dropna(subset='precision')
    parts = [('all', queries)] * bool(len(queries))
    if queries['domain'].nunique() > 1:
        parts += list(queries.groupby('domain'))
    return [(name, part['precision'].mean(), *intervals([part['precision']], part['label'])[0], len(part),
             part['label'].nunique()) for name, part in parts]


def score_section(checkpoint, dim):
    """The card's lines on scores."""
    rows, score = score_rows(checkpoint), checkpoint.score
    if not rows:
        return f'mP@5 is {NONE}.' if score is None else f'mP@5 is {score:.4f}; its queries and interval are {NONE}.'
    cells = [(name, f'{mean:.4f}', f'{low:.4f} to {high:.4f}' if np.isfinite(low) else 'needs several objects', count,
              objects) for name, mean, low, high, count, objects in rows]
    return (f"mP@5 on objects that were not trained on, at {dim} numbers: the share of a query's {NEAREST} nearest index "
            f'images that show its object (of fewer, if the index shows it less often). The interval is a bootstrap over '
            f'objects.\n\n'
            + markdown_table(['images', 'mP@5', '95 % interval', 'queries', 'objects'], cells))


def fact_rows(checkpoint, licence, text):
    """[(fact, what is recorded)] of a run, soup or ensemble."""
    rows = [('method', method_of(checkpoint))]
    if recorded(checkpoint, 'method') != 'ensemble':
        rows += [('base model', base_of(checkpoint)),
                 ('image size', f'{checkpoint.spec.image_size} px' if 'spec' in checkpoint.metadata else NONE),
                 ('training data', recorded(checkpoint, 'data') or NONE), ('text half', text),
                 ('SHA-256 of the run', file_hash(checkpoint.path))]
    rows += [('licence of the weights', licence or f'unknown: it is {NONE}, and that of the base model may bind')]
    rows += [(name, recorded(checkpoint, name)) for name in checkpoint.metadata if name not in SHOWN_ELSEWHERE]
    return [(name, value) for name, value in rows if value is not None]


def part_section(checkpoint):
    """The card's tables of a soup's ingredients or an ensemble's members; '' for a run that was trained."""
    score = lambda part: NONE if part.get('score') is None else f'{part["score"]:.4f}'
    parts = [(Path(part['run']).name, part['sha256'], score(part)) for part in recorded(checkpoint, 'ingredients') or ()]
    members = [(part['name'], part['run'], part['hash']) for part in recorded(checkpoint, 'members') or ()]
    return '\n'.join(f'## {title}\n\n{markdown_table(columns, rows)}' for title, columns, rows in (
        ('Ingredients', ['run', 'SHA-256', 'mP@5'], parts), ('Members', ['run', 'folder', 'hash of the weights'], members))
        if rows)


def setting_section(checkpoint):
    """The card's table of settings that differ from the defaults; of a soup those of its first ingredient."""
    if 'config' not in checkpoint.metadata:
        return '' if recorded(checkpoint, 'members') else f'## Settings\n\nThey are {NONE}.\n'
    config = checkpoint.config
    rows = [(row.setting, without_folders(row.setting, getattr(config, row.setting)), row.default)
            for row in config.table().itertuples()]
    whose = ' of the first ingredient' if recorded(checkpoint, 'ingredients') else ''
    return f'## Settings{whose} that differ from the default\n\n{markdown_table(["setting", "value", "default"], rows)}'


def front_matter(checkpoint, name, library, licence, parts):
    """The card's metadata, as the Hub reads them: YAML whose values are JSON.
    parts: the Checkpoints that hold towers, of an ensemble its members."""
    facts = {'library_name': library, 'pipeline_tag': 'image-feature-extraction', 'license': licence or 'unknown',
             'tags': ['image-retrieval', 'image-feature-extraction', 'arcface'],
             'base_model': list(dict.fromkeys(filter(None, map(hub_name, parts))))}
    results = [{'task': {'type': 'image-retrieval', 'name': 'Retrieval of objects that were not trained on'},
                'dataset': {'type': printable(images), 'name': printable(images)},
                'metrics': [{'type': 'mP@5', 'name': 'mP@5', 'value': round(mean, 6)}]}
               for images, mean, *_ in score_rows(checkpoint)]
    facts |= {'model-index': [{'name': name, 'results': results}] if results else []}
    return ''.join(f'{key}: {json.dumps(value, ensure_ascii=False)}\n' for key, value in facts.items() if value)


def model_card(checkpoint, snippet, *, dim, library, licence, text, parts=()):
    """The README.md of a published run as text.
    checkpoint: of the run. snippet: Python that makes the `vector` of an image.jpg in the folder. dim: its numbers.
    library: 'open_clip' or 'timm'. text: what the text half is; None where there is none. parts: an ensemble's members."""
    name = printable(checkpoint.name)
    sections = [f'---\n{front_matter(checkpoint, name, library, licence, parts or [checkpoint])}---',
                f'# {escaped(name)}', f'Images to unit vectors of {dim} numbers, whose distances say how likely two images '
                f'show the same object.', f'## Use\n\nIn this folder:\n\n```python\n{snippet}```',
                f'## Scores\n\n{score_section(checkpoint, dim)}',
                '## What is recorded\n\n' + markdown_table(['fact', 'recorded'], fact_rows(checkpoint, licence, text)),
                part_section(checkpoint), setting_section(checkpoint)]
    return '\n\n'.join(section.strip('\n') for section in sections if section) + '\n'
