"""fit: what it writes, that it repeats itself, that it goes on where it was stopped."""
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import demo
import utilities

CONFIG = utilities.Config(**demo.settings({'image_size': 32})).override(
    batch_size=8, effective_batch=16, n_classes=100, epochs=3, warmup_steps=2, embedding_dim=32, save_minutes=1000)


def new_model(config=CONFIG, n_classes=12):
    tower = utilities.load_image_tower(config.model_name, config.pretrained, config.image_size)
    return utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, n_classes, dim=config.embedding_dim,
                                                             seed=config.head_seed))


def weights(run):
    return load_file(run / 'model.safetensors')


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first | second)


def train_in_a_child(config, train, run):
    child = multiprocessing.get_context('spawn').Process(target=_child, args=(config, train, run))
    child.start()
    return child


def _child(config, train, run):
    utilities.fit(config, new_model(config), train, run)


def test_a_run_writes_its_artifacts_and_loads_again(train, tmp_path):
    fitted = new_model()
    utilities.fit(CONFIG, fitted, train, tmp_path / 'run')
    made = {path.name for path in (tmp_path / 'run').iterdir()}
    assert made >= {'model.safetensors', 'config.json', 'log.csv', 'state'}
    log = pd.read_csv(tmp_path / 'run/log.csv')
    assert list(log.columns) == ['step', 'loss', 'lr', 'images/s'] and log['step'].tolist() == list(range(1, 13))
    assert log['loss'].iloc[-4:].mean() < log['loss'].iloc[:4].mean()
    assert utilities.Config.load(tmp_path / 'run/config.json') == CONFIG
    model = utilities.load_run(tmp_path / 'run')
    assert model.spec.image_size == 32 and model.spec.activation == 'gelu'
    vectors = utilities.embed(model, train)
    assert vectors.shape == (72, 32) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors, utilities.embed(fitted, train))  # so it scores the same too


def test_one_seed_gives_one_result_and_another_seed_another(train, tmp_path):
    for name, seed in (('a', 5), ('b', 5), ('c', 6)):
        torch.manual_seed(hash(name) % 1000)
        utilities.fit(CONFIG.override(seed=seed, epochs=1, augmentation='cutout'), new_model(), train, tmp_path / name)
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))
    assert not same(weights(tmp_path / 'a'), weights(tmp_path / 'c'))


def test_a_run_killed_at_any_step_goes_on_bit_for_bit(train, tmp_path, capsys):
    config = CONFIG.override(save_minutes=0, augmentation='cutout')
    utilities.fit(config, new_model(), train, tmp_path / 'whole')
    child = train_in_a_child(config, train, tmp_path / 'killed')
    step = random.randint(1, 8)  # another one every time
    wait_for(lambda: any((tmp_path / 'killed/state').glob(f'step-{step:08d}')), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / 'killed/model.safetensors').exists()
    utilities.fit(config, new_model(), train, tmp_path / 'killed')
    assert 'killed: going on from step-' in capsys.readouterr().out
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed')), f'killed after step {step}'
    assert pd.read_csv(tmp_path / 'killed/log.csv')['step'].tolist() == list(range(1, 13))


def wait_for(condition, child, seconds=120):
    until = time.time() + seconds
    while not condition():
        assert child.is_alive() and time.time() < until, 'the child ended before it could be killed'
        time.sleep(.005)


def test_a_truncated_newest_state_falls_back_to_the_one_before(train, tmp_path, capsys):
    config = CONFIG.override(save_minutes=0)
    utilities.fit(config, new_model(), train, tmp_path / 'run')
    expected = weights(tmp_path / 'run')
    newest = max((tmp_path / 'run/state').glob('step-*'))
    (newest / 'model.safetensors').write_bytes((newest / 'model.safetensors').read_bytes()[:100])
    utilities.fit(config, new_model(), train, tmp_path / 'run')
    assert 'trying the one before' in capsys.readouterr().out
    assert same(expected, weights(tmp_path / 'run'))


