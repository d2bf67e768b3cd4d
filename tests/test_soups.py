"""Soups: the exact average in little memory, greedy soups, WiSE-FT; ingredients stay as they are."""
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CONFIG, contents, is_one_sentence, new_model
from safetensors.torch import load_file, save_file
from test_checkpoints import SPEC, as_authors, random_state
from worlds import ROOT, write_files

from guie import embedding, soups
from guie.checkpoints import (
    Checkpoint,
    base_state,
    find_ingredients,
    load_run,
    open_checkpoint,
    save_run,
    save_state,
)
from guie.config import Config
from guie.embedding import embed, embed_all
from guie.files import file_hash, state_hash
from guie.results import list_runs
from guie.retrieval import mean_precision_at_5, precision_at_5
from guie.scores import intervals
from guie.soups import (
    StateEmbedder,
    average_states,
    data_of,
    greedy_soup,
    interpolate_states,
    interpolation_scores,
    mean_tensor,
    save_soup,
    soup_metadata,
    sweep_alpha,
    task_vector_cosines,
)
from guie.splits import describe, load_data
from guie.submission import evaluate_submission, export_submission


def written(folder, states, **metadata):
    paths = [folder / f'run{i}' / 'model.safetensors' for i in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_state(state, path, {key: json.dumps(value) for key, value in metadata.items()})
    return paths


def assert_same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_the_soup_of_1_2_3_4_is_two_and_a_half_everywhere_and_not_its_last_ingredient(tmp_path):
    states = [{name: torch.full_like(x, i) for name, x in random_state().items()} for i in (1, 2, 3, 4)]
    soup = average_states(written(tmp_path, states))
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        assert tensor.shape == states[0][name].shape
        assert (tensor == 2.5).all() and (tensor != states[-1][name]).all()


@pytest.mark.parametrize('chunk', [1, 7, 8, 1 << 15])
def test_the_average_is_the_float64_mean_rounded_once_whatever_the_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(soups, 'mean_tensor', partial(mean_tensor, chunk=chunk))
    states = [random_state(seed) | {'empty': torch.ones(0, 3)} for seed in range(3)]
    soup = average_states(written(tmp_path, states))
    for name in soup:
        exact = np.mean([state[name].numpy().astype(np.float64) for state in states], axis=0)
        np.testing.assert_array_equal(soup[name].numpy(), exact.astype(np.float32))


def test_weights_count_by_their_share(tmp_path):
    states = [random_state(seed) for seed in range(3)]
    paths = written(tmp_path, states)
    soup = average_states(paths, weights=[1, 0, 3])
    for name in soup:
        expected = .25 * states[0][name].double() + .75 * states[2][name].double()
        assert torch.equal(soup[name], expected.float())
    tenth = average_states(paths, weights=[.1, 0, .3])
    np.testing.assert_allclose(tenth['tower.proj'], soup['tower.proj'], rtol=1e-6)


def test_the_average_of_one_file_is_that_file_to_the_sign_of_a_zero(tmp_path):
    state = random_state() | {'tower.zeros': torch.tensor([-0., 0.])}
    soup = average_states(written(tmp_path, [state]))
    assert state_hash(soup) == state_hash(state)


@pytest.mark.parametrize('weights', [[1], [1, 2, 3], [1, -1], [0, 0], [1, float('nan')], [1, float('inf')]])
def test_weights_that_are_no_shares_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match='as many weights, none negative'):
        average_states(written(tmp_path, [random_state(0), random_state(1)]), weights)


def test_no_path_is_refused_and_one_path_twice_is_announced(tmp_path, capsys):
    with pytest.raises(ValueError, match='at least one checkpoint'):
        average_states([])
    path, = written(tmp_path, [random_state()])
    soup = average_states([path, path.parent / '..' / 'run0' / path.name])
    assert_same(soup, load_file(path))
    assert 'more than once' in capsys.readouterr().out


