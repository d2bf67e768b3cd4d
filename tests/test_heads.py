"""Heads: trained on cached vectors they find what plain vectors miss; as runs they are like any other."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from runs import CONFIG, contents, is_one_sentence, new_model

from guie import heads, towers
from guie.checkpoints import load_run, open_checkpoint, save_projection, save_run
from guie.embedding import embed, embed_all
from guie.errors import Diverged, InputError
from guie.heads import Mirrored, classes_of, fit_head, head_gains, head_projection, projected, train_head
from guie.images import ImageDataset
from guie.model import Embedder, SubcenterHead
from guie.projection import concatenate, fit_pca, l2_normalise
from guie.recipes import follow_recipe, train
from guie.results import save_ensemble, save_results
from guie.retrieval import mean_precision_at_5
from guie.scores import score_table
from guie.soups import average_states
from guie.splits import Splits
from guie.submission import evaluate_submission, export_submission

CACHED = follow_recipe(CONFIG.override(epochs=1), 'frozen-head').override(embedding_dim=16, effective_batch=16)


def clusters(classes, each, seed, noise=.8):
    """(unit vectors (n, 24), labels): four columns tell classes apart, twenty do not."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    told = rng.standard_normal((classes, 4))[labels] + .2 * rng.standard_normal((len(labels), 4))
    vectors = np.concatenate([told, noise * rng.standard_normal((len(labels), 20))], 1).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def score(head, vectors, labels):
    points = vectors if head is None else projected(head, vectors)
    return mean_precision_at_5(points, labels, points, labels, exclude_self=True)


@pytest.mark.parametrize('options', [{}, {'margins': (.05, .3), 'subcenters': 3}, {'norm': True}])
def test_a_head_finds_classes_that_it_has_never_seen(options):
    head = fit_head(*clusters(60, 20, 0), dim=16, lr=3e-3, epochs=10, batch_size=32, **options)
    unseen = clusters(30, 6, 1)
    assert score(head, *unseen) > score(None, *unseen) + .12
    assert not head.training and head.embedding.weight.device.type == 'cpu'


def test_the_loss_is_the_cross_entropy_of_scaled_cosines():
    vectors, labels = clusters(6, 8, 0)
    losses = []
    fit_head(vectors, labels, dim=8, scale=9., lr=0., class_lr=0., dropout=0., batch_size=16, epochs=1, head_seed=3,
             report=lambda *row: losses.append(row))
    start = SubcenterHead(24, 6, dim=8, subcenters=1, seed=3)
    with torch.no_grad():
        embedded = F.normalize(torch.from_numpy(vectors) @ start.embedding.weight.T)
        expected = F.cross_entropy(9 * embedded @ F.normalize(start.centers).T, torch.from_numpy(labels))
    (step, loss, score_), = losses
    assert step == 3 and loss == pytest.approx(float(expected), abs=1e-5) and score_ is None