def test_a_time_budget_stops_cleanly_and_the_next_call_finishes(train, tmp_path):
    whole, parts = CONFIG.override(epochs=1), CONFIG.override(epochs=1, max_hours=1e-9)
    utilities.fit(whole, new_model(), train, tmp_path / 'whole')
    with pytest.raises(utilities.Stopped, match='run it again'):
        utilities.fit(parts, new_model(), train, tmp_path / 'parts')
    utilities.fit(whole, new_model(), train, tmp_path / 'parts')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


def test_another_configuration_does_not_go_on_in_the_same_folder(train, tmp_path):
    utilities.fit(CONFIG.override(epochs=1), new_model(), train, tmp_path / 'run')
    with pytest.raises(ValueError, match='another configuration .head_lr'):
        utilities.fit(CONFIG.override(epochs=1, head_lr=1.), new_model(), train, tmp_path / 'run')


def test_two_runs_cannot_write_into_one_folder(train, tmp_path):
    with utilities.run_lock(tmp_path / 'run'), pytest.raises(RuntimeError, match='Another run is writing'):
        utilities.fit(CONFIG, new_model(), train, tmp_path / 'run')


def test_the_best_state_on_selection_data_is_kept(train, tmp_path, monkeypatch):
    scores, modes, step = iter([.1, .9, .3, .2, .1, .1, .1]), [], utilities.optimiser_step

    def validate(model):
        modes.append(model.training)
        return next(scores)

    def watched(accelerator, model, *rest):
        modes.append(model.training)
        return step(accelerator, model, *rest)

    monkeypatch.setattr(utilities, 'optimiser_step', watched)
    utilities.fit(CONFIG.override(validate_every=2), new_model(), train, tmp_path / 'run', validate)
    assert modes == [True, True, False] * 6  # dropout in every step, in no score; the last step is scored once
    metadata = utilities.open_checkpoint(tmp_path / 'run/model.safetensors').metadata
    assert json.loads(metadata['step']) == 4 and json.loads(metadata['score']) == pytest.approx(.9)


def test_a_run_that_was_stopped_is_no_ingredient_yet_and_what_it_found_best_comes_along(train, tmp_path):
    scores, config = iter([.5, .9, .3, .1]), CONFIG.override(epochs=1, validate_every=1, max_hours=0)
    for _ in range(2):
        with pytest.raises(utilities.Stopped):
            utilities.fit(config, new_model(), train, tmp_path / 'h_run', lambda model: next(scores))
    with pytest.raises(FileNotFoundError, match='no finished run of h'):
        utilities.find_ingredients(tmp_path, ['h'])
    (tmp_path / 'input').mkdir()
    (tmp_path / 'h_run').rename(tmp_path / 'input/h_run')
    utilities.fit(config.override(max_hours=1.), new_model(), train, tmp_path / 'h_run', lambda model: next(scores),
                  search=(tmp_path / 'input',))
    assert utilities.find_ingredients(tmp_path, ['h']) == {'h': [tmp_path / 'h_run']}
    assert json.loads(utilities.open_checkpoint(tmp_path / 'h_run').metadata['step']) == 2
    assert not (tmp_path / 'h_run' / utilities.BEST).exists()


def test_other_photographs_do_not_go_on_in_the_same_folder(train, tmp_path):
    with pytest.raises(utilities.Stopped):
        utilities.fit(CONFIG.override(max_hours=0), new_model(), train, tmp_path / 'run')
    other = train.drop(train.index[0])
    with pytest.raises(ValueError, match='a run on other photographs .digest .*: give this run another name'):
        utilities.fit(CONFIG, new_model(), other, tmp_path / 'run')


def test_every_run_in_a_kernel_has_the_precision_of_its_own_configuration(train, tmp_path, monkeypatch):
    used, step = [], utilities.optimiser_step
    monkeypatch.setattr(utilities, 'optimiser_step', lambda accelerator, *rest: used.append(
        accelerator.mixed_precision) or step(accelerator, *rest))
    for precision in ('no', 'bf16'):
        utilities.fit(CONFIG.override(epochs=1, precision=precision), new_model(), train, tmp_path / precision)
    assert used == ['no'] * 4 + ['bf16'] * 4


