"""Results: what a run leaves is what was scored, and its folder alone gives the same vectors again."""
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from runs import CONFIG, contents, is_one_sentence, new_model, weights

from guie import checkpoints, results
from guie.checkpoints import load_run, open_checkpoint, save_run
from guie.embedding import embed, embed_all
from guie.files import state_hash
from guie.projection import concatenate, fit_pca, l2_normalise, project
from guie.results import list_runs, read_queries, read_vectors, save_ensemble, save_results, settings_of, shared_queries
from guie.scores import intervals, precisions_of, score_table
from guie.soups import average_states, save_soup
from guie.splits import Splits
from guie.submission import evaluate_submission, export_submission


@pytest.fixture(scope='module')
def splits(tiny_world):
    """Queries of six objects, one of which the index does not show."""
    train = pd.read_csv(tiny_world / 'train.csv').assign(domain='emoji')
    train['path'] = [str(tiny_world / name) for name in train['path']]
    chosen = train[train['label'].isin(train['label'].unique()[:6])]
    query, index = chosen[::6], chosen.drop(chosen.index[::6])
    index = index[index['label'] != query['label'].iloc[2]]
    return Splits({name: part.reset_index(drop=True) for name, part in
                   (('query', query), ('index', index), ('pca', train[::2]))})


@pytest.fixture(scope='module')
def finished(splits, tmp_path_factory):
    """A folder of two runs, their soup and an ensemble of run a and the soup, all with their results."""
    folder, vectors = tmp_path_factory.mktemp('runs'), {}
    for name, seed in (('a', 5), ('b', 6)):
        model = new_model(CONFIG.override(head_seed=seed))
        save_run(folder / name, model, CONFIG.override(seed=seed))
        vectors[name] = embed_all(model, splits)
    save_soup(average_states([folder / 'a', folder / 'b']), folder / 'soup', [folder / 'a', folder / 'b'], 'uniform')
    vectors['soup'] = embed_all(load_run(folder / 'soup', dim=None), splits)
    vectors['both'] = {part: concatenate([vectors['a'][part], vectors['soup'][part]]) for part in splits}
    save_ensemble(folder / 'both', [folder / 'a', folder / 'soup'], fit_pca(vectors['both']['pca'], 12))
    for name, each in vectors.items():
        projection = fit_pca(each['pca'], 12) if name == 'both' else None
        scores = score_table('ingredient', name, each, splits, projection=projection)
        save_results(folder / name, scores, each, splits, projection)
    return folder, vectors


@pytest.mark.parametrize('name', ['a', 'b', 'soup', 'both'])
def test_the_folder_of_a_run_gives_the_64_numbers_that_were_scored(finished, splits, name):
    folder, vectors = finished
    projection = fit_pca(vectors[name]['pca'], 12 if name == 'both' else 32)
    expected = l2_normalise(projection(vectors[name]['query']))
    model = load_run(folder / name)
    found = embed(model, splits['query'])
    assert found.shape == expected.shape and np.allclose(found, expected, atol=2e-6)
    first = embed(load_run(folder / name, dim=5), splits['query'])
    assert np.allclose(first, l2_normalise(expected[:, :5]), atol=2e-6)
    whole = embed(load_run(folder / name, dim=None), splits['query'])
    assert np.allclose(whole, l2_normalise(vectors[name]['query']), atol=2e-6)
    assert np.abs(read_vectors(folder / name)['query'] - expected).max() < 1e-3


def test_the_tower_alone_is_at_hand(finished, splits):
    model, bare = load_run(finished[0] / 'a', tower=True), new_model()
    assert model.head is None and model.projection is None
    assert np.array_equal(embed(model, splits['query']), embed(type(bare)(bare.tower), splits['query']))


def test_the_projection_changes_neither_hash_nor_soup(finished):
    folder, _ = finished
    before = new_model().state_dict()
    assert {'projection.weight', 'projection.bias'} == set(weights(folder / 'a')) - set(before)
    assert state_hash(open_checkpoint(folder / 'a')) == state_hash(before)
    assert set(average_states([folder / 'a', folder / 'b'])) == set(before)
    assert json.loads(open_checkpoint(folder / 'a').metadata['config'])['seed'] == 5