def test_the_seed_decides_and_a_memory_map_is_as_good_as_an_array(tmp_path):
    vectors, labels = clusters(8, 10, 0)
    np.save(tmp_path / 'vectors.npy', vectors)
    mapped = np.load(tmp_path / 'vectors.npy', mmap_mode='r')
    first, again, other = (fit_head(each, labels, dim=8, epochs=2, batch_size=16, seed=seed).embedding.weight
                           for each, seed in ((vectors, 5), (mapped, 5), (vectors, 6)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_labels_of_any_kind_and_classes_of_one_image_train():
    vectors, labels = clusters(5, 4, 0)
    names = [f'class {label}' for label in labels]
    names[0] = 'alone'
    assert len(fit_head(vectors, names, dim=4, epochs=1, batch_size=8).centers) == 6


@pytest.mark.parametrize('labels', [
    np.repeat([3, 1, 2, 30], 5), np.repeat([2.5, -1, 10, 0], 5), ['b', 'a', 'ü', 'B'] * 5, [True, False] * 10,
    pd.Series(['b', 'a', 'ü', 'B'] * 5, index=range(7, 27)), pd.Categorical(['b', 'a', 'c', 'B'] * 5, categories=[*'cbaB']),
    pd.Series(pd.to_datetime(['2020', '2019', '2021', '2018'] * 5))])
def test_classes_are_numbered_as_their_labels_sort(labels):
    assert classes_of(labels).tolist() == np.unique(np.asarray(labels), return_inverse=True)[1].tolist()


@pytest.mark.parametrize('names', [
    [(1, 'a'), (0, 'b'), (1, 'b'), (0, 'a')], [1, '1', 2, ('1', 2)], pd.Series(['b', 'a', 1, 2.5], dtype=object)])
def test_equal_labels_are_one_class_whatever_they_are(names):
    vectors, labels = clusters(4, 10, 0)
    named = [list(names)[label] for label in labels]
    head = fit_head(vectors, named, dim=4, epochs=2, batch_size=8)
    codes = {label: classes_of(named)[10 * place] for place, label in enumerate(names)}
    assert sorted(codes.values()) == [0, 1, 2, 3] and len(head.centers) == 4
    numbers = [codes[label] for label in named]
    assert torch.equal(head.centers, fit_head(vectors, numbers, dim=4, epochs=2, batch_size=8).centers)
    splits = {name: pd.DataFrame({'label': pd.Series(named, dtype=object)}) for name in ('pca', 'query', 'index')}
    numbered = {name: pd.DataFrame({'label': labels}) for name in splits}
    gains = [head_gains(dict.fromkeys(splits, vectors), each, [2, 4], 4, epochs=1) for each in (splits, numbered)]
    assert gains[0]['images'].tolist() == [0, 20, 40] and gains[0]['mp5'][0] == gains[1]['mp5'][0]


@pytest.mark.parametrize('missing', [None, float('nan'), pd.NA, pd.NaT])
def test_missing_labels_are_one_sentence_that_names_the_first(missing):
    vectors, labels = clusters(4, 10, 0)
    named = [f'class {label}' for label in labels]
    named[7] = named[9] = missing
    splits = dict.fromkeys(('pca', 'query', 'index'), pd.DataFrame({'label': named}))
    for fit in (lambda: fit_head(vectors, named), lambda: fit_head(vectors, pd.Series(named, dtype=object)),
                lambda: head_gains(dict.fromkeys(splits, vectors), splits, [1])):
        with pytest.raises(InputError, match='^2 of 40 labels are missing, first that of row 7: leave these rows') as error:
            fit()
        assert is_one_sentence(error)


@pytest.mark.parametrize('size, norm, least', [(0, False, 1), (-3, False, 1), (1, True, 2)])
def test_a_batch_too_small_to_train_on_is_one_sentence(size, norm, least):
    with pytest.raises(InputError, match=f'^batch_size is {size}: give at least {least}') as error:
        fit_head(*clusters(4, 10, 0), batch_size=size, norm=norm)
    assert is_one_sentence(error)


@pytest.mark.parametrize('norm', [False, True])
def test_vectors_of_any_precision_and_none_at_all_go_through_a_head(norm):
    vectors, labels = clusters(4, 10, 0)
    head = fit_head(vectors, labels, dim=4, epochs=1, batch_size=8, norm=norm)
    expected = projected(head, vectors)
    assert expected.shape == (40, 4) and np.array_equal(projected(head, vectors.astype(np.float64)), expected)
    half = vectors.astype(np.float16)
    assert np.array_equal(projected(head, half), projected(head, half.astype(np.float32)))
    assert projected(head, vectors[:0]).shape == (0, 4) and projected(head, half[:0]).dtype == np.float32


def test_the_head_of_the_best_epoch_is_returned():
    vectors, labels = clusters(8, 10, 0)
    seen, scores = [], iter([.2, .9, .5, .4])

    def validate(head):
        assert not head.training
        seen.append(head.embedding.weight.detach().clone())
        return next(scores)

    head = fit_head(vectors, labels, dim=8, epochs=4, batch_size=16, validate=validate)
    assert torch.equal(head.embedding.weight, seen[1]) and not torch.equal(seen[1], seen[3])


def test_a_validation_without_a_score_is_one_sentence_and_no_epochs_leave_the_first_weights():
    with pytest.raises(InputError, match='validation of the head is NaN') as error:
        fit_head(*clusters(4, 10, 0), dim=4, epochs=1, validate=lambda head: np.nan)
    assert is_one_sentence(error)
    start = SubcenterHead(24, 4, dim=4, subcenters=1, seed=3)
    assert torch.equal(fit_head(*clusters(4, 10, 0), dim=4, epochs=0, head_seed=3).embedding.weight, start.embedding.weight)


@pytest.mark.parametrize('spoil, words', [
    (lambda vectors, labels: (vectors[:-1], labels), 'vectors have 40 labels'),
    (lambda vectors, labels: (vectors, labels * 0), 'at least 2'),
    (lambda vectors, labels: (vectors * np.where(np.arange(40) == 7, np.nan, 1)[:, None], labels), 'Vector 7 holds NaN'),
    (lambda vectors, labels: (vectors[0], labels), 'give one label a row')])
def test_vectors_that_cannot_train_are_one_sentence(spoil, words):
    with pytest.raises(ValueError, match=words) as error:
        fit_head(*spoil(*clusters(4, 10, 0)))
    assert is_one_sentence(error)


def test_a_loss_that_is_not_finite_is_one_sentence():
    with pytest.raises(Diverged, match='lower its learning rates') as error:
        fit_head(*clusters(4, 10, 0), dim=4, lr=1e30, epochs=3, batch_size=8)
    assert is_one_sentence(error)


def test_gains_are_those_of_heads_trained_on_the_first_classes_of_one_order():
    parts = {'pca': clusters(40, 10, 0), 'query': clusters(20, 2, 1), 'index': clusters(20, 3, 1)}
    vectors = {name: part[0] for name, part in parts.items()}
    splits = {name: pd.DataFrame({'label': part[1]}) for name, part in parts.items()}
    options = {'lr': 3e-3, 'batch_size': 32, 'epochs': 10}
    table = head_gains(vectors, splits, [0, 1, 10, 40, 400], 8, **options)
    assert table['classes'].tolist() == [0, 10, 40] and table['images'].tolist() == [0, 100, 400]
    assert table['mp5'].iloc[0] == pytest.approx(score_table('', '', vectors, splits, dims=[8])['mp5'][0])
    head = fit_head(vectors['pca'], parts['pca'][1], **options)
    points = {name: projected(head, part) for name, part in vectors.items()}
    assert table['mp5'].iloc[2] == pytest.approx(score_table('', '', points, splits, dims=[8])['mp5'][0])
    assert table['mp5'].iloc[2] > table['mp5'].iloc[0] and (table['low'] < table['mp5']).all()


# Runs

@pytest.fixture
def splits(train):
    return Splits(train=train, selection_query=train[::6], selection_index=train.drop(train.index[::6]))


def test_a_run_of_a_frozen_tower_is_saved_like_any_other(splits, tmp_path, monkeypatch):
    model = train(CACHED, splits, tmp_path / 'run')
    bare = new_model()
    assert all(torch.equal(tensor, bare.tower.state_dict()[name]) for name, tensor in model.tower.state_dict().items())
    log = pd.read_csv(tmp_path / 'run/log.csv')
    assert log['step'].tolist() == [4 * epoch for epoch in range(1, 21)] and log['loss'].iloc[-1] < log['loss'].iloc[0]
    loaded = load_run(tmp_path / 'run', dim=None)
    assert len(loaded.head.centers) == 0 and open_checkpoint(tmp_path / 'run').config == CACHED
    vectors = embed(loaded, splits['train'])
    expected = projected(loaded.head, embed(Embedder(bare.tower), splits['train']))
    assert np.allclose(vectors, expected, atol=1e-6)
    labels = splits['train']['label']
    assert mean_precision_at_5(vectors, labels, vectors, labels, exclude_self=True) > .3
    export_submission(loaded, tmp_path / 'submission.zip')
    assert evaluate_submission(tmp_path / 'submission.zip', splits['train'][:6], splits['train'])['dim'] == 16
    monkeypatch.setattr('guie.embedding.loader', lambda *_, **__: pytest.fail('the tower sees each image once'))
    again = train(CACHED, splits, tmp_path / 'run')
    assert torch.equal(again.head.embedding.weight, loaded.head.embedding.weight)


def test_a_head_does_not_replace_a_run_of_another_configuration_or_other_images(splits, tmp_path):
    tuned = CONFIG.override(epochs=1)
    train(tuned, splits, tmp_path / 'tuned')
    train_head(CACHED, splits, tmp_path / 'head')
    other = Splits({**splits, 'train': splits['train'][:-1]})
    for run, config, data, words in (
            ('tuned', CACHED, splits, 'another configuration .*trains: all, now cached head'),
            ('head', CACHED.override(seed=6), splits, 'another configuration .seed: 5, now 6'),
            ('head', tuned, splits, 'another configuration .*trains: cached head, now all'),
            ('head', CACHED, other, 'on other images .hash')):
        before = contents(tmp_path / run)
        for begin in (train, *[train_head] * (config.trains == 'cached head')):
            with pytest.raises(InputError, match=f'{tmp_path}/{run} holds a run .*{words}.*: give this run') as error:
                begin(config, data, tmp_path / run)
            assert is_one_sentence(error) and contents(tmp_path / run) == before


def test_heads_of_one_tower_make_a_soup(splits, tmp_path):
    runs = [tmp_path / name for name in ('a', 'b')]
    weights = [train_head(CACHED.override(seed=seed), splits, run).head.embedding.weight for seed, run in enumerate(runs)]
    soup = average_states(runs)
    assert torch.allclose(soup['head.embedding.weight'], sum(weights) / 2) and not torch.equal(*weights)


def test_with_flip_the_head_sees_mirrored_images_too(splits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(heads, 'fit_head', lambda vectors, labels, **options: seen.append((vectors, labels)) or
                        SubcenterHead(vectors.shape[1], 2, dim=16, subcenters=1))
    train_head(CACHED.override(augmentation='flip'), splits, tmp_path / 'run')
    (vectors, labels), = seen
    tower, frame = Embedder(new_model().tower).eval(), splits['train']
    assert len(vectors) == 2 * len(frame) and labels.tolist() == 2 * frame['label'].tolist()
    images = torch.stack([ImageDataset(frame, 32)[i]['image'] for i in range(4)])
    with torch.inference_mode():
        assert np.allclose(vectors[:4], tower(images), atol=1e-6)
        assert np.allclose(vectors[len(frame):][:4], tower(images.flip(3)), atol=1e-6)
        assert torch.equal(Mirrored(tower)(images), tower(images.flip(3)))


def test_selection_objects_choose_the_epoch(splits, tmp_path):
    train_head(CACHED.override(validate_every=1), splits, tmp_path / 'run')
    log = pd.read_csv(tmp_path / 'run/log.csv')
    model = load_run(tmp_path / 'run', dim=None)
    query, index = (embed(model, splits[f'selection_{part}']) for part in ('query', 'index'))
    found = mean_precision_at_5(query, splits['selection_query']['label'], index, splits['selection_index']['label'])
    assert found == pytest.approx(log['selection'].max(), abs=1e-6)


def test_a_next_stage_trains_on_with_the_classes(splits, tmp_path):
    stages = ({'trains': 'cached head', 'epochs': 2}, {'trains': 'all', 'epochs': 1})
    model = train(CONFIG.override(stages=stages, embedding_dim=16, class_lr=1e-2), splits, tmp_path / 'run')
    first = open_checkpoint(tmp_path / 'run/run-stage-1/stage.safetensors')
    assert len(first['head.centers']) == len(model.head.centers) == 36
    assert not torch.equal(first['tower.proj'], model.tower.proj)


def test_a_last_stage_of_no_epochs_only_changes_the_side_to_search_at(splits, tmp_path):
    stages = ({'trains': 'cached head', 'epochs': 2}, {'epochs': 0, 'image_size': 48})
    model = train(CONFIG.override(stages=stages, embedding_dim=16), splits, tmp_path / 'run')
    first = open_checkpoint(tmp_path / 'run/run-stage-1/stage.safetensors')
    assert torch.equal(first['head.embedding.weight'], model.head.embedding.weight)
    assert torch.equal(first['tower.proj'], model.tower.proj)
    assert model.spec.image_size == 48 and load_run(tmp_path / 'run', dim=None).spec.image_size == 48


def test_a_head_is_not_trained_on_images_that_cannot_be_read(splits, tmp_path, monkeypatch, capsys):
    frame, seen = splits['train'].copy(), []
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    frame.loc[frame.index[3], 'path'] = str(tmp_path / 'broken.jpg')
    monkeypatch.setattr(heads, 'fit_head', lambda vectors, labels, **options: seen.append((vectors, labels)) or
                        SubcenterHead(vectors.shape[1], 2, dim=16, subcenters=1))
    for augmentation in ('flip', 'none'):  # the second one finds the vectors in files
        train_head(CACHED.override(augmentation=augmentation), Splits(train=frame), tmp_path / 'run')
        assert f'1 images could not be read, first {tmp_path}/broken.jpg; the head is not' in capsys.readouterr().out
        (tmp_path / 'run/model.safetensors').unlink()  # another configuration does not replace it
    labels = frame['label'].drop(frame.index[3]).tolist()
    assert [len(vectors) for vectors, _ in seen] == [2 * len(labels), len(labels)]
    assert [told.tolist() for _, told in seen] == [2 * labels, labels]
    expected = embed(Embedder(new_model().tower), frame.drop(frame.index[3]))
    assert np.allclose(seen[1][0], expected, atol=1e-6) and np.allclose(seen[0][0][:len(labels)], expected, atol=1e-6)


def test_a_class_rate_of_nothing_leaves_the_classes_as_they_are(splits, tmp_path):
    model = train_head(CACHED.override(class_lr=0), splits, tmp_path / 'run', keep_classes=True)
    start = SubcenterHead(model.spec.width, 12, dim=16, subcenters=1, seed=CACHED.head_seed)
    assert torch.equal(model.head.centers, start.centers)
    assert not torch.equal(model.head.embedding.weight, start.embedding.weight)


# Joined towers

def test_a_head_and_the_pca_behind_it_fold_into_one_projection():
    vectors, labels = clusters(20, 10, 0)
    head = fit_head(vectors, labels, dim=16, lr=3e-3, epochs=5, batch_size=32)
    outputs = vectors @ head.embedding.weight.detach().numpy().T
    folded = head_projection(head, vectors, dim=8)
    assert np.allclose(folded(vectors), fit_pca(outputs, 8)(outputs), atol=1e-5)
    with pytest.raises(InputError, match='does not fold'):
        head_projection(fit_head(vectors, labels, dim=4, epochs=1, norm=True), vectors)


def test_a_head_on_the_joined_vectors_of_several_towers_is_a_run(splits, tmp_path):
    for name, side in (('small', 32), ('large', 48)):
        config = CONFIG.override(image_size=side)
        save_run(tmp_path / name, Embedder(towers.load_image_tower(config.model_name, config.pretrained, side)), config)
    members = [load_run(tmp_path / name, dim=None) for name in ('small', 'large')]
    parts = Splits(train=splits['train'], pca=splits['train'], query=splits['selection_query'],
                   index=splits['selection_index'])
    each = [embed_all(member, parts, names=('train', 'pca', 'query', 'index')) for member in members]
    vectors = {name: concatenate([one[name] for one in each]) for name in each[0]}
    head = fit_head(vectors['train'], parts['train']['label'], dim=16, epochs=20, batch_size=16, lr=3e-3)
    projection = head_projection(head, vectors['train'], dim=8)
    table = score_table('joined', 'both', vectors, parts, dims=[8], projection=projection)
    save_ensemble(tmp_path / 'joined', [tmp_path / 'small', tmp_path / 'large'], projection)
    save_results(tmp_path / 'joined', table, vectors, parts, projection)
    found = embed_all(load_run(tmp_path / 'joined', dim=8), parts, names=('query', 'index'))
    for name, points in found.items():
        assert np.allclose(points, l2_normalise(projection(vectors[name])), atol=1e-5)
    plain = score_table('joined', 'both', vectors, parts, dims=[8])['mp5'].iloc[0]
    assert table['mp5'].iloc[0] > plain
    export_submission(tmp_path / 'joined', tmp_path / 'submission.zip')
    assert evaluate_submission(tmp_path / 'submission.zip', splits['train'][:6], splits['train'])['dim'] == 8


def test_a_cached_head_that_is_trained_again_keeps_its_projection(train, tmp_path):
    config = CONFIG.override(trains='cached head', augmentation='none', epochs=1)
    splits = {'train': train}
    train_head(config, splits, tmp_path / 'run')
    save_projection(tmp_path / 'run', torch.nn.Linear(32, 8))
    kept = (tmp_path / 'run/model.safetensors').read_bytes()
    train_head(config, splits, tmp_path / 'run')
    assert (tmp_path / 'run/model.safetensors').read_bytes() == kept
