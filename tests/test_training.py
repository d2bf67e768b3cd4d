"""The loop: what a run writes, that it repeats itself, and what it does with broken images, numbers and processes."""
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from jupyter_client.manager import start_new_kernel
from runs import (
    CONFIG,
    HALF,
    SAVING,
    before_step,
    check_half,
    is_one_sentence,
    new_model,
    one_step,
    press_stop_before,
    same,
    small_model,
    watch_half,
    weights,
)
from test_embedding import kill_workers

from guie import training
from guie.checkpoints import load_run, open_checkpoint, save_projection
from guie.config import Config, different_fields
from guie.datasets import read_dataset
from guie.embedding import embed
from guie.errors import Stopped
from guie.files import file_hash, state_hash
from guie.images import ImageDataset, loader
from guie.model import Embedder, SubcenterHead, param_groups
from guie.resume import Progress, is_whole, saved_states
from guie.towers import load_image_tower
from guie.training import fit, learning_rate_share, prepare

# What a run is

def test_a_run_writes_its_artifacts_and_loads_again(train, tmp_path):
    fitted = new_model()
    fit(CONFIG, fitted, train, tmp_path / 'run')
    assert {path.name for path in (tmp_path / 'run').iterdir()} >= {'model.safetensors', 'config.json', 'log.csv', 'state'}
    log = pd.read_csv(tmp_path / 'run/log.csv')
    assert list(log.columns) == ['step', 'loss', 'lr', 'images/s', 'selection'] and log['selection'].isna().all()
    assert log['step'].tolist() == list(range(1, 13))
    assert log['loss'].iloc[-4:].mean() < log['loss'].iloc[:4].mean()
    assert Config.load(tmp_path / 'run/config.json') == CONFIG.override(checkpoint_activations=False)  # as it was run
    model = load_run(tmp_path / 'run')
    assert model.spec.image_size == 32 and model.spec.activation == 'gelu'
    vectors = embed(model, train)
    assert vectors.shape == (72, 32) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors, embed(fitted, train))  # so it scores the same too


def test_the_hash_of_the_weights_is_printed_and_the_same_for_the_same_seed_alone(train, tmp_path, capsys):
    printed = []
    for name, seed in (('a', 5), ('b', 5), ('c', 6)):
        torch.manual_seed(len(printed))  # of no consequence
        fit(CONFIG.override(seed=seed, epochs=1, augmentation='cutout'), new_model(), train, tmp_path / name)
        line, = [line for line in capsys.readouterr().out.splitlines() if 'hash of the weights' in line]
        assert line == f'{name}: hash of the weights {state_hash(weights(tmp_path / name))}'
        printed.append(line.split()[-1])
    assert printed[0] == printed[1] != printed[2]


def test_the_best_weights_on_selection_data_are_kept(train, tmp_path, monkeypatch):
    scores, modes, step = iter([.1, .9, .3, .2, .1, .1, .1]), [], training.optimiser_step

    def validate(model):
        modes.append(model.training)
        return next(scores)

    def watched(run, *rest):
        modes.append(run.model.training)
        return step(run, *rest)

    monkeypatch.setattr(training, 'optimiser_step', watched)
    fit(CONFIG.override(validate_every=2), small_model(), train, tmp_path / 'run', validate)
    assert modes == [True, True, False] * 6  # dropout in every step, in no score; the last step is scored once
    metadata = open_checkpoint(tmp_path / 'run/model.safetensors').metadata
    assert json.loads(metadata['step']) == 4 and json.loads(metadata['score']) == pytest.approx(.9)
    log = pd.read_csv(tmp_path / 'run/log.csv', index_col='step')['selection'].dropna()
    assert log.to_dict() == pytest.approx({2: .1, 4: .9, 6: .3, 8: .2, 10: .1, 12: .1})


def test_the_last_step_is_scored_too_once_and_logged(train, tmp_path, capsys):
    scores, config = iter([.1, .2, .3]), CONFIG.override(validate_every=5)
    for _ in range(2):  # a finished run is not scored again
        fit(config, small_model(), train, tmp_path / 'run', lambda model: next(scores))
    log = pd.read_csv(tmp_path / 'run/log.csv', index_col='step')['selection']
    assert log.dropna().to_dict() == pytest.approx({5: .1, 10: .2, 12: .3}) and len(log) == 12
    assert json.loads(open_checkpoint(tmp_path / 'run').metadata['step']) == 12
    assert capsys.readouterr().out.count('step 12: selection mP@5 0.300') == 1


