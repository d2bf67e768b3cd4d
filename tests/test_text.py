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


@pytest.mark.parametrize('content', ['[1, 2]', '{"a": 1}', 'no json'])
def test_another_file_is_no_vocabulary(content, tmp_path):
    (tmp_path / 'v.json').write_text(content)
    with pytest.raises(ValueError, match='is not a vocabulary'):
        read_vocabulary(tmp_path / 'v.json')


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
    assert vectors.dtype == np.float32 and 'unknown' not in capsys.readouterr().out
    assert len(np.unique(vectors.round(4), axis=0)) > .95 * len(names)


def test_unknown_words_are_reported_once_a_call(capsys):
    encode = load_text_tower(MINIATURE)
    vectors = encode(['hot dog', 'hot zyzzyva'])
    assert vectors.shape == (2, load_image_tower(MINIATURE).spec.width)
    assert '1 words are unknown to local-dir:media/miniature: zyzzyva' in capsys.readouterr().out
    encode(['hot dog'])
    assert 'unknown' not in capsys.readouterr().out


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
