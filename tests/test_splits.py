"""Splits: which classes a run trains on, and objects held out of them; as a table, and as a file."""
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from guie.config import Config
from guie.datasets import read_dataset
from guie.scores import score_table
from guie.splits import (
    Splits,
    describe,
    load_data,
    sample_classes,
    sample_objects,
    select_classes,
    selection_hash,
    split_by_class,
)
from tests.runs import is_one_sentence
from tests.worlds import table, write_files

# Selection


def test_classes_are_drawn_before_the_small_ones_are_dropped():
    frame = table({f'{number:02d}': 2 if number % 2 else 9 for number in range(40)})
    sizes = [select_classes(frame, n_classes=20, seed=seed)['label'].nunique() for seed in range(20)]
    assert min(sizes) < 10 < max(sizes) and max(sizes) < 20  # dropping first would always leave 20
    assert np.mean(sizes) == pytest.approx(10, abs=1)


def test_the_draw_is_made_in_each_domain():
    frame = pd.concat([table({f'a{n}': 5 for n in range(30)}, 'a'), table({f'b{n}': 5 for n in range(9)}, 'b')])
    counts = select_classes(frame, n_classes=7).groupby('domain')['label'].nunique()
    assert dict(counts) == {'a': 7, 'b': 7}


def test_every_class_keeps_between_min_and_max_images():
    frame = table({'one': 1, 'three': 3, 'four': 4, 'fifty': 50, 'many': 120})
    selection = select_classes(frame)
    assert dict(selection['label'].value_counts()) == {'fifty': 50, 'many': 50, 'four': 4}
    assert set(selection['path']) <= set(frame['path']) and selection['path'].is_unique


def test_images_of_a_large_class_are_sampled_evenly():
    frame = table({'many': 40})
    taken = sum(
        frame['path'].isin(select_classes(frame, max_images=10, seed=seed)['path']).astype(int) for seed in range(100)
    )
    assert 5 < taken.min() and taken.max() < 52  # 25 each on average, 4.5 standard deviations


def test_the_selection_depends_on_the_seed_and_not_on_the_order_of_rows():
    frame = pd.concat([table({f'a{n}': n for n in range(30)}, 'a'), table({f'b{n}': n for n in range(30)}, 'b')])
    first = select_classes(frame, max_images=8, n_classes=20, seed=5)
    again = select_classes(frame.sample(frac=1, random_state=1), max_images=8, n_classes=20, seed=5)
    other = select_classes(frame, max_images=8, n_classes=20, seed=6)
    assert first.equals(again) and not first.equals(other)
    assert first.equals(first.sort_values(['domain', 'label', 'path'], ignore_index=True))


def test_more_classes_than_there_are_takes_all_and_says_so(capsys):
    selection = select_classes(table({'a': 4, 'b': 5}), n_classes=9691)
    assert selection['label'].nunique() == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'things: all 2 classes are taken (n_classes is 9,691)'
    assert said[1] == f'9 images of 2 classes (2 things), hash {selection_hash(selection)}' and len(said) == 2


@pytest.mark.parametrize('frame', [table({'a': 3}), table({})], ids=['small classes', 'no rows'])
def test_nothing_left_is_an_error(frame):
    with pytest.raises(ValueError, match='No class has 4 images'):
        select_classes(frame)


def test_one_label_in_two_concatenated_domains_is_refused():
    with pytest.raises(ValueError, match='label 1 has two domains, cars and toys'):
        select_classes(pd.concat([table({'1': 5}, 'cars'), table({'1': 5}, 'toys')]))


@pytest.mark.parametrize('fraction, held', [(0.25, 2), (0.01, 1), (0.99, 7)])
def test_a_split_by_class_shares_no_label_and_loses_no_image(fraction, held):
    frame = table({f'{n}': n + 1 for n in range(8)})
    rest, out = split_by_class(frame, fraction, seed=1)
    assert not set(rest['label']) & set(out['label']) and out['label'].nunique() == held
    assert sorted([*rest['path'], *out['path']]) == sorted(frame['path'])
    shuffled = split_by_class(frame.sample(frac=1, random_state=0), fraction, seed=1)[1]
    assert set(shuffled['label']) == set(out['label'])


@pytest.mark.parametrize('labels, fraction', [({'a': 3}, 0.5), ({'a': 1, 'b': 1}, 0), ({'a': 1, 'b': 1}, 1)])
def test_a_split_that_would_leave_nothing_is_refused(labels, fraction):
    with pytest.raises(ValueError, match='A split needs 2 labels and a fraction in 0…1'):
        split_by_class(table(labels), fraction)