def test_every_run_in_a_kernel_has_the_precision_of_its_own_configuration(train, tmp_path, monkeypatch):
    used, step = [], training.optimiser_step
    monkeypatch.setattr(training, 'arcface_loss', lambda cosine, *rest, loss=training.arcface_loss: (
        used.append(torch.is_autocast_enabled('cpu')), loss(cosine, *rest))[1])
    monkeypatch.setattr(training, 'optimiser_step', lambda run, *rest: (used.append(run.half), step(run, *rest))[1])
    models = {precision: new_model() for precision in ('fp16', 'bf16', 'no')}
    products = {}
    for precision, model in models.items():
        model.tower.transformer.resblocks[0].mlp.c_fc.register_forward_hook(
            lambda module, given, made, precision=precision: products.update({precision: made.dtype}))
        fit(CONFIG.override(epochs=1, precision=precision), model, train, tmp_path / precision)
    assert list(dict.fromkeys(half for half in used if half is not False)) == [torch.float16, torch.bfloat16, None]
    assert products == {'fp16': torch.float16, 'bf16': torch.bfloat16, 'no': torch.float32}
    assert used.count(False) == 3 * 8  # the loss is computed in float32


def test_a_head_of_another_size_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ValueError, match='12 classes'):
        fit(CONFIG, small_model(classes=5), train, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('images, batch, effective, step', [
    (72, 8, 80, 72), (72, None, 1024, 72), (5, 8, 16, 5), (20, 8, 32, 16), (2, 32, 32, 2), (40, 8, 32, 32)])
def test_a_step_takes_as_many_images_as_there_are_and_says_so(train, tmp_path, capsys, images, batch, effective, step):
    few = train.groupby('label').head(1).head(images) if images < 12 else train.head(images)
    config = CONFIG.replace({'batch_size': batch, 'effective_batch': effective})
    fit(config, small_model(few['label'].nunique()), few, tmp_path / 'run')
    said = f'{images} images do not fill a step of {effective} (effective_batch): it takes {step} of them.'
    assert (said in capsys.readouterr().out) == (images < effective)
    assert len(pd.read_csv(tmp_path / 'run/log.csv')) == 3  # one an epoch
    assert not different_fields(Config.load(tmp_path / 'run/config.json'), config)  # as it was chosen
    fit(config, small_model(few['label'].nunique()), few, tmp_path / 'run')
    assert 'run: resumes from step-00000003, the last: nothing is left to train' in capsys.readouterr().out


def test_fewer_images_than_processes_are_one_sentence():
    with pytest.raises(ValueError, match='2 images cannot be shared by 4 processes') as error:
        training.step_of(CONFIG, 2, 4)
    assert is_one_sentence(error)


@pytest.mark.parametrize('batch, processes, each, step', [
    (32, 1, 32, 32), (8, 1, 8, 32), (8, 2, 8, 32), (32, 2, 16, 32), (16, 4, 8, 32), (8, 3, 8, 24), (16, 3, 10, 30),
    (4, 5, 4, 20), (1, 40, 1, 40)])
def test_several_processes_make_a_step_of_effective_batch_images_or_it_is_said(batch, processes, each, step):
    config = CONFIG.override(batch_size=batch, effective_batch=32)
    taken, accumulate, images = training.step_of(config, 1000, processes)
    assert (taken, images) == (each, step) and taken * accumulate * processes == images
    if step != 32:
        assert f'A step takes {step} images, not 32 (effective_batch)' in training.short_step(config, 1000, taken, images)


def test_a_state_with_too_few_images_left_for_a_larger_step_resumes_with_the_next_epoch(
        train, tmp_path, capsys, monkeypatch):
    config = CONFIG.override(batch_size=8, effective_batch=8, epochs=3)  # 9 steps an epoch, of 72 images
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, press_stop_before(8))
        with pytest.raises(Stopped, match='after 8 of 27 steps'):
            fit(config, small_model(), train, tmp_path / 'run')
    monkeypatch.setattr(training, 'step_of', lambda *_: (8, 2, 16))  # as another number of GPUs makes it
    fit(config, small_model(), train, tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'run: resumes from step-00000008, epoch 1, 64 of its images used' in said
    assert 'A step takes 16 images, not 8 (effective_batch), since each process takes 8 at a time' in said
    assert pd.read_csv(tmp_path / 'run/log.csv')['step'].tolist() == [*range(1, 13)]  # four an epoch


@pytest.mark.parametrize('changes', [{'stages': ({'trains': 'head'}, {})}, {'trains': 'cached head'}])
def test_a_job_of_stages_or_of_a_cached_head_is_refused(train, tmp_path, changes):
    with pytest.raises(ValueError, match='train it by utilities.train') as error:
        training.run_job(CONFIG.override(**changes), {'train': train}, tmp_path / 'run')
    assert is_one_sentence(error) and not (tmp_path / 'run').exists()


def test_images_in_a_read_only_folder_are_trained_on_and_nothing_is_written_there(tiny_world, tmp_path):
    shutil.copytree(tiny_world, tmp_path / 'data')
    folders = [tmp_path / 'data', *(path for path in (tmp_path / 'data').rglob('*') if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / 'data').rglob('*'))]
    frame = read_dataset(tmp_path / 'data/train.csv')
    fit(SAVING, small_model(), frame, tmp_path / 'run')
    embed(small_model(), frame.head(4))
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / 'data').rglob('*'))]
    for folder in folders:
        folder.chmod(0o755)