def test_queries_csv_has_each_query_with_its_five_nearest(finished, splits):
    folder, vectors = finished
    query, index = project(vectors['b'])
    table = read_queries(folder / 'b')
    assert table['path'].tolist() == splits['query']['path'].tolist()
    assert table['label'].tolist() == splits['query']['label'].tolist() and set(table['domain']) == {'emoji'}
    expected = precisions_of(vectors['b'], splits)
    assert np.isnan(expected[2]) and np.allclose(table['precision'], expected, equal_nan=True)
    assert table['relevant'].tolist() == [5, 5, 0, 5, 5, 5]
    apart = np.sqrt(((query[:, None].astype(float) - index[None]) ** 2).sum(2))
    for row, distances in enumerate(apart):
        nearest = np.argsort(distances, kind='stable')[:5]
        for rank, place in enumerate(nearest, start=1):
            assert table.loc[row, f'path_{rank}'] == splits['index']['path'][place]
            assert table.loc[row, f'label_{rank}'] == splits['index']['label'][place]
            assert table.loc[row, f'distance_{rank}'] == pytest.approx(distances[place], abs=1e-4)
    kept = read_vectors(folder / 'b')
    assert kept['index_paths'].tolist() == splits['index']['path'].tolist() and kept['index'].dtype == np.float32
    assert kept['index_labels'].tolist() == splits['index']['label'].tolist()


def test_names_of_any_bytes_and_fewer_than_five_images_come_back(tmp_path):
    model, odd = new_model(), [os.fsdecode(b'caf\xe9.png'), 'a,"b"\r.png', 'a\rb']
    save_run(tmp_path / 'run', model, CONFIG)
    frame = pd.DataFrame({'path': odd, 'label': ['NA', 'n\rull', ''], 'domain': 'x'}, dtype=object)
    vectors = {name: l2_normalise(np.random.default_rng(0).standard_normal((3, 8))) for name in ('pca', 'query', 'index')}
    save_results(tmp_path / 'run', pd.DataFrame(), vectors, {'query': frame, 'index': frame})
    table = read_queries(tmp_path / 'run')
    assert table['path'].tolist() == table['path_1'].tolist() == odd and table['label'].tolist() == ['NA', 'n\rull', '']
    assert (table['path_4'] == '').all() and table['distance_4'].isna().all() and table['precision'].tolist() == [1, 1, 1]
    assert read_vectors(tmp_path / 'run')['index_paths'].tolist() == odd


def test_runs_are_listed_with_intervals_and_soups_with_their_ingredients(finished, splits):
    folder, vectors = finished
    table = list_runs(folder).set_index('run')
    assert table.index.tolist() == ['a', 'b', 'both', 'soup']
    assert table['method'].tolist() == ['training', 'training', 'ensemble', 'uniform']
    assert table['seed'].tolist()[:2] == [5, 6] and table['seed'].isna().tolist() == [False, False, True, True]
    assert table['ingredients'].fillna('').tolist() == ['', '', 'a, soup', 'a, b']
    for name in ('a', 'soup'):
        expected = precisions_of(vectors[name], splits)
        assert table.loc[name, 'mp5'] == pytest.approx(np.nanmean(expected))
        low, high = intervals([expected], splits['query']['label'])[0]
        assert table.loc[name, ['low', 'high']].tolist() == pytest.approx([low, high])


def test_runs_without_results_are_listed_by_name_with_their_hash_and_without_their_states(tmp_path):
    for name, seed in (('b', 5), ('a', 6)):
        save_run(tmp_path / 'runs' / name, new_model(CONFIG.override(head_seed=seed)), CONFIG.override(seed=seed))
        (tmp_path / 'runs' / name / 'state/step-1').mkdir(parents=True)
        shutil.copy(tmp_path / 'runs' / name / 'model.safetensors', tmp_path / 'runs' / name / 'state/step-1')
    (tmp_path / 'runs/a/scores.csv').write_text('stage,dim,mp5\ningredient,64,.5\n')
    table = list_runs(tmp_path)
    assert table.columns.tolist() == ['run', 'method', 'model_name', 'image_size', 'augmentation', 'seed', 'epochs',
                                      'ingredients', 'mp5', 'low', 'high', 'hash']
    assert table[['run', 'seed', 'epochs', 'method']].values.tolist() == [['a', 6, 3, 'training'], ['b', 5, 3, 'training']]
    assert table['mp5'].tolist()[0] == .5 and table[['low', 'high']].isna().all(axis=None)
    assert table['hash'].tolist() == [state_hash(weights(tmp_path / 'runs' / name)) for name in 'ab']
    assert list_runs([open_checkpoint(tmp_path / 'runs/b'), tmp_path / 'runs/a'])['run'].tolist() == ['b', 'a']