def test_the_hash_tells_selections_apart_but_not_machines():
    frame = table({'a': 3, 'b': 4})
    elsewhere = frame.assign(path='/kaggle/input' + frame['path']).sample(frac=1, random_state=0)
    assert selection_hash(frame) == selection_hash(elsewhere) and len(selection_hash(frame)) == 12
    changed = [
        frame.iloc[1:],
        frame.assign(label=frame['label'].replace('a', 'c')),
        frame.assign(path=frame['path'].str.replace('000', '009')),
    ]
    assert len({selection_hash(other) for other in [frame, *changed]}) == 4


def test_at_full_size_a_limited_number_of_classes_is_held_out_of_training(tmp_path):
    rows = [(f'{label}/{number}.jpg', f'{label:03d}') for label in range(200) for number in range(6)]
    pd.DataFrame(rows, columns=['path', 'label']).to_csv(tmp_path / 'all.csv', index=False)
    write_files(tmp_path, [path for path, _ in rows])
    for limits, count in (({}, 20), ({'most_held_out': 5}, 5)):
        splits = load_data(str(tmp_path / 'all.csv'), config=Config(), **limits)
        held = [set(splits[name]['label']) for name in ('query', 'selection_query')]
        trained = set(splits['train']['label'])
        assert len(held[0]) == count and held[0].isdisjoint(held[1]) and len(trained) == 200 - len(held[0] | held[1])
        assert abs(len(held[1]) - count) <= 2 and trained.isdisjoint(held[0] | held[1])
        assert set(splits['index']['label']) == held[0] and len(splits['index']) == 2 * len(splits['query'])


# The splits of a run


def write_set(folder, name, counts):
    write_files(folder, [f'images/{label}/{number}.jpg' for label, count in counts.items() for number in range(count)])
    lines = [f'images/{label}/{number}.jpg,{label}' for label, count in counts.items() for number in range(count)]
    (folder / f'{name}.csv').write_text('\n'.join(['path,label', *lines]) + '\n')
    return str(folder / f'{name}.csv')


def small(**changes):
    return Config().override(**{'n_classes': 100, 'max_images': 6, 'pca_images': 20, **changes})


def test_what_is_not_given_is_held_out_of_the_training_classes_and_no_image_stands_in_two_splits(tmp_path):
    source = write_set(tmp_path, 'train', {f'c{n:02d}': 6 for n in range(30)})
    splits = load_data(source, config=small())
    labels = {name: set(frame['label']) for name, frame in splits.items()}
    assert labels['query'] == labels['index'] and labels['selection_query'] == labels['selection_index']
    apart = [labels['train'], labels['query'], labels['selection_query']]
    assert [len(part) for part in apart] == [24, 3, 3] and len(set.union(*apart)) == 30
    paths = pd.concat([splits[name] for name in splits if name != 'pca'])['path']
    assert paths.is_unique and len(paths) == 180
    assert len(splits['query']) == 6 and len(splits['index']) == 12  # of each class's six one in three is a query
    assert len(splits['pca']) == 20 and set(splits['pca']['path']) <= set(splits['train']['path'])
    again, other = (load_data(source, config=small(**seeds)) for seeds in ({'seed': 6}, {'data_seed': 6}))
    assert all(again[name].equals(splits[name]) for name in splits)  # ingredients share classes and held-out objects
    assert not other['query'].equals(splits['query'])


def test_images_of_a_table_may_lie_elsewhere(tmp_path):
    write_set(tmp_path / 'images', 'train', {'x': 5, 'y': 5, 'z': 5})
    absolute = read_dataset(tmp_path / 'images/train.csv').drop(columns='domain')
    (tmp_path / 'tables').mkdir()
    shutil.copy(tmp_path / 'images/train.csv', tmp_path / 'tables/relative.csv')
    absolute.to_csv(tmp_path / 'tables/absolute.csv', index=False)
    for name, root in (('relative', tmp_path / 'images'), ('absolute', '/')):
        source = str(tmp_path / f'tables/{name}.csv')
        with pytest.raises((ValueError, FileNotFoundError), match='as the root of DATA'):
            load_data(source, source, source, (source, source), config=small())
        splits = load_data(source, source, source, (source, source), config=small(), root=root)
        assert set(splits['query']['path']) == set(absolute['path'])