# A step

def test_accumulated_batches_equal_one_large_batch(train):
    config = CONFIG.override(max_grad_norm=1e9)  # a clipped gradient would hide its scale
    many, one = (one_step(train, config.override(batch_size=size), lr=.1).state_dict() for size in (8, 16))
    assert all(torch.allclose(many[name], one[name], atol=1e-6) for name in one)
    assert not same(one, new_model().state_dict())


@pytest.mark.parametrize('most', [.01, .1])
def test_a_large_gradient_is_clipped_to_the_norm_that_is_set(train, most):
    after = one_step(train, CONFIG.override(batch_size=16, max_grad_norm=most), lr=1.).parameters()
    changes = [(new - old).norm() for new, old in zip(after, new_model().parameters())]
    assert torch.stack(changes).norm().item() == pytest.approx(most, rel=1e-3)


def test_the_optimiser_takes_the_learning_rate_and_decay_of_each_group():
    config = CONFIG.override(layer_lrs=((3, 1e-5), (6, 1e-4)), tower_weight_decay=.02, head_weight_decay=.003)
    model = new_model()
    optimiser = prepare(Accelerator(cpu=True), config, model, None, Progress(), 10).optimiser
    groups = param_groups(model, config)
    assert len(groups) == len(optimiser.param_groups) >= 5
    for group, taken in zip(groups, optimiser.param_groups):
        assert (taken['initial_lr'], taken['weight_decay']) == (group['lr'], group['weight_decay'])
        assert [id(parameter) for parameter in taken['params']] == [id(parameter) for parameter in group['params']]


def test_the_learning_rate_warms_up_then_falls_to_zero():
    shares = [learning_rate_share(step, 100, 10) for step in range(101)]
    assert shares[0] > 0 and np.argmax(shares) == 10 and shares[10] == 1 and shares[100] == pytest.approx(0, abs=1e-9)


def test_each_class_trains_with_the_margin_of_its_own_number_of_images(train, tmp_path, monkeypatch):
    labels = sorted(train['label'].unique())
    most = train['label'].map({labels[3]: 2, labels[7]: 4}).fillna(6)
    frame = train[train.groupby('label').cumcount() < most].sample(frac=1, random_state=0)
    seen, loss = [], training.arcface_loss
    monkeypatch.setattr(training, 'arcface_loss', lambda cosine, targets, margins, scale: (
        seen.append(margins.tolist()), loss(cosine, targets, margins, scale))[1])
    fit(CONFIG.override(epochs=1, margin_min=.1, margin_width=.3), small_model(), frame, tmp_path / 'run')
    expected = np.full(12, .1)
    expected[3], expected[7] = .4, .1 + .3 * (4 ** -.25 - 6 ** -.25) / (2 ** -.25 - 6 ** -.25)
    assert seen and all(margins == pytest.approx(expected, abs=1e-6) for margins in seen)