def test_an_unreadable_photograph_is_replaced_counted_and_listed(train, tmp_path, capsys):
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'')
    frame = train.copy()
    frame.loc[0, 'path'] = str(broken)
    utilities.fit(CONFIG.override(epochs=1), new_model(), frame, tmp_path / 'run')
    assert (tmp_path / 'run/unreadable.txt').read_text().split() == [str(broken)]
    assert '1 photographs could not be read' in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_stops_the_run(train, tmp_path):
    model = new_model()
    with torch.no_grad():
        model.head.centers.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='lower head_lr'):
        utilities.fit(CONFIG, model, train, tmp_path / 'run')


def test_a_head_of_another_size_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ValueError, match='12 classes'):
        utilities.fit(CONFIG, new_model(n_classes=5), train, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_accumulated_batches_equal_one_large_batch(train, tmp_path):
    frame = train
    gradients = []
    for batch in (8, 16):
        model = new_model(CONFIG).eval()  # without dropout
        accelerator = utilities.Accelerator(cpu=True)
        config = CONFIG.override(batch_size=batch, clip_norm=1e9)  # a clipped gradient would hide its scale
        optimiser = torch.optim.SGD(model.parameters(), lr=.1)
        wrapped, optimiser = accelerator.prepare(model, optimiser)
        wrapped.eval()
        photos = utilities.Photos(frame, 32, targets=np.unique(frame['label'], return_inverse=True)[1])
        batches = list(utilities.loader(photos, batch, train=True))[:16 // batch]
        utilities.optimiser_step(accelerator, wrapped, optimiser, batches, torch.full((12,), .3), config)
        gradients.append(model.state_dict())
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_each_class_trains_with_the_margin_of_its_own_number_of_photographs(train, tmp_path, monkeypatch):
    labels = sorted(train['label'].unique())
    most = train['label'].map({labels[3]: 2, labels[7]: 4}).fillna(6)
    frame = train[train.groupby('label').cumcount() < most].sample(frac=1, random_state=0)
    seen, loss = [], utilities.arcface_loss
    monkeypatch.setattr(utilities, 'arcface_loss', lambda cosine, targets, margins, scale: (
        seen.append(margins.tolist()), loss(cosine, targets, margins, scale))[1])
    utilities.fit(CONFIG.override(epochs=1, margin_min=.1, margin_width=.3), new_model(), frame, tmp_path / 'run')
    expected = np.full(12, .1)
    expected[3], expected[7] = .4, .1 + .3 * (4 ** -.25 - 6 ** -.25) / (2 ** -.25 - 6 ** -.25)
    assert seen and all(margins == pytest.approx(expected, abs=1e-6) for margins in seen)


def test_the_optimiser_takes_the_learning_rate_and_decay_of_each_group():
    config, model = CONFIG.override(bands=((3, 1e-5), (6, 1e-4)), tower_decay=.02, head_decay=.003), new_model()
    _, optimiser, _ = utilities.prepare_training(utilities.Accelerator(cpu=True), model, config, steps=10)
    groups = utilities.param_groups(model, config)
    assert len(groups) == len(optimiser.param_groups) >= 5
    for group, taken in zip(groups, optimiser.param_groups):
        assert (taken['initial_lr'], taken['weight_decay']) == (group['lr'], group['weight_decay'])
        assert [id(parameter) for parameter in taken['params']] == [id(parameter) for parameter in group['params']]


@pytest.mark.parametrize('clip_norm', [.01, .1])
def test_a_large_gradient_is_clipped_to_the_norm_that_is_set(train, clip_norm):
    model = new_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = utilities.Accelerator(cpu=True)
    wrapped, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.))
    photos = utilities.Photos(train, 32, targets=np.unique(train['label'], return_inverse=True)[1])
    batches = list(utilities.loader(photos, 16, train=True))[:1]
    utilities.optimiser_step(accelerator, wrapped, optimiser, batches, torch.full((12,), .3),
                             CONFIG.override(clip_norm=clip_norm))
    changes = [(after - start).norm() for after, start in zip(model.parameters(), before)]
    assert torch.stack(changes).norm().item() == pytest.approx(clip_norm, rel=1e-3)