def test_splits_that_are_given_are_taken_as_they_are_and_shared_classes_are_named(tmp_path, capsys):
    train = write_set(tmp_path / 'a', 'train', {'x': 5, 'y': 5, 'seen': 5})
    other = write_set(tmp_path / 'b', 'query', {'seen': 1, 'z': 2})
    splits = load_data([train, write_set(tmp_path / 'c', 'more', {'w': 9})], other, other, (other, other), config=small())
    assert set(splits['train']['label']) == {'x', 'y', 'seen', 'w'} and len(splits['train']) == 21  # at most 6 of w
    assert len(splits['query']) == len(splits['selection_index']) == 3
    said = capsys.readouterr().out
    assert '1 of the classes in query are trained on too' in said and 'first seen' in said


def test_a_query_without_an_index_is_one_sentence(tmp_path):
    train = write_set(tmp_path, 'train', {'x': 5, 'y': 5})
    with pytest.raises(ValueError, match='query and index belong together: give both, or neither'):
        load_data(train, train, config=small())
    with pytest.raises(ValueError, match='selection_query and selection_index belong together'):
        load_data(train, train, train, (train, None), config=small())


def test_a_label_seen_once_is_not_trained_on_and_as_a_query_left_out_and_counted(tmp_path, capsys):
    train = write_set(tmp_path / 'a', 'train', {'x': 5, 'y': 5, 'once': 1})
    query = write_set(tmp_path / 'b', 'query', {'seen': 2, 'once': 1})
    index = write_set(tmp_path / 'c', 'index', {'seen': 3})
    splits = load_data(train, query, index, (query, index), config=small())
    assert set(splits['train']['label']) == {'x', 'y'}
    vectors = {name: np.ones((len(splits[name]), 4), np.float32) for name in ('query', 'index')}
    assert score_table('s', 'm', vectors, splits, dims=(None,))['mp5'].tolist() == [1]
    assert '1 of 3 queries have no image of their object in the index: left out' in capsys.readouterr().out


# One's own data of any size


def own(folder, counts):
    write_files(folder, [f'{label}/{label}{number}.jpg' for label, count in counts.items() for number in range(count)])
    return str(folder)


@pytest.mark.parametrize('counts', [
    {'a': 2, 'b': 2}, {'a': 2, 'b': 1}, {'a': 3, 'b': 3}, {'a': 4, 'b': 5, 'c': 1}, {'a': 100, 'b': 2},
    {f'{n:02}': 2 for n in range(9)}, {f'{n:02}': 10 for n in range(16)}, {f'{n:02}': 2 for n in range(30)},
    {f'{n:02}': 1 + (n == 7) for n in range(20)}, {f'{n:03}': 3 for n in range(150)}])
def test_splits_of_data_of_any_size_can_be_trained_on_and_scored(tmp_path, counts):
    splits = load_data(own(tmp_path / 'pets', counts), config=Config())
    assert [*splits] == ['query', 'index', 'selection_query', 'selection_index', 'train', 'pca']
    assert splits['train']['label'].nunique() >= 2 and splits['train']['label'].value_counts().max() <= 50
    for prefix in ('', 'selection_'):
        query, index = splits[f'{prefix}query'], splits[f'{prefix}index']
        assert query['label'].isin(index['label']).any() and not set(query['path']) & set(index['path'])
    again = load_data(str(tmp_path / 'pets'), config=Config())
    assert all(again[name].equals(frame) for name, frame in splits.items())


def test_of_few_classes_images_are_held_out_and_of_few_images_none_and_both_are_said(tmp_path, capsys):
    splits = load_data(own(tmp_path / 'six', {'a': 12, 'b': 12}), config=Config())
    said = capsys.readouterr().out
    held = [set(splits[name]['path']) for name in ('query', 'selection_query', 'train')]
    assert [len(part) for part in held] == [4, 4, 16] and len(set.union(*held)) == 24
    assert splits['index'].equals(splits['train']) and splits['selection_index'].equals(splits['train'])
    assert '2 classes are too few to hold some out' in said and 'is not one of never-seen objects' in said
    assert 'A PCA of 16 training images has at most 15 dimensions instead of 64.' in said and 'spared' not in said
    splits = load_data(own(tmp_path / 'two', {'a': 2, 'b': 2}), config=Config())
    said = capsys.readouterr().out
    assert [len(splits[name]) for name in ('query', 'index', 'train')] == [2, 2, 4]
    assert 'No images can be spared for query: it is 2 that are used otherwise too.' in said
    assert 'Fewer than 2 classes have 4 images (min_images): 2 are enough.' in said
    splits = load_data(own(tmp_path / 'mixed', {'a': 8, 'b': 8, 'c': 3}), config=Config())
    assert '1 classes have fewer than 4 images (min_images) and are left out' in capsys.readouterr().out
    assert set(splits['train']['label']) == {'a', 'b'}