def test_the_original_authors_files_average_with_ours_as_ours_do(tmp_path):
    states = [random_state(seed) for seed in (0, 1)]
    ours, theirs = written(tmp_path, states), [tmp_path / '0_0.688', tmp_path / '1_0.688']
    for path, state in zip(theirs, states):
        torch.save(as_authors(state), path)
    for paths in (theirs, [ours[0], theirs[1]], [theirs[0], ours[1]]):
        assert_same(dict(sorted(average_states(paths).items())), dict(sorted(average_states(ours).items())))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_averages_to_float32_and_says_so(tmp_path, capsys, dtype):
    states = [{name: x.to(dtype) for name, x in random_state(seed).items()} for seed in (0, 1)]
    soup = average_states(written(tmp_path, states))
    for name in soup:
        assert soup[name].dtype == torch.float32
        assert torch.equal(soup[name], ((states[0][name].double() + states[1][name].double()) / 2).float())
    assert 'float32' in capsys.readouterr().out


def test_float64_stays_float64(tmp_path):
    soup = average_states(written(tmp_path, [{'a': torch.tensor([1 / 3]).double()}] * 2))
    assert soup['a'].dtype == torch.float64 and soup['a'].item() == torch.tensor([1 / 3]).double().item()


def test_tensors_that_are_not_contiguous_average_by_place(tmp_path):
    for i in (0, 1):
        torch.save({'a': (torch.arange(6.).view(2, 3) + i).T}, tmp_path / str(i))
    soup = average_states([tmp_path / '0', tmp_path / '1'])
    assert torch.equal(soup['a'], torch.arange(6.).view(2, 3).T + .5)


def test_of_step_counters_the_largest_stays_and_other_integers_must_be_equal(tmp_path):
    def state(steps, index):
        return {'bn.running_mean': torch.tensor([1. * steps]), 'bn.num_batches_tracked': torch.tensor(steps),
                'position_index': torch.tensor([1, index]), 'mask': torch.tensor([True, False])}
    soup = average_states(written(tmp_path / 'a', [state(10, 2), state(30, 2), state(20, 2)]))
    assert soup['bn.num_batches_tracked'] == 30 and soup['bn.running_mean'] == 20
    assert soup['position_index'].tolist() == [1, 2] and soup['mask'].dtype == torch.bool
    with pytest.raises(ValueError, match='integer buffers: position_index'):
        average_states(written(tmp_path / 'b', [state(10, 2), state(10, 3)]))


def test_disagreement_lists_the_first_differences_of_each_kind(tmp_path):
    good = {f'tower.{i}': torch.zeros(2) for i in range(5)}
    good |= {'head.centers': torch.zeros(6, 4), 'c': torch.ones(1)}
    bad = {f'tower.x{i}': torch.zeros(2) for i in range(4)}
    bad |= {'tower.4': torch.zeros(2), 'head.centers': torch.zeros(9, 4), 'c': torch.tensor([1])}
    other_spec = SPEC | {'activation': 'quick_gelu', 'image_size': 96, 'pretrained': 'y'}
    paths = written(tmp_path / 'a', [good], spec=SPEC) + written(tmp_path / 'b', [bad], spec=other_spec)
    with pytest.raises(ValueError) as error:
        average_states(paths)
    message = str(error.value)
    for part in (str(paths[0]), str(paths[1]), 'missing: tower.0, tower.1, tower.2 and 1 more;',
                 'too many: tower.x0, tower.x1, tower.x2 and 1 more;',
                 'shapes: head.centers (9, 4) against (6, 4);', 'number types or integer buffers: c;',
                 'image_size 96 against 64, activation quick_gelu against gelu'):
        assert part in message
    assert 'pretrained' not in message


@pytest.mark.parametrize('field, value', [('model_name', 'other'), ('image_size', 96), ('mean', [0, 0, 0]),
                                          ('std', [1, 1, 1]), ('activation', 'quick_gelu')])