def test_an_ensemble_is_found_again_where_its_folders_are_moved_together(finished, splits, tmp_path):
    folder, _ = finished
    expected = embed(load_run(folder / 'both'), splits['query'])
    moved = shutil.copytree(folder, tmp_path / 'moved')
    assert np.array_equal(embed(load_run(moved / 'both'), splits['query']), expected)
    save_run(moved / 'a', new_model(CONFIG.override(head_seed=7)), CONFIG)
    with pytest.raises(ValueError, match='other weights than those in') as error:
        load_run(moved / 'both')
    assert is_one_sentence(error)
    shutil.rmtree(moved / 'a')
    with pytest.raises(FileNotFoundError, match='is an ensemble of .*a, which is not there') as error:
        load_run(moved / 'both')
    assert is_one_sentence(error)
    with pytest.raises(ValueError, match='load one of its members'):
        load_run(folder / 'both', tower=True)


@pytest.mark.parametrize('told', ['{', '[{"run": "a"}]', '[1]'])
def test_an_ensemble_with_damaged_metadata_is_one_sentence(finished, tmp_path, told):
    held = weights(finished[0] / 'both')
    checkpoints.save_state(held, tmp_path / 'model.safetensors', {'method': 'ensemble', 'members': told})
    with pytest.raises(ValueError, match='cannot be built') as error:
        load_run(tmp_path)
    assert '\n' not in str(error.value)


def test_an_ensemble_called_with_tensors_resizes_for_each_member(finished):
    model = load_run(finished[0] / 'both')
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        parts = [member(images) for member in model.members]  # both take 32 pixels
        assert torch.allclose(model(images), model.join(parts), atol=1e-6)
        larger = model(torch.nn.functional.interpolate(images.float(), (64, 64), mode='nearest'))
    assert larger.shape == (3, 12) and torch.allclose(larger.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize('name', ['a', 'both'])
def test_a_run_is_exported_by_its_path(finished, splits, tmp_path, name):
    folder, _ = finished
    export_submission(folder / name, tmp_path / 'submission.zip')
    replay = evaluate_submission(tmp_path / 'submission.zip', splits['query'], splits['index'])
    own = embed(load_run(folder / name), splits['query'])
    assert replay['dim'] == own.shape[1] and np.abs(replay['query'] - own).max() < .05  # resized in floats, here in bytes


def test_vectors_of_an_ensemble_are_cached_by_member(finished, splits, tmp_path, monkeypatch):
    model = load_run(finished[0] / 'both')
    first = embed_all(model, splits, tmp_path, ['query', 'index'])
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*.npz')) == [
        'member-1/index.npz', 'member-1/query.npz', 'member-2/index.npz', 'member-2/query.npz']
    monkeypatch.setattr('guie.embedding.loader', lambda *_, **__: pytest.fail('nothing is read again'))
    again = embed_all(model, splits, tmp_path / 'other', ['query', 'index'], tmp_path)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_run_without_projection_says_so(tmp_path, capsys):
    save_run(tmp_path / 'old', new_model(CONFIG.override(embedding_dim=80)), CONFIG)
    assert load_run(tmp_path / 'old').projection is None
    assert 'old holds no projection, so its vectors have 80 numbers; save_results adds one.' in capsys.readouterr().out
    load_run(tmp_path / 'old', dim=None)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('text, error, words', [
    (None, FileNotFoundError, 'has no queries.csv: run its notebook again'),
    ('', ValueError, 'is not a table of save_results'),
    ('a,b\n1,2\n', ValueError, "is not a table of save_results .*precision"),
    (f'precision,relevant,{",".join(f"distance_{n}" for n in range(1, 6))}\nhigh,1,1,1,1,1,1\n', ValueError,
     'is not a table')])