def test_with_enough_classes_it_is_still_classes_that_are_held_out(tmp_path, capsys):
    splits = load_data(own(tmp_path / 'pets', {f'{n:02}': 4 for n in range(20)}), config=Config())
    assert not set(splits['query']['label']) & set(splits['train']['label'])
    assert splits['query']['label'].nunique() == splits['selection_query']['label'].nunique() == 2
    assert 'too few' not in capsys.readouterr().out


@pytest.mark.parametrize('counts, found', [({'cat': 9}, '9 images of 1 classes (cat)'),
                                           ({'cat': 1, 'dog': 1}, '2 images of 2 classes (cat, dog)'),
                                           ({f'{n}': 1 for n in range(6)}, '6 images of 6 classes (0, 1, 2, 3 and 2 more)')])
@pytest.mark.parametrize('kind', ['folder', 'table'])
def test_data_that_nothing_can_be_learned_from_are_one_sentence_with_what_was_found(tmp_path, counts, found, kind):
    source = own(tmp_path / 'pets', counts) if kind == 'folder' else write_set(tmp_path, 'pets', counts)
    with pytest.raises(ValueError) as error:
        load_data(source, config=Config())
    assert f'{source} holds {found}' in str(error.value) and is_one_sentence(error)
    assert str(error.value).endswith('give a folder of at least 2 class folders with 2 images each.')


def test_a_query_whose_classes_the_index_lacks_is_named_before_anything_is_embedded(tmp_path):
    train, query, index = (write_set(tmp_path / name, name, {f'{name}{n}': 3 for n in (1, 2)})
                           for name in ('train', 'query', 'index'))
    with pytest.raises(ValueError, match='No image of query has its class in index') as error:
        load_data(train, query, index, config=Config())
    assert is_one_sentence(error)


# A run's splits as an object


ODD_LABELS = ['NA', '', '007', 'a,b', 'two "marks"', 'café 可乐', 'two\nlines', ' spaced ', 'nan']


@pytest.fixture
def splits():
    odd = pd.DataFrame([(f'/odd/{number}, "{label}".jpg', label, '') for number, label in enumerate(ODD_LABELS)],
                       columns=['path', 'label', 'domain'])
    train = pd.concat([table({'x': 3, 'y': 2}, 'things'), table({'z': 4}, 'cars')], ignore_index=True)
    return Splits({'query': odd, 'train': train, 'pca': train.sample(4, random_state=0)})


def test_splits_are_a_table_of_their_numbers_and_hashes(splits):
    found = splits.table()
    assert found.index.tolist() == ['query', 'train', 'pca'] and found.index.name == 'split'
    assert found.columns.tolist() == ['images', 'classes', 'domains', 'hash']
    assert found.loc['train'].tolist() == [9, 3, 'cars, things', selection_hash(splits['train'])]
    assert found.loc['query', ['images', 'classes']].tolist() == [9, 9] and found['hash'].nunique() == 3


def test_a_notebook_shows_splits_as_that_table(splits):
    shown = splits._repr_html_()
    assert shown.startswith('<table') and all(str(cell) in shown for cell in [*splits.table().loc['train'], 'query', 'pca'])


def test_saved_splits_come_back_in_the_same_order_with_every_label_as_it_was(splits, tmp_path):
    splits.save(tmp_path / 'new/splits.csv')
    again = Splits.load(tmp_path / 'new/splits.csv')
    assert type(again) is Splits and list(again) == list(splits)
    for name, frame in splits.items():
        pd.testing.assert_frame_equal(again[name], frame.reset_index(drop=True))
    again.save(tmp_path / 'twice.csv')
    assert (tmp_path / 'twice.csv').read_bytes() == (tmp_path / 'new/splits.csv').read_bytes()


@pytest.mark.parametrize('name', [*map(os.fsdecode, ('可乐'.encode('gbk'), 'ü'.encode('cp437'), b'\xff\xfe')), '可乐',
                                  'two\nlines', 'return\rhere', 'tab\there', 'line\u2028separator', '\x0b\x1c'])