def test_each_setting_that_belongs_to_the_weights_must_agree(tmp_path, field, value):
    paths = written(tmp_path / 'a', [random_state()], spec=SPEC)
    paths += written(tmp_path / 'b', [random_state()], spec=SPEC | {field: value})
    with pytest.raises(ValueError, match=f'cannot be averaged with .* settings: {field}'):
        average_states(paths)
    torch.save(random_state(), tmp_path / 'bare')
    average_states([paths[0], tmp_path / 'bare'])


def test_a_diverged_ingredient_is_named(tmp_path):
    states = [random_state(seed) for seed in range(3)]
    states[1]['tower.proj'][3, 2] = float('nan')
    with pytest.raises(ValueError, match=r'tower\.proj is not finite in \S*run1/model.safetensors:'):
        average_states(written(tmp_path, states))


MEASURE = """
import sys, threading
from guie.soups import average_states

def anonymous():
    lines = open('/proc/self/status')
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('RssAnon'))

def watch():
    while not done.wait(.001):
        peaks.append(anonymous())

*paths, small = sys.argv[1:]
average_states([small])  # whatever the libraries allocate once is there before
peaks, done, watcher = [anonymous()], threading.Event(), threading.Thread(target=watch)
watcher.start()
soup = average_states(paths)
peaks.append(anonymous())
done.set()
print(max(peaks) - peaks[0], *(tensor.unique().tolist() for tensor in soup.values()))
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='only Linux tells anonymous memory')
def test_six_checkpoints_take_the_memory_of_little_more_than_one(tmp_path):
    size = 60 * 2**20
    for i in range(6):
        save = save_file if i % 2 else torch.save
        save({name: torch.full((1024, 1024, 5), float(i)) for name in 'abc'}, tmp_path / str(i))
    save_file({'a': torch.zeros(1)}, tmp_path / 'small')
    command = [sys.executable, '-c', MEASURE, *(tmp_path / str(i) for i in range(6)), tmp_path / 'small']
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    growth, *values = run.stdout.split()
    assert values == ['[2.5]'] * 3
    assert .9 * size < int(growth) <= 1.3 * size


def test_wise_ft_is_exact_at_its_ends_linear_between_and_keeps_the_head(tmp_path):
    tuned = random_state(1) | {'tower.zero': torch.tensor([-0., 1.])}
    zero_shot = {name: x + 1 / 3 for name, x in tuned.items() if name.startswith('tower')}
    zero_path, = written(tmp_path / 'zero', [zero_shot], spec=SPEC)
    tuned_path, = written(tmp_path / 'tuned', [tuned], spec=SPEC)
    for zero, fine in itertools.product((zero_shot, zero_path), (tuned, tuned_path)):
        ends = [interpolate_states(zero, fine, alpha) for alpha in (0, 1)]
        assert state_hash(ends[0]) == state_hash(tuned | zero_shot)
        assert state_hash(ends[1]) == state_hash(tuned)
        between = interpolate_states(zero, fine, .3)
        for name in zero_shot:
            exact = .7 * zero_shot[name].double() + .3 * tuned[name].double()
            assert torch.equal(between[name], exact.float())
        assert torch.equal(between['head.centers'], tuned['head.centers'])


def test_wise_ft_refuses_states_that_do_not_belong_together(tmp_path):
    tuned, tower = random_state(), {'tower.proj': torch.zeros(8, 4)}
    for alpha in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='alpha goes from 0'):
            interpolate_states(tower, tuned, alpha)
    with pytest.raises(ValueError, match='tensors missing: tower.more'):
        interpolate_states(tower | {'tower.more': torch.zeros(1)}, tuned, .5)
    with pytest.raises(ValueError, match='tensors missing: proj.*tower'):
        interpolate_states({'proj': torch.zeros(8, 4)}, tuned, .5)
    with pytest.raises(ValueError, match='shapes: tower.proj'):
        interpolate_states({'tower.proj': torch.zeros(8, 5)}, tuned, .5)
    first, = written(tmp_path / 'a', [tower], spec=SPEC)
    second, = written(tmp_path / 'b', [tuned], spec=SPEC | {'activation': 'quick_gelu'})
    with pytest.raises(ValueError, match='settings: activation quick_gelu against gelu'):
        interpolate_states(first, second, .5)


def closeness(target):
    """A score whose best state is `target`."""
    return lambda state: -sum((state[name] - target[name]).pow(2).sum().item() for name in target)


def test_greedy_soup_keeps_what_helps_rejects_what_hurts_and_returns_the_kept_average(tmp_path, capsys):
    values = [3., 1., -1.2, 40., -1.]  # the best is 0: order by score 1, -1, -1.2, 3, 40
    paths = written(tmp_path, [{'tower.a': torch.full((4,), value)} for value in values])
    soup, history = greedy_soup(paths, closeness({'tower.a': torch.zeros(4)}))
    assert list(history.columns) == ['path', 'alone', 'with_it', 'kept']
    assert history.path.tolist() == [str(paths[i]) for i in (1, 4, 2, 0, 3)]
    assert history.kept.tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(history.alone, [-4 * values[i]**2 for i in (1, 4, 2, 0, 3)], rtol=1e-6)
    np.testing.assert_allclose(history.with_it, [-4., 0, -4 * .4**2, -4., -4 * (40 / 3)**2], rtol=1e-6)
    assert_same(soup, average_states([paths[1], paths[4]]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(',')[0] for line in lines] == [
        'kept: run1', 'kept: run4', 'left out: run2', 'left out: run0', 'left out: run3']


def test_greedy_soup_keeps_ties_and_falls_within_the_tolerance(tmp_path):
    paths = written(tmp_path, [{'tower.a': torch.full((1,), value)} for value in (0., 1., 0.)])
    score = closeness({'tower.a': torch.zeros(1)})
    _, history = greedy_soup(paths, score)
    assert history.kept.tolist() == [True, True, False]
    _, history = greedy_soup(paths, score, tolerance=.2)
    assert history.kept.tolist() == [True, True, True]


def test_greedy_soup_stops_early_on_mismatch_and_on_a_score_of_nan(tmp_path):
    paths = written(tmp_path, [{'tower.a': torch.zeros(1)}, {'tower.a': torch.zeros(2)}])
    with pytest.raises(ValueError, match='shapes: tower.a'):
        greedy_soup(paths, lambda state: pytest.fail('scored before the files were compared'))
    with pytest.raises(ValueError, match=f'score of {paths[0]} is NaN'):
        greedy_soup(paths[:1], lambda state: float('nan'))


def test_task_vector_cosines_equal_numpy_on_the_tower_alone(tmp_path):
    counter = 'tower.bn.num_batches_tracked'
    base = {name: x for name, x in random_state(9).items() if name.startswith('tower')} | {counter: torch.tensor(3)}
    states = [random_state(seed) | {counter: torch.tensor(10 * seed)} for seed in range(3)]
    states.append({name: base.get(name, x) for name, x in states[0].items()})  # as it was before training
    table = task_vector_cosines(written(tmp_path, states), base)
    floats = [name for name in base if name != counter]
    origin, *towers = [np.concatenate([state[name].double().numpy().ravel() for name in floats])
                       for state in (base, *states)]
    changes = [tower - origin for tower in towers]
    assert table.index.tolist() == table.columns.tolist() == ['run0', 'run1', 'run2', 'run3']
    for i, j in itertools.product(range(3), range(3)):
        expected = changes[i] @ changes[j] / np.sqrt((changes[i] @ changes[i]) * (changes[j] @ changes[j]))
        assert table.iloc[i, j] == pytest.approx(expected, abs=1e-12)
    assert table.iloc[3].isna().all()
    with pytest.raises(ValueError, match="missing: proj.*'tower.' before"):
        task_vector_cosines([tmp_path / 'run0/model.safetensors'], {'proj': torch.zeros(8, 4)})


def test_the_line_between_two_ingredients_shows_a_barrier_and_begins_at_the_first(tmp_path):
    paths = written(tmp_path, [{'tower.a': torch.tensor([value])} for value in (0., 1.)])
    values = interpolation_scores(*paths, lambda state: state['tower.a'].item(), points=3)
    np.testing.assert_array_equal(values, [[0, 0], [.5, .5], [1, 1]])
    table = interpolation_scores(*paths, lambda state: abs(state['tower.a'].item() - .5))
    assert table.columns.tolist() == ['alpha', 'score']
    np.testing.assert_array_equal(table, [[0, .5], [.25, .25], [.5, 0], [.75, .25], [1, .5]])
    with pytest.raises(ValueError, match='cannot be averaged with .* shapes: tower.a'):
        interpolation_scores(paths[0], *written(tmp_path / 'other', [{'tower.a': torch.zeros(2)}]), len)


def test_soup_metadata_names_its_ingredients_and_survives_saving(tmp_path):
    paths = written(tmp_path, [random_state(0), random_state(1)], spec=SPEC)
    (paths[0].parent / 'scores.csv').write_text('stage,dim,mp5\nuntrained,64,.3\ningredient,512,.6\ningredient,64,.5\n')
    metadata = soup_metadata(paths, 'wise-ft', alpha=.6, note='text')
    soup = tmp_path / 'soup' / 'model.safetensors'
    save_state(average_states(paths), soup, metadata)
    kept = open_checkpoint(soup).metadata
    assert kept['method'] == 'wise-ft' and kept['alpha'] == '0.6' and kept['note'] == 'text'
    assert json.loads(kept['spec']) == SPEC
    assert json.loads(kept['ingredients']) == [
        {'run': f'run{i}', 'sha256': file_hash(paths[i]), 'score': score} for i, score in ((0, .5), (1, None))]
    torch.save(as_authors(random_state()), tmp_path / 'H_0.688')
    theirs = soup_metadata([tmp_path / 'H_0.688', open_checkpoint(paths[1])], 'uniform')
    assert [(each['run'], each['score']) for each in json.loads(theirs['ingredients'])] == [
        ('H_0.688', None), ('run1', None)]
    assert json.loads(theirs['spec']) == SPEC
    assert 'spec' not in soup_metadata([tmp_path / 'H_0.688'], 'uniform')


def test_a_saved_soup_is_a_run_that_reloads_evaluates_and_exports(train, tmp_path):
    runs = [tmp_path / 'none', tmp_path / 'flip']
    for seed, run in enumerate(runs):
        model = new_model()
        with torch.no_grad():
            model.tower.proj.add_(torch.randn(model.tower.proj.shape, generator=torch.Generator().manual_seed(seed)) / 50)
        save_run(run, model, CONFIG)
        CONFIG.save(run / 'config.json')
        (run / 'scores.csv').write_text(f'stage,model,dim,mp5,seconds\ningredient,{run.name},64,.{seed + 3},1\n')
    save_soup(average_states(runs), tmp_path / 'soup', runs, 'uniform', selection=.5)
    metadata = open_checkpoint(tmp_path / 'soup').metadata
    assert metadata['method'] == 'uniform' and metadata['selection'] == '0.5'
    assert json.loads(metadata['ingredients']) == [
        {'run': run.name, 'sha256': file_hash(run / 'model.safetensors'), 'score': score}
        for run, score in zip(runs, (.3, .4), strict=True)]
    assert Config.load(tmp_path / 'soup/config.json') == CONFIG
    soup = load_run(tmp_path / 'soup')
    mean = sum(load_run(run).tower.proj for run in runs) / 2
    torch.testing.assert_close(soup.tower.proj, mean)
    vectors = embed(soup, train)
    assert mean_precision_at_5(vectors, train['label'], vectors, train['label'], exclude_self=True) > .2
    export_submission(soup, tmp_path / 'submission.zip')
    replay = evaluate_submission(tmp_path / 'submission.zip', train, train)
    assert replay['dim'] == 32 and np.abs(replay['query'] - vectors).max() < .05  # resized in floats there, in bytes here
    table = list_runs(tmp_path).set_index('run')
    assert table['method'].to_dict() == {'none': 'training', 'flip': 'training', 'soup': 'uniform'}
    assert table['mp5'].tolist()[:2] == [.4, .3] and table.loc['soup', 'hash'] == state_hash(soup.state_dict())


def test_the_wise_ft_curve_runs_from_the_pretrained_tower_under_the_head_to_the_soup(train, tmp_path, monkeypatch):
    model = new_model().eval()
    with torch.no_grad():
        for parameter in model.tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 20)
    save_run(tmp_path / 'soup', model, CONFIG)
    base, half = base_state(tmp_path / 'soup'), train.groupby('label').cumcount() < 3
    pretrained = new_model().tower.state_dict()
    assert_same(dict(sorted(base.items())), {f'tower.{name}': pretrained[name] for name in sorted(pretrained)})
    splits = {'train': train, 'query': train[half], 'index': train[~half]}
    splits |= {'selection_query': train[~half], 'selection_index': train[half]}
    embedder = StateEmbedder(tmp_path / 'soup', splits)
    splits['seen'] = train.groupby('label').head(4)
    assert embedder.splits['seen'].equals(splits['seen'])
    curve = sweep_alpha(base, tmp_path / 'soup', [0, 1], embedder)
    for row, tower in zip(curve.itertuples(index=False), (pretrained, model.tower.state_dict()), strict=True):
        end = new_model()
        end.tower.load_state_dict(tower)
        vectors = {name: embed(end, frame) for name, frame in splits.items()}
        scores = [mean_precision_at_5(vectors[query], splits[query]['label'],
                                      vectors[index], splits[index]['label'], query == index)
                  for query, index in (('selection_query', 'selection_index'), ('seen', 'seen'), ('query', 'index'))]
        precisions = precision_at_5(vectors['query'], splits['query']['label'], vectors['index'], splits['index']['label'])
        assert list(row[1:]) == pytest.approx([*scores, *intervals([precisions], splits['query']['label'])[0]], abs=1e-6)
        assert row.low < scores[2] < row.high
    assert curve.columns.tolist() == ['alpha', 'selection', 'seen', 'never seen', 'low', 'high']
    assert curve['alpha'].tolist() == [0, 1] and (curve.iloc[0, 1:] != curve.iloc[1, 1:]).any()
    monkeypatch.setattr(embedding, 'loader', lambda *_, **__: pytest.fail('images were embedded again'))
    assert embedder.score(model.state_dict()) == curve['selection'].iloc[1] > 0
    with pytest.raises(pytest.fail.Exception):
        embedder.score(new_model(CONFIG.override(head_seed=9)).state_dict())


def runs_of(folder, seeds):
    """Folders of runs with heads of their own."""
    for seed in seeds:
        config = CONFIG.override(head_seed=seed)
        save_run(folder / f'tiny_{seed}', new_model(config), config)
    return [folder / f'tiny_{seed}' for seed in seeds]


def test_states_of_one_tower_are_embedded_once_each_and_kept_where_embed_finds_them(train, tmp_path, monkeypatch):
    runs, splits = runs_of(tmp_path, (3, 4)), {'train': train, 'pca': train, 'query': train[::3]}
    embedder, passes = StateEmbedder(runs[0], splits), []
    embedder.model.register_forward_hook(lambda *arguments: passes.append(1))
    states = [open_checkpoint(run) for run in runs]
    assert list(embedder.vectors(states[0], ['query'])) == ['query'] and not (runs[0] / 'vectors').exists()
    vectors = [embedder.vectors(state, ('pca', 'query'), run / 'vectors') for state, run in zip(states, runs)]
    assert len(passes) == 2 * (2 + 1)  # batches of 64 from 72 and 24 images
    embedder.vectors(dict(states[0]), ('pca', 'query'))  # an equal state
    assert len(passes) == 2 * (2 + 1)
    expected = [{part: embed(load_run(run), splits[part]) for part in ('pca', 'query')} for run in runs]
    monkeypatch.setattr(embedding, 'loader', lambda *_, **__: pytest.fail('images were embedded again'))
    for run, of_run, right in zip(runs, vectors, expected):
        for part, kept in embed_all(load_run(run), splits, run / 'vectors', ('pca', 'query')).items():
            assert np.array_equal(kept, of_run[part]) and np.array_equal(kept, right[part])
    assert not np.allclose(vectors[0]['pca'], vectors[1]['pca'], atol=1e-3)


def test_a_soup_of_attached_runs_takes_their_vectors_and_leaves_their_folders_as_they_were(
        train, tmp_path, monkeypatch):
    splits = {'train': train, 'query': train[::3], 'selection_query': train[::2], 'selection_index': train[1::2]}
    for run in runs_of(tmp_path / 'input/notebook/runs', (5, 6)):
        embed_all(load_run(run), splits, run / 'vectors', ['query'])  # as the training notebook does
    before = contents(tmp_path / 'input')
    found = find_ingredients(tmp_path / 'runs', ['tiny'], search=(tmp_path / 'input',))['tiny']
    embedder = StateEmbedder(found[0], splits)
    soup, history = greedy_soup(found, embedder.score)
    save_soup(soup, tmp_path / 'runs/greedy', history['path'][history['kept']], 'greedy')
    save_soup(average_states(found), tmp_path / 'runs/soup', found, 'uniform')
    assert list_runs([*found, tmp_path / 'runs/soup'])['run'].tolist() == ['tiny_5', 'tiny_6', 'soup']
    with monkeypatch.context() as patch:
        patch.setattr(embedding, 'loader', lambda *_, **__: pytest.fail('images were embedded again'))
        vectors = [embedder.vectors(run, ['query'], tmp_path / 'runs' / run.name / 'vectors')['query'] for run in found]
    assert all(np.array_equal(each, embed(load_run(run), splits['query'])) for each, run in zip(vectors, found))
    embedder.vectors(found[0], ['train'])  # which is not there
    assert contents(tmp_path / 'input') == before
    assert {path.partition('/')[0] for path in contents(tmp_path / 'runs')} == {'greedy', 'soup'}


def test_runs_with_overlapping_patches_are_compared_with_their_pretrained_tower(train, tmp_path):
    config = CONFIG.override(overlap=.5)
    for seed in (5, 6):
        model = new_model(config)
        with torch.no_grad():
            model.tower.proj += torch.randn(model.tower.proj.shape, generator=torch.Generator().manual_seed(seed))
        save_run(tmp_path / f'run{seed}', model, config)
    runs = [tmp_path / 'run5', tmp_path / 'run6']
    base = base_state(runs[0])
    assert abs(task_vector_cosines(runs, base).to_numpy()[0, 1]) < .1
    assert base['tower.positional_embedding'].shape[0] == 3 * 3 + 1


# Ingredients and their data

@pytest.fixture
def two_sets(tmp_path):
    """{name: folder} of two sets, and runs(…) that makes ingredients of what load_data draws from them."""
    sets = {name: tmp_path / name for name in ('pets', 'cars')}
    for number, folder in enumerate(sets.values()):
        write_files(folder, [f'{label}/{image}.jpg' for label in 'ab' for image in range(8 + number)])

    def runs(*names, **changes):
        config = Config(**changes)
        told = {name: json.dumps(describe(load_data(sets[name], config=config)['train'])) for name in sets}
        return [Checkpoint({'w': torch.ones(2)}, {'config': json.dumps(asdict(config))} | (
            {'data': told[name]} if name in told else {}), tmp_path / f'{number}-{name}/model.safetensors')
            for number, name in enumerate(names)]

    return sets, runs


@pytest.mark.parametrize('names, kept', [
    (['pets'], ['pets']), (['cars', 'pets', 'pets'], ['pets', 'pets']), (['pets', 'cars'], ['pets']),
    (['bare', 'pets', 'cars'], ['bare', 'pets'])])  # the authors' files do not say
def test_ingredients_of_other_images_are_named_and_left_out(two_sets, capsys, names, kept):
    sets, runs = two_sets
    ingredients, splits = data_of({'h': runs(*names), 'l': runs('cars', 'pets')[:1]}, {'train': sets['pets']})
    assert [run.name.partition('-')[2] for run in ingredients['h']] == kept and list(ingredients) == ['h']
    assert set(splits['train']['domain']) == {'pets'} and len(splits['train']) == 12
    assert '0-cars was trained on other images (14 images of 2 classes (2 cars), hash ' in capsys.readouterr().out


def test_the_data_are_drawn_with_the_settings_of_the_run_that_they_belong_to(two_sets):
    sets, runs = two_sets
    ingredients, splits = data_of({'h': runs('cars') + runs('pets', max_images=5)}, {'train': sets['pets']})
    assert len(ingredients['h']) == 1 and len(splits['train']) == 10


def test_ingredients_that_are_all_of_other_images_are_one_sentence(two_sets):
    sets, runs = two_sets
    with pytest.raises(ValueError, match='0-cars were not trained on the images of .*pets .12 images.* give') as error:
        data_of({'h': runs('cars')}, {'train': sets['pets']})
    assert is_one_sentence(error)


def test_a_pretrained_tower_that_is_not_here_is_named_and_left_out(tmp_path, train, capsys):
    run, = runs_of(tmp_path, [3])
    here, absent = (StateEmbedder(checkpoint, {'train': train}) for checkpoint in (run, open_checkpoint(run)))
    assert here.base['tower.proj'].shape == here.model.tower.proj.shape
    absent.run.metadata['spec'] = absent.run.metadata['spec'].replace('media/miniature', 'media/nowhere')
    assert absent.base is None
    said = capsys.readouterr().out
    assert f'{absent.run.name}: its pretrained weights are not here' in said and 'nowhere' in said


def test_vectors_that_a_soup_keeps_name_the_images_that_could_not_be_read(train, tmp_path, capsys):
    (tmp_path / 'broken.jpg').write_bytes(b'')
    splits = {'train': train, 'query': train.head(3).assign(path=[str(tmp_path / 'broken.jpg'), *train['path'][1:3]])}
    run, = runs_of(tmp_path, (3,))
    embedder = StateEmbedder(run, splits)
    embedder.vectors(run, ['query'])
    assert 'broken.jpg; they count as a black square' in capsys.readouterr().out
    black = embedder.vectors(run, ['query'], tmp_path / 'kept')['query']
    shutil.copyfile(train['path'][0], tmp_path / 'broken.jpg')
    mended = embed(load_run(run, dim=None), splits['query'], cache=tmp_path / 'kept/query.npz')
    assert not np.allclose(mended[0], black[0], atol=1e-3) and np.array_equal(mended[1:], black[1:])


def test_ingredients_with_other_initial_heads_are_named(tmp_path, capsys):
    average_states(runs_of(tmp_path, (3, 4)))
    assert 'began with different heads (head_seed 3, 4): their average is hardly a model.' in capsys.readouterr().out
    average_states([tmp_path / 'tiny_3', tmp_path / 'tiny_3'])
    assert 'different heads' not in capsys.readouterr().out