def test_queries_that_cannot_be_read_are_one_sentence(tmp_path, text, error, words):
    if text is not None:
        (tmp_path / 'queries.csv').write_text(text)
    with pytest.raises(error, match=words) as caught:
        read_queries(tmp_path)
    assert is_one_sentence(caught)


def test_settings_name_what_a_run_was_made_of(finished):
    folder, _ = finished
    told = {name: settings_of(folder / name) for name in ('a', 'soup', 'both')}
    assert told['a']['method'] == 'training' and told['a']['seed'] == 5 and told['a']['layer_lrs'] == [[6, 1e-4]]
    assert told['soup'] == {name: value for name, value in told['a'].items() if name not in ('augmentation', 'seed')} | {
        'method': 'uniform', 'ingredients': 'a, b'}
    assert told['both'] == {'method': 'ensemble', 'ingredients': 'a, soup'}


def test_queries_are_matched_by_path_or_where_data_moved_by_label_and_file_name():
    def frame(*rows):
        return pd.DataFrame(rows, columns=['path', 'label'])

    first = frame(('/x/1.png', 'a'), ('/x/2.png', 'a'), ('/x/1.png', 'b'))
    assert [rows.tolist() for rows in shared_queries(first, frame(('/x/2.png', 'a'), ('/x/9.png', 'c'), ('/x/1.png', 'a')))
            ] == [[0, 1], [2, 0]]
    assert [rows.tolist() for rows in shared_queries(first, frame(('/y/1.png', 'b'), ('/y/2.png', 'a')))] == [[1, 2], [1, 0]]
    assert [len(rows) for rows in shared_queries(first, frame(('/y/7.png', 'a')))] == [0, 0]
    twice = frame(('/x/1.png', 'a'), ('/x/1.png', 'a'))
    assert [rows.tolist() for rows in shared_queries(twice, twice)] == [[0, 1], [0, 1]]


def test_damaged_vectors_count_as_none(tmp_path):
    assert read_vectors(tmp_path) is None
    (tmp_path / 'vectors.npz').write_bytes(b'PK\x03\x04 cut short')
    assert read_vectors(tmp_path) is None


def test_a_disk_that_refuses_the_weights_keeps_scores_and_the_run(finished, splits, tmp_path, monkeypatch):
    folder, vectors = finished
    save_run(tmp_path / 'run', new_model(), CONFIG)
    before = contents(tmp_path / 'run')

    def refuse(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints, 'save_file', refuse)
    with pytest.raises(OSError, match='No space left on device') as error:
        results.save_results(tmp_path / 'run', pd.DataFrame(), vectors['a'], splits)
    after = contents(tmp_path / 'run')
    assert is_one_sentence(error) and {name: after[name] for name in before} == before
    assert set(after) - set(before) == {'scores.csv', 'queries.csv', 'vectors.npz'}


def test_a_damaged_table_of_queries_is_printed_and_costs_one_run_its_interval(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / 'runs')
    (tmp_path / 'runs/a/queries.csv').write_text('another,table\n1,2\n')
    table = list_runs(tmp_path / 'runs').set_index('run')
    assert table['low'].isna().tolist() == [True, False, *table['low'].isna()[2:]] and len(table) == 4
    assert f'{tmp_path}/runs/a/queries.csv is not a table of save_results' in capsys.readouterr().out


def test_the_score_of_a_run_is_that_of_the_most_numbers_up_to_64(tmp_path):
    save_run(tmp_path, new_model(), CONFIG)
    rows = [('untrained', 64, .2), ('ingredient', 512, .9), ('ingredient', 64, .5), ('ingredient', 16, .3)]
    pd.DataFrame(rows, columns=['stage', 'dim', 'mp5']).to_csv(tmp_path / 'scores.csv')
    assert open_checkpoint(tmp_path).score == .5