def test_vectors_are_kept_with_their_paths_and_used_again_only_for_the_same_weights(train, tmp_path):
    model = new_model().eval()
    first = utilities.embed(model, train, cache=tmp_path / 'v.npz')
    with np.load(tmp_path / 'v.npz') as kept:
        assert kept['paths'].tolist() == train['path'].tolist() and np.array_equal(kept['vectors'], first)
    np.savez(tmp_path / 'v.npz', **{**np.load(tmp_path / 'v.npz'), 'vectors': first * 0})
    assert not utilities.embed(model, train, cache=tmp_path / 'v.npz').any()
    backwards = utilities.embed(model, train.iloc[::-1], cache=tmp_path / 'v.npz')
    assert np.allclose(backwards, first[::-1], atol=1e-6)
    model.spec = dataclasses.replace(model.spec, activation='quick_gelu')  # as of a corrected tag
    assert utilities.embed(model, train.iloc[::-1], cache=tmp_path / 'v.npz').any()
    model.mean += 1
    other = utilities.embed(model, train.iloc[::-1], cache=tmp_path / 'v.npz')
    assert not np.allclose(other, backwards, atol=1e-6)
    with torch.no_grad():
        model.tower.proj.mul_(1.1)
        model.tower.proj[0, 0] += 1
    assert not np.allclose(utilities.embed(model, train.iloc[::-1], cache=tmp_path / 'v.npz'), other, atol=1e-6)


def test_an_unreadable_photograph_has_the_vector_of_a_black_square_and_is_named(train, tmp_path, capsys):
    (tmp_path / 'broken.jpg').write_bytes(b'not a photograph')
    Image.new('RGB', (40, 30)).save(tmp_path / 'black.png')
    model, frame = new_model().eval(), train.head(4).copy()
    frame.loc[2, 'path'] = str(tmp_path / 'broken.jpg')
    vectors = utilities.embed(model, frame)
    assert f'1 photographs could not be read, first {tmp_path}/broken.jpg' in capsys.readouterr().out
    frame.loc[2, 'path'] = str(tmp_path / 'black.png')
    assert np.allclose(vectors, utilities.embed(model, frame), atol=1e-6)
    with pytest.raises(OSError, match='More than 0 photos .max_unreadable. cannot be read'):
        utilities.embed(model, frame.assign(path=str(tmp_path / 'broken.jpg')), max_unreadable=0)


def test_photographs_kept_for_many_models_must_have_their_size(train):
    model, photos = new_model().eval(), utilities.keep_pixels({'train': train}, 32)
    assert np.array_equal(utilities.embed(model, photos['train']), utilities.embed(model, train))
    with pytest.raises(ValueError, match='read at 16 pixels, and the model takes 32'):
        utilities.embed(model, utilities.Photos(train, 16))


def test_the_learning_rate_warms_up_then_falls_to_zero():
    shares = [utilities.learning_rate_share(step, 100, 10) for step in range(101)]
    assert shares[0] > 0 and np.argmax(shares) == 10 and shares[10] == 1 and shares[100] == pytest.approx(0, abs=1e-9)


def test_batch_norm_keeps_its_pretrained_statistics(train, tmp_path):
    tower = utilities.load_image_tower('timm:test_efficientnet', 'random', 32)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    model = utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, 12, dim=32))
    utilities.fit(CONFIG.override(epochs=1), model, train, tmp_path / 'run')
    changed = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any('weight' in name for name in changed)
    assert not [name for name in changed if 'running' in name or 'num_batches' in name]