def test_a_path_may_be_of_any_bytes(name, tmp_path, capsys):
    for folder in ('a', name):
        (tmp_path / name / folder).mkdir(parents=True)
        for number in range(4):
            (tmp_path / name / folder / f'{number}{name}.jpg').touch()
    frame = select_classes(read_dataset(tmp_path / name))
    assert len(frame) == 8 and set(frame['label']) == {'a', name} and set(frame['domain']) == {name}
    splits = Splits(train=frame, query=frame.head(3))
    splits.save(tmp_path / 'splits.csv')
    again = Splits.load(tmp_path / 'splits.csv')
    pd.testing.assert_frame_equal(again['train'], frame)
    assert again.table().equals(splits.table()) and repr(splits).encode() and splits._repr_html_().encode()
    assert selection_hash(frame) != selection_hash(frame.assign(label='b')) and capsys.readouterr().out.encode()


def test_the_hash_of_a_selection_of_plain_names_is_what_it_was():
    assert selection_hash(table({'a': 2, 'b': 1})) == '8f57f68b8d9c'


def test_the_splits_of_a_run_survive_their_file(tmp_path):
    source = write_set(tmp_path, 'train', {f'{number:03d}': 6 for number in range(12)})
    made = load_data(source, config=small())
    made.save(tmp_path / 'splits.csv')
    assert Splits.load(tmp_path / 'splits.csv').table().equals(made.table())


def test_a_sample_of_the_objects_holds_all_their_images_and_no_others(splits):
    query, index = table({'a': 2, 'b': 1, 'c': 3}), table({'c': 2, 'a': 1, 'only indexed': 2, 'b': 1})
    found = sample_objects({'query': query, 'index': index}, 2)
    assert found['query'].tolist() == [0, 1, 2] and found['index'].tolist() == [2, 5]
    every = sample_objects({'query': query, 'index': index}, None)
    assert every['query'].tolist() == list(range(6)) and every['index'].tolist() == list(range(6))


def test_a_sample_of_the_trained_classes_is_of_all_domains_alike():
    train = pd.DataFrame({'label': np.repeat([f'{i:03}' for i in range(100)], 3)})
    some = sample_classes(train, classes=20, each=2)
    assert len(some) == 40 and some['label'].nunique() == 20 and some.equals(train.loc[some.index])
    assert 5 <= (some.drop_duplicates('label')['label'] < '050').sum() <= 15


@pytest.mark.parametrize('sources, name', [
    ('pets', 'pets'), ('pets/train', 'pets'), ('pets.csv', 'pets'), ('my pets', 'my-pets')])
def test_splits_have_the_name_of_their_data(tmp_path, sources, name):
    write_files(tmp_path, [f'{sources.removesuffix(".csv")}/{kind}/{number}.jpg' for kind in 'abc' for number in range(3)])
    if sources.endswith('.csv'):
        (tmp_path / sources).write_text('path,label\n' + ''.join(f'pets/{k}/{n}.jpg,{k}\n' for k in 'abc' for n in range(3)))
    assert load_data(tmp_path / sources, config=Config(min_images=1)).name == name


def test_a_class_of_one_image_is_not_held_out(tmp_path, capsys):
    counts = {f'many{number}': 6 for number in range(30)} | {f'one{number}': 1 for number in range(120)}
    write_files(tmp_path / 'set', [f'{name}/{name}_{number}.jpg' for name, count in counts.items()
                                   for number in range(count)])
    splits = load_data(tmp_path / 'set', config=Config())
    for query, index in (('query', 'index'), ('selection_query', 'selection_index')):
        assert set(splits[query]['label']) == set(splits[index]['label']) and splits[query]['label'].nunique() >= 2
    assert not any(label.startswith('one') for part in splits.values() for label in part['label'])
    assert re.search(r'Only \d objects of query are in index too, so scores on them are rough.', capsys.readouterr().out)


def test_a_table_without_domains_is_described_and_unused_categories_are_not_drawn():
    frame = table({f'{number:02d}': 5 for number in range(9)})
    assert describe(frame.drop(columns='domain')) == f'45 images of 9 classes, hash {selection_hash(frame)}'
    few = frame.assign(label=frame['label'].astype('category'))
    few = few[few['label'].isin(['00', '01', '02'])]
    assert select_classes(few, n_classes=3)['label'].nunique() == 3