def test_batch_norm_keeps_its_pretrained_statistics(train, tmp_path):
    tower = load_image_tower('timm:test_efficientnet', 'random', 32)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    fit(CONFIG.override(epochs=1), Embedder(tower, SubcenterHead(tower.spec.width, 12, dim=32)), train, tmp_path / 'run')
    changed = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any('weight' in name for name in changed)
    assert not [name for name in changed if 'running' in name or 'num_batches' in name]


@pytest.mark.parametrize('start', [0, 16, 48])
def test_the_images_of_a_step_are_the_same_on_any_number_of_processes(train, start):
    dataset, orders = ImageDataset(train, 32), []
    for processes in (1, 2, 4):
        parts = [[batch['index'].tolist() for batch in loader(
            dataset, 16 // processes, train=True, epoch=1, start=start, rank=rank, processes=processes)]
            for rank in range(processes)]
        orders.append([sorted(sum(step, [])) for step in zip(*parts)])
    assert orders[0] == orders[1] == orders[2]


# fp16, the precision of a T4

def test_a_gradient_too_large_for_fp16_lowers_the_scale_and_leaves_weights_and_learning_rate(train, tmp_path, monkeypatch):
    seen = watch_half(monkeypatch)  # the gradients of this run overflow down to about 2 ** 15
    fit(HALF, new_model(), train, tmp_path / 'run')
    check_half(pd.DataFrame(seen), tmp_path / 'run')
    assert not (tmp_path / 'run/not_finite.txt').exists()


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(train, tmp_path, monkeypatch):
    watch_half(monkeypatch, scale=4.)
    model = new_model()
    model.tower.conv1.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match='gradient was not finite in 2 steps'):
        fit(HALF.override(max_skipped=1), model, train, tmp_path / 'run')
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 2 * 16  # scales 4 and 2 were tried before


# Images and numbers

def broken(train, folder, rows):
    """The table with unreadable files in some rows, and their paths."""
    frame = train.copy()
    for row in rows:
        (folder / f'broken{row:03d}.jpg').write_bytes(b'not an image')
        frame.loc[row, 'path'] = str(folder / f'broken{row:03d}.jpg')
    return frame, sorted(frame.loc[list(rows), 'path'])


def test_an_unreadable_image_is_replaced_counted_and_listed(train, tmp_path, capsys):
    frame, paths = broken(train, tmp_path, [0])
    fit(CONFIG.override(epochs=1, effective_batch=72), small_model(), frame, tmp_path / 'run')
    assert (tmp_path / 'run/unreadable.txt').read_text().splitlines() == paths
    assert '1 images could not be read and were replaced by others of their class' in capsys.readouterr().out


@pytest.mark.parametrize('name', [*map(os.fsdecode, ('可乐'.encode('gbk'), 'ü'.encode('cp437'), b'\xff\xfe')), '可乐',
                                  'line\u2028separator', 'return\rhere', '\x0b\x1c'])
def test_an_unreadable_path_may_be_of_any_bytes_and_is_a_line(tmp_path, name):
    run = SimpleNamespace(folder=tmp_path, main=True)
    for found in (['/a.jpg', f'/{name}.jpg'], ['/b.jpg'], []):
        listed = training.write_unreadable(run, found)
    assert listed == sorted(['/a.jpg', '/b.jpg', f'/{name}.jpg'])
    assert (tmp_path / 'unreadable.txt').read_bytes() == os.fsencode('\n'.join(listed) + '\n')


def test_a_newline_in_an_unreadable_path_does_not_make_two_of_it(tmp_path):
    run = SimpleNamespace(folder=tmp_path, main=True)
    for _ in range(2):
        assert training.write_unreadable(run, ['/two\nlines.jpg']) == ['/two\\nlines.jpg']


def test_unreadable_images_are_listed_at_each_state_and_over_sessions(train, tmp_path, monkeypatch):
    frame, paths = broken(train, tmp_path, range(0, 72, 9))
    before_step(monkeypatch, press_stop_before(3))
    with pytest.raises(Stopped):
        fit(SAVING.override(epochs=2), small_model(), frame, tmp_path / 'run')
    before = (tmp_path / 'run/unreadable.txt').read_text().splitlines()
    assert before and set(before) <= set(paths)
    fit(SAVING.override(epochs=2), small_model(), frame, tmp_path / 'run')
    after = (tmp_path / 'run/unreadable.txt').read_text().splitlines()
    assert set(before) <= set(after) and after == sorted(set(after)) and set(after) <= set(paths)


@pytest.mark.parametrize('workers', [0, 1])
def test_when_no_image_can_be_read_the_run_stops_early_and_lists_them(train, tmp_path, workers):
    frame, paths = broken(train, tmp_path, range(72))
    with pytest.raises(OSError, match='More than 9 images .max_unreadable. cannot be read; the last') as error:
        fit(SAVING.override(max_unreadable=9, workers=workers), small_model(), frame, tmp_path / 'run')
    assert '\n' not in str(error.value)
    listed = (tmp_path / 'run/unreadable.txt').read_text().splitlines()
    # A worker reads ahead while the main process counts, so that it may have listed a few more by then.
    assert set(listed) <= set(paths) and (len(listed) == 10 if workers == 0 else 10 <= len(listed) < 72)
    assert not (tmp_path / 'run/model.safetensors').exists()


def spoil(monkeypatch, value, calls):
    """Multiplies the loss of some batches, counted from 0, by a value."""
    loss, count = training.arcface_loss, iter(range(10**6))
    monkeypatch.setattr(training, 'arcface_loss', lambda *given: loss(*given) * (value if calls(next(count)) else 1))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_its_images_named(train, tmp_path, monkeypatch, capsys, value):
    spoil(monkeypatch, value, lambda call: call == 3)  # of the second step, the second batch
    fit(SAVING, small_model(), train, tmp_path / 'run')
    named = [line.split('\t') for line in (tmp_path / 'run/not_finite.txt').read_text().splitlines()]
    assert len(named) == 16 and {step for step, _ in named} == {'step 2'}
    order = np.random.default_rng([SAVING.seed, 0]).permutation(72)[16:32]
    assert [path for _, path in named] == train['path'].iloc[order].tolist()
    assert 'step 2: loss or gradient not finite, left out; its images are in' in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / 'run').values())
    assert np.isnan(pd.read_csv(tmp_path / 'run/log.csv')['loss']).tolist() == [False, True, False, False]


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(train, tmp_path, monkeypatch):
    clip, calls, states = torch.nn.utils.clip_grad_norm_, iter(range(100)), []
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *given: clip(*given) * (
        math.inf if next(calls) == 1 else 1))
    model = small_model()
    before_step(monkeypatch, lambda number: states.append({k: v.clone() for k, v in model.state_dict().items()}))
    fit(SAVING, model, train, tmp_path / 'run')
    assert same(states[1], states[2]) and not same(states[0], states[1]) and not same(states[2], states[3])
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 16


