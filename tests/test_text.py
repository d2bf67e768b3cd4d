"""Names to vectors: a vocabulary worth the name, text towers, templates."""
import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch

import demo
from guie.text import TEMPLATES, WordTokenizer, load_text_tower, read_vocabulary, text_vectors
from guie.towers import load_image_tower

MINIATURE = 'local-dir:media/miniature'


def test_the_vocabulary_has_the_tasks_eleven_kinds_and_no_name_twice(capsys):
    kinds = json.loads(Path('media/vocabulary.json').read_text())
    assert len(kinds) == 11 and min(map(len, kinds.values())) >= 300
    assert len(read_vocabulary('media/vocabulary.json')) == sum(map(len, kinds.values()))
    assert 'dropped' not in capsys.readouterr().out


def test_blank_and_repeated_names_are_dropped_and_counted(capsys):
    frame = read_vocabulary({'dishes': ['Pizza', ' ', 'pizza ', 'miso  soup'], 'toys': ['kite', 'PIZZA']})
    assert frame['name'].tolist() == ['Pizza', 'miso soup', 'kite'] and frame.index.tolist() == [0, 1, 2]
    assert frame['kind'].tolist() == ['dishes', 'dishes', 'toys']
    assert 'dropped 1 blank names and 2 that were there before' in capsys.readouterr().out


def test_kinds_weigh_what_is_asked_and_an_unknown_kind_is_named():
    kinds = {'dishes': ['pizza', 'soup'], 'toys': ['kite']}
    frame = read_vocabulary(kinds, {'dishes': 2})
    assert frame['weight'].tolist() == [2, 2, 1] and frame['weight'].dtype == np.float64
    for nothing in (None, {}):
        assert read_vocabulary(kinds, nothing)['weight'].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no kind 'dish' to weigh; its kinds are dishes, toys"):
        read_vocabulary(kinds, {'dish': 2})


@pytest.mark.parametrize('content', ['[1, 2]', '{"a": 1}', 'no json', '', '{"dishes": "pizza"}', '{"dishes": ["pizza", 7]}',
                                     '{"dishes": ["pizza", null]}', '{"dishes": {"pizza": 1}}', '{"dishes": ["piz',
                                     '"pizza"', 'null', b'\x89PNG\r\n\x1a\n\x00'])
def test_another_file_is_no_vocabulary(content, tmp_path):
    (tmp_path / 'v.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f'^{tmp_path}/v.json is not a vocabulary') as error:
        read_vocabulary(tmp_path / 'v.json')
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'latin-1'])
def test_a_vocabulary_is_read_in_the_encoding_that_it_was_written_in(encoding, tmp_path, capsys):
    names = ['crème brûlée', 'smørrebrød']
    (tmp_path / 'v.json').write_bytes(json.dumps({'dishes': names}, ensure_ascii=False).encode(encoding))
    assert read_vocabulary(f' {tmp_path}/v.json ')['name'].tolist() == names
    assert ('was read as latin-1' in capsys.readouterr().out) == (encoding == 'latin-1')


@pytest.mark.parametrize('source', [{}, {'dishes': []}, {'dishes': [' ', '']}, {'dishes': (), 'toys': []}])
def test_a_vocabulary_without_names_is_one_sentence(source):
    with pytest.raises(ValueError, match=r'^The vocabulary holds no names\.$'):
        read_vocabulary(source)


def test_an_absent_vocabulary_is_named(tmp_path):
    for path in (tmp_path, tmp_path / 'none.json'):
        with pytest.raises(FileNotFoundError, match=f'^There is no vocabulary {path}: check the path'):
            read_vocabulary(path)


@pytest.mark.parametrize('weights, words', [
    ("{'dish': 2}", "no kind 'dish' to weigh; its kinds are dishes, toys. Did you mean dishes"),
    ('dishes', "are 'dishes'; give"), ([2, 1], r'are \[2, 1\]; give'), ({'dishes': '2'}, "is '2'; it must be"),
    ({'dishes': -1}, 'is -1; it must be'), ({'dishes': True}, 'is True; it must be'),
    ({'dishes': np.nan}, 'is nan; it must be')])
def test_weights_of_kinds_are_numbers_by_kind(weights, words):
    kinds = {'dishes': np.array(['pizza']), 'toys': ('kite',)}
    assert read_vocabulary(kinds, "{'dishes': 2}")['weight'].tolist() == [2, 1]
    with pytest.raises(ValueError, match=words) as error:
        read_vocabulary(kinds, weights)
    assert '\n' not in str(error.value)


def lengths(texts):
    return np.array([[len(text), 3.] for text in texts], np.float32)


@pytest.mark.parametrize('templates', [
    ['a {}.'], ('a {}.',), 'a {}.', "['a {}.']", '["a {}."]', [lambda name: f'a {name}.'], lambda name: f'a {name}.',
    pd.Series(['a {}.'])])
def test_templates_are_texts_or_functions_one_or_several(templates):
    expected = text_vectors(lengths, ['kite', '{y}'], ['a {}.'])
    assert np.array_equal(text_vectors(lengths, ['kite', '{x}'], templates), expected)


def test_open_clips_own_templates_are_templates():
    assert text_vectors(lengths, ['kite'], open_clip.OPENAI_IMAGENET_TEMPLATES).shape == (1, 2)


@pytest.mark.parametrize('names, templates, words', [
    ([], None, 'There are no names: give at least one.'), (pd.Series([], dtype=str), None, 'no names'),
    (['kite'], [], 'There are no templates: give at least one.'), (['kite'], '[]', 'no templates'),
    (['kite'], 'a photo', "The template 'a photo' has no {} for the name."), (['kite'], ['a {x}'], "'a {x}' has no {}"),
    (['kite'], [7], 'The template 7 has no {}')])
def test_nothing_to_embed_is_one_sentence(names, templates, words):
    with pytest.raises(ValueError, match=words) as error:
        text_vectors(lengths, names, templates)
    assert '\n' not in str(error.value)


def test_a_tokenizer_that_needs_another_library_is_one_sentence(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(open_clip, 'get_tokenizer', missing)
    with pytest.raises(ValueError, match="^The tokenizer of ViT-S-32-alt cannot be loaded .No module named 'transf"):
        load_text_tower('ViT-S-32-alt', 'random')


def test_a_name_is_the_mean_of_its_unit_vectors_in_each_template():
    given = []

    def encode(texts):
        given.extend(texts)
        return np.array([[len(text), 3., ord(text[0])] for text in texts], np.float32)

    vectors = text_vectors(encode, pd.Series(['kite', 'pizza'], index=[7, 3]), ('a {}.', 'The {} of all'))
    assert given == ['a kite.', 'a pizza.', 'The kite of all', 'The pizza of all']
    for row, name in zip(vectors, ('kite', 'pizza'), strict=True):
        parts = [np.array([len(text), 3., ord(text[0])]) for text in (f'a {name}.', f'The {name} of all')]
        mean = sum(part / np.linalg.norm(part) for part in parts)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)
    with pytest.raises(ValueError, match="template 'a thing' has no {} for the name"):
        text_vectors(encode, ['kite'], ('a {}', 'a thing'))
    given.clear()
    text_vectors(encode, ['kite'])
    assert given == [template.format('kite') for template in TEMPLATES]
    assert given[0] == 'a photo of a kite.'  # as CLIP was trained


def test_the_miniature_reads_the_names_that_it_was_trained_on(capsys):
    names = demo.objects().query("split == 'pretraining'")['name'].tolist()
    vectors = load_text_tower(MINIATURE)(names)
    assert vectors.dtype == np.float32 and 'vocabulary' not in capsys.readouterr().out
    assert len(np.unique(vectors.round(4), axis=0)) > .95 * len(names)


def test_unknown_words_are_reported_once_a_call(capsys):
    encode = load_text_tower(MINIATURE)
    vectors = encode(['hot dog', 'hot zyzzyva'])
    assert vectors.shape == (2, load_image_tower(MINIATURE).spec.width)
    assert '1 word is not in the vocabulary of local-dir:media/miniature: zyzzyva\n' in capsys.readouterr().out
    encode([f'zy{letter}' for letter in 'abcdefghi'])
    assert capsys.readouterr().out.endswith('zyh, …\n')
    encode(['hot dog'])
    assert 'vocabulary' not in capsys.readouterr().out


def test_batches_of_texts_give_what_each_text_gives():
    encode, texts = load_text_tower(MINIATURE), ['hot dog', 'red apple', 'the sun', 'green leaf', 'dog']
    np.testing.assert_allclose(encode(texts, batch_size=2), np.concatenate([encode([text]) for text in texts]), atol=1e-5)


def test_a_text_is_words_between_a_beginning_and_the_highest_number_cut_to_its_length():
    tokenizer = WordTokenizer(['hot', 'dog'], 5)  # 2 and 3; 4 ends
    assert tokenizer(['Hot-dog!', 'a dog', '', 'dog dog dog dog hot']).tolist() == [
        [1, 2, 3, 4, 0], [1, 3, 4, 0, 0], [1, 4, 0, 0, 0], [1, 3, 3, 3, 4]]
    assert dict(tokenizer.unknown) == {'a': 1}


def test_a_built_in_text_tower_has_open_clips_tokenizer_and_output(tmp_path):
    torch.manual_seed(0)
    clip = open_clip.create_model('ViT-S-32-alt').eval()
    torch.save(clip.state_dict(), tmp_path / 'weights.pt')
    texts = ['a photo of a cat', 'two dogs']
    with torch.inference_mode():
        expected = clip.encode_text(open_clip.get_tokenizer('ViT-S-32-alt')(texts)).numpy()
    found = load_text_tower('ViT-S-32-alt', str(tmp_path / 'weights.pt'))(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