def test_more_skipped_steps_than_allowed_stop_the_run_and_the_last_state_stays(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, math.nan, lambda call: call >= 2)
        with pytest.raises(FloatingPointError, match='in 2 steps .max_skipped is 1.*not_finite.txt, lower head_lr') as error:
            fit(SAVING.override(max_skipped=1), small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error)
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 32
    fit(SAVING, small_model(), train, tmp_path / 'run')
    assert (tmp_path / 'run/model.safetensors').exists()


def test_weights_that_are_not_numbers_stop_the_run(train, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.head.centers.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='lower head_lr'):
        fit(CONFIG, model, train, tmp_path / 'run')


# Processes, memory and the stop button

def test_a_gpu_that_runs_out_of_memory_is_one_sentence_and_the_last_state_stays(train, tmp_path, monkeypatch):
    def fill(step):
        if step == 3:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')

    before_step(monkeypatch, fill)
    with pytest.raises(MemoryError, match='ran out of memory at batch_size 8: halve it .* from its last state') as error:
        fit(SAVING, small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error) and saved_states(tmp_path / 'run/state')[0].name == 'step-00000002'


def test_a_killed_worker_is_one_sentence_and_the_run_resumes_from_its_last_state(train, tmp_path, monkeypatch):
    config = SAVING.override(workers=1, augmentation='cutout')
    fit(config, small_model(), train, tmp_path / 'whole')

    def children():
        return {int(child) for child in Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()}

    def kill_the_worker(step):
        if step == 3:
            worker, = children() - before
            os.kill(worker, signal.SIGKILL)
            signal.sigtimedwait([], 10)  # until the loader is told

    before = children()
    before_step(monkeypatch, kill_the_worker)
    with pytest.raises(Stopped, match='a data-loading process was killed.*workers lower.*its last state') as error:
        fit(config, small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error)
    fit(config, small_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_a_worker_killed_while_the_selection_is_scored_is_the_same_sentence(train, tmp_path, monkeypatch):
    kill_workers(monkeypatch, train['path'][3])
    with pytest.raises(Stopped, match='^run: a data-loading process was killed.*workers lower.*its last state') as error:
        fit(SAVING.override(workers=0, validate_every=2), small_model(), train, tmp_path / 'run',
            lambda model: embed(model, train, workers=1)[0, 0])
    assert is_one_sentence(error)


def test_the_stop_button_saves_the_step_and_leaves_a_usable_kernel(train, tmp_path, monkeypatch):
    config = SAVING.override(save_minutes=1000, augmentation='cutout')
    fit(config, new_model(), train, tmp_path / 'whole')
    handler = signal.getsignal(signal.SIGINT)
    before_step(monkeypatch, press_stop_before(2))
    with pytest.raises(Stopped, match='it was interrupted after 2 of 4 steps; everything is saved, run it again') as error:
        fit(config, new_model(), train, tmp_path / 'run')
    assert is_one_sentence(error) and signal.getsignal(signal.SIGINT) is handler
    fit(config, new_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_pressed_twice_the_stop_button_acts_at_once(train, tmp_path, monkeypatch):
    def press(step):
        for _ in range(2 * (step == 3)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2)  # sooner, it is one press that arrived twice

    before_step(monkeypatch, press)
    with pytest.raises(KeyboardInterrupt):
        fit(SAVING, small_model(), train, tmp_path / 'run')
    assert [state.name for state in saved_states(tmp_path / 'run/state')] == ['step-00000002', 'step-00000001']


def test_a_notebook_that_is_interrupted_while_it_trains_keeps_its_state_and_its_kernel(train, tmp_path):
    train.to_csv(tmp_path / 'train.csv', index=False)
    code = ("import sys; sys.path.insert(0, 'tests')\nimport pandas as pd, runs, utilities\n"
            f"frame = pd.read_csv('{tmp_path}/train.csv', dtype=str)\n"
            f"utilities.fit(runs.CONFIG.override(epochs=10_000), runs.small_model(), frame, '{tmp_path}/run')")
    manager, kernel = start_new_kernel(kernel_name='python3')
    try:
        # Else what comes at once after the cell that fails may be aborted.
        request, log = kernel.execute(code, stop_on_error=False), tmp_path / 'run/log.csv'
        until = time.time() + 120
        while not (log.exists() and log.read_text().count('\n') > 2):
            assert time.time() < until
            while kernel.shell_channel.msg_ready():  # a late answer to start_new_kernel, or that the cell has failed
                message = kernel.get_shell_msg()
                assert message['parent_header']['msg_id'] != request, message['content']
            time.sleep(.05)
        manager.interrupt_kernel()
        reply = kernel._recv_reply(request, timeout=60)['content']
        assert reply['ename'] == 'Stopped' and 'everything is saved, run it again to resume.' in reply['evalue']
        assert kernel.execute_interactive('assert len(frame) == 72', timeout=60)['content']['status'] == 'ok'
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    assert is_whole(saved_states(tmp_path / 'run/state')[0])


@pytest.mark.parametrize('changes', [{}, {'validate_every': 4}])
def test_a_finished_run_that_is_trained_again_keeps_its_projection(train, tmp_path, changes):
    config, validate = CONFIG.override(**changes), (lambda model: .5) if changes else None
    fit(config, small_model(), train, tmp_path / 'run', validate)
    save_projection(tmp_path / 'run', torch.nn.Linear(32, 8))
    kept = file_hash(tmp_path / 'run/model.safetensors')
    fit(config, small_model(), train, tmp_path / 'run', validate)
    assert file_hash(tmp_path / 'run/model.safetensors') == kept and open_checkpoint(tmp_path / 'run').projection


def test_margins_grow_to_a_right_angle_at_most():
    config = CONFIG.override(margin_growth=.5)
    assert training.widened(torch.tensor([.05, .5]), 2, config).tolist() == pytest.approx([1.05, 1.5])
    assert training.widened(torch.tensor([.05, .5]), 9, config).tolist() == pytest.approx([math.pi / 2] * 2)
