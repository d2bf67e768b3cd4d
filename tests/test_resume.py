"""Resume: whatever happens to a long run, what it saved is not lost, and it ends in the weights of an uninterrupted one."""
import errno
import fcntl
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import other as accelerate_files
from filelock import FileLock
from runs import (
    CONFIG,
    SAVING,
    SPAWN,
    before_step,
    contents,
    is_one_sentence,
    new_model,
    press_stop_before,
    same,
    small_model,
    wait_for,
    weights,
)
from test_training import broken

from guie import checkpoints, resume, training
from guie.checkpoints import find_ingredients, open_checkpoint
from guie.config import FORMER_NAMES
from guie.errors import Stopped
from guie.files import state_hash
from guie.resume import BEST, free_space, is_whole, read_position, run_lock, saved_states
from guie.splits import describe, refuse_other_data, selection_hash, trained_on
from guie.training import fit


def states_of(run):
    """Names of the states in a run's folder, newest first."""
    return [state.name for state in saved_states(run / 'state')]


def steps_logged(run):
    return pd.read_csv(run / 'log.csv')['step'].tolist()


# Killed at any moment

def _fit_in_a_child(config, train, run):
    fit(config, new_model(config), train, run)


def test_a_run_killed_at_any_step_resumes_bit_for_bit(train, tmp_path, capsys):
    config = CONFIG.override(save_minutes=0, augmentation='cutout')
    fit(config, new_model(), train, tmp_path / 'whole')
    child = SPAWN.Process(target=_fit_in_a_child, args=(config, train, tmp_path / 'killed'))
    child.start()
    step = random.randint(1, 8)  # another one every time
    wait_for(lambda: any(state.name >= f'step-{step:08d}' for state in saved_states(tmp_path / 'killed/state')),
             child.is_alive)
    child.kill()
    child.join()
    assert not (tmp_path / 'killed/model.safetensors').exists()
    fit(config, new_model(), train, tmp_path / 'killed')
    assert 'killed: resumes from step-' in capsys.readouterr().out
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed')), f'killed after step {step}'
    assert steps_logged(tmp_path / 'killed') == list(range(1, 13))


def _die_at(write_step):
    """Kills this process before its n-th write of a file or change of a folder, and within each writer of tensors."""
    count = iter(range(1, 10**6))

    def reached():
        if next(count) == write_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        if event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.rmtree') or (
                event == 'open' and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            reached()

    def halfway(writer):
        def write(tensors, file, *rest, **options):
            reached()
            writer(tensors, file, *rest, **options)
            os.truncate(file, os.path.getsize(file) // 2)
            reached()
            writer(tensors, file, *rest, **options)
        return write

    torch.save = halfway(torch.save)
    accelerate_files.safe_save_file = halfway(accelerate_files.safe_save_file)
    checkpoints.save_file = halfway(checkpoints.save_file)
    sys.addaudithook(watch)


def _kill_at_every_write(train, folder):
    model = small_model()  # each child has its own copy; of one thread, so that a fork is safe
    for write_step in range(1, 1000):
        run = folder / f'{write_step}'
        shutil.copytree(folder / 'begun', run, copy_function=os.link)
        child = os.fork()
        if not child:
            sys.stdout = open(os.devnull, 'w')
            _die_at(write_step)
            fit(SAVING, model, train, run)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = states_of(run)
        survivors = [state for state in saved_states(run / 'state') if is_whole(state)]
        if status == 0:
            break
        child = os.fork()
        if not child:
            sys.stdout = open(os.devnull, 'w')
            fit(SAVING, model, train, run)
            os._exit(0)
        _, resumed = os.waitpid(child, 0)
        with open(folder / 'results', 'a') as file:
            file.write(json.dumps([write_step, os.WTERMSIG(status), len(left), len(survivors), resumed,
                                   state_hash(weights(run))]) + '\n')
        shutil.rmtree(run)


def test_a_kill_between_any_two_write_steps_leaves_a_state_that_ends_in_the_same_weights(train, tmp_path, monkeypatch):
    fit(SAVING, small_model(), train, tmp_path / 'whole')
    before_step(monkeypatch, press_stop_before(3))
    with pytest.raises(Stopped):
        fit(SAVING, small_model(), train, tmp_path / 'begun')
    child = SPAWN.Process(target=_kill_at_every_write, args=(train, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 0
    results = [json.loads(line) for line in (tmp_path / 'results').read_text().splitlines()]
    expected = state_hash(weights(tmp_path / 'whole'))
    assert len(results) >= 20
    for write_step, how, left, survivors, resumed, found in results:
        assert (how, resumed, found) == (signal.SIGKILL, 0, expected), f'write step {write_step}'
        assert survivors >= 1, f'write step {write_step}: {left} states, none whole'


# Stopped

def test_a_time_budget_stops_cleanly_and_the_next_call_finishes(train, tmp_path):
    whole, parts = CONFIG.override(epochs=1), CONFIG.override(epochs=1, max_hours=1e-9)
    fit(whole, small_model(), train, tmp_path / 'whole')
    with pytest.raises(Stopped, match='1e-09 hours are over after 1 of 4 steps; everything is saved, run it again') as error:
        fit(parts, small_model(), train, tmp_path / 'parts')
    assert is_one_sentence(error)
    fit(whole, small_model(), train, tmp_path / 'parts')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


def test_a_run_in_fp16_resumes_bit_for_bit_with_the_scale_of_its_state(train, tmp_path, monkeypatch):
    config = SAVING.override(epochs=2, precision='fp16')
    scaler, scales = torch.amp.GradScaler, []
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *given, **more: scaler(*given, init_scale=2.**6, **more))
    fit(config, small_model(), train, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        before_step(patch, press_stop_before(5))
        with pytest.raises(Stopped):
            fit(config, small_model(), train, tmp_path / 'parts')
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *given, **more: scaler(*given, init_scale=8., **more))
    step = training.optimiser_step
    monkeypatch.setattr(training, 'optimiser_step', lambda run, *rest: (
        scales.append(run.scaler.get_scale()), step(run, *rest))[1])
    fit(config, small_model(), train, tmp_path / 'parts')
    assert scales == [2.**6] * 3 and same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


@pytest.mark.parametrize('first, then', [('no', 'fp16'), ('fp16', 'no')])
def test_a_run_resumes_with_another_precision_as_on_another_gpu(train, tmp_path, capsys, first, then):
    with pytest.raises(Stopped):
        fit(SAVING.override(precision=first, max_hours=0), small_model(), train, tmp_path / 'run')
    fit(SAVING.override(precision=then), small_model(), train, tmp_path / 'run')
    assert 'resumes from step-00000001' in capsys.readouterr().out and steps_logged(tmp_path / 'run') == [1, 2, 3, 4]


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(train, tmp_path, monkeypatch, capsys):
    config = SAVING.override(precision='fp16')
    fit(config, small_model(), train, tmp_path / 'whole')
    with pytest.raises(Stopped):
        fit(config.override(max_hours=1e-9), small_model(), train, tmp_path / 'run')
    state, file = saved_states(tmp_path / 'run/state')[0], tmp_path / 'run/config.json'
    position = json.loads((state / 'position.json').read_text())
    torch.save(position.pop('scaler'), state / 'scaler.pt')  # accelerate's, in a file of its own
    position['files']['scaler.pt'] = (state / 'scaler.pt').stat().st_size
    (state / 'position.json').write_text(json.dumps(position))
    former = {new: old for old, new in FORMER_NAMES.items()}
    values = {former.get(name, name): value for name, value in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(values | {'sampling': 'photographs', 'partial_centers': 1.0, 'distil': 0.0, 'teacher': '',
                                         'domains': []}))
    assert 'bands' in values and 'clip_norm' in values
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *given, **more: scaler(*given, init_scale=8., **more))
    fit(config, small_model(), train, tmp_path / 'run')
    assert 'run: resumes from step-00000001' in capsys.readouterr().out
    assert read_position(saved_states(tmp_path / 'run/state')[0])['scaler']['scale'] > 8
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_another_configuration_does_not_resume_in_the_same_folder(train, tmp_path):
    fit(CONFIG.override(epochs=1), small_model(), train, tmp_path / 'run')
    with pytest.raises(ValueError, match='holds a run with another configuration .head_lr: 0.003, now 1.0') as error:
        fit(CONFIG.override(epochs=1, head_lr=1.), small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error)


def test_a_finished_run_of_another_configuration_is_kept_also_without_its_states(train, tmp_path):
    fit(SAVING, small_model(), train, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/state')
    before, other = contents(tmp_path / 'run'), SAVING.override(head_lr=1.)
    fit(other, small_model(), train, tmp_path / 'input/run')
    for search in ((), [tmp_path / 'input']):  # whose state is not copied over it either
        with pytest.raises(ValueError, match='holds a run with another configuration .head_lr: 0.003, now 1.0') as error:
            fit(other, small_model(), train, tmp_path / 'run', search=search)
        assert is_one_sentence(error) and contents(tmp_path / 'run') == before
    fit(SAVING, small_model(), train, tmp_path / 'run', search=())  # its own trains it again
    assert steps_logged(tmp_path / 'run') == [1, 2, 3, 4]


def test_other_images_do_not_resume_in_the_same_folder(train, tmp_path):
    with pytest.raises(Stopped):
        fit(CONFIG.override(max_hours=0), small_model(), train, tmp_path / 'run')
    with pytest.raises(ValueError, match='a run on other images .hash .*: give this run another name') as error:
        fit(CONFIG, small_model(), train.drop(train.index[0]), tmp_path / 'run')
    assert is_one_sentence(error)


@pytest.mark.parametrize('left', ['states', 'weights', 'a stage', 'an early state'])
def test_a_run_of_other_images_is_refused_before_anything_of_it_is_read(train, tmp_path, monkeypatch, left):
    folder = tmp_path / 'run' / ('run-stage-1' if left == 'a stage' else '')
    fit(SAVING, small_model(), train, folder)
    if left in ('weights', 'a stage'):
        shutil.rmtree(folder / 'state')
    if left == 'a stage':
        (folder / 'model.safetensors').rename(folder / 'stage.safetensors')
    if left == 'an early state':  # which kept the hash alone
        for file in folder.glob('state/*/position.json'):
            file.write_text(file.read_text().replace(trained_on(folder), selection_hash(train)))
    monkeypatch.setattr(Accelerator, 'load_state', lambda *_: pytest.fail('it was loaded'))
    pets = train.assign(label=train['label'].where(train['label'] == train['label'][0], 'dog'), domain='pets')
    words = '' if left == 'an early state' else ', 72 images of 12 classes (12 world0)'
    refused = [lambda: refuse_other_data(tmp_path / 'run', describe(pets))]
    if left != 'a stage':
        refused.append(lambda: fit(SAVING, small_model(2), pets, tmp_path / 'run'))
    for begin in refused:
        with pytest.raises(ValueError) as error:
            begin()
        assert f'holds a run on other images (hash {selection_hash(train)}{words}; now hash' in re.sub(
            r'world\d', 'world0', str(error.value)) and '72 images of 2 classes (2 pets)' in str(error.value)
        assert 'delete' not in str(error.value) and is_one_sentence(error)
    refuse_other_data(tmp_path / 'run', describe(train))
    refuse_other_data(tmp_path / 'new', describe(pets))


def test_a_run_that_was_stopped_is_no_ingredient_yet_and_what_it_found_best_comes_along(train, tmp_path):
    scores, config = iter([.5, .9, .3, .1]), CONFIG.override(epochs=1, validate_every=1, max_hours=0)
    for _ in range(2):
        with pytest.raises(Stopped):
            fit(config, small_model(), train, tmp_path / 'h_run', lambda model: next(scores))
    with pytest.raises(FileNotFoundError, match='no finished run of h'):
        find_ingredients(tmp_path, ['h'])
    (tmp_path / 'input').mkdir()
    (tmp_path / 'h_run').rename(tmp_path / 'input/h_run')
    fit(config.override(max_hours=1.), small_model(), train, tmp_path / 'h_run', lambda model: next(scores),
        search=(tmp_path / 'input',))
    found, = find_ingredients(tmp_path, ['h'])['h']
    assert found.path == tmp_path / 'h_run/model.safetensors'
    assert json.loads(open_checkpoint(tmp_path / 'h_run').metadata['step']) == 2 and not (tmp_path / 'h_run' / BEST).exists()


@pytest.mark.parametrize('old', [False, True])
def test_the_scores_of_a_run_come_along_in_its_log_and_an_older_log_gets_a_column_for_them(train, tmp_path, old):
    scores, file = iter([.5, .9, .3, .1]), tmp_path / 'run/log.csv'
    config = CONFIG.override(epochs=1, validate_every=1, max_hours=0)
    with pytest.raises(Stopped):
        fit(config, small_model(), train, tmp_path / 'run', lambda model: next(scores))
    if old:
        pd.read_csv(file).drop(columns='selection').to_csv(file, index=False)
    first = pd.read_csv(file)
    fit(config.override(max_hours=1.), small_model(), train, tmp_path / 'run', lambda model: next(scores))
    log = pd.read_csv(file)
    assert log.columns.tolist() == ['step', 'loss', 'lr', 'images/s', 'selection'] and log['step'].tolist() == [1, 2, 3, 4]
    assert log['selection'].fillna(0).tolist() == [0 if old else .5, .9, .3, .1]
    assert log['loss'][0] == first['loss'][0] and log['images/s'].notna().all()


def test_a_state_is_saved_at_the_end_of_each_epoch_and_when_it_is_due(train, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, 'save_checkpoint', lambda run, required=False: saved.append(
        (run.progress.step, run.progress.epoch, run.progress.used)))
    fit(CONFIG.override(epochs=2), small_model(), train, tmp_path / 'run')  # save_minutes is 1000
    assert list(dict.fromkeys(saved)) == [(4, 1, 0), (8, 2, 0)]
    saved.clear()
    fit(SAVING, small_model(), train, tmp_path / 'another')
    assert [step for step, *_ in dict.fromkeys(saved)] == [1, 2, 3, 4]


# Two runs in one folder

def test_a_second_process_is_refused_and_harms_nothing(train, tmp_path, capsys):
    first = SPAWN.Process(target=_fit_in_a_child, args=(SAVING.override(epochs=50), train, tmp_path / 'run'))
    first.start()
    wait_for((tmp_path / 'run/state').exists, first.is_alive)
    with pytest.raises(RuntimeError, match='Another run is writing into .*: wait for it, or give this one another') as error:
        fit(SAVING.override(epochs=50), new_model(), train, tmp_path / 'run')
    assert is_one_sentence(error) and first.is_alive()
    first.kill()
    first.join()
    with run_lock(tmp_path / 'run'):  # the system freed it
        with pytest.raises(RuntimeError, match='Another run is writing'):
            fit(CONFIG, small_model(), train, tmp_path / 'run')


def test_on_a_disk_without_locks_a_run_trains_and_says_that_none_protects_it(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileLock, 'acquire', lambda lock: (_ for _ in ()).throw(NotImplementedError('flock')))
    fit(SAVING, small_model(), train, tmp_path / 'run')
    assert 'is on a disk without locks: do not start a second run of this name.' in capsys.readouterr().out
    assert (tmp_path / 'run/model.safetensors').exists()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_network_drive_without_locks_is_no_second_run(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    for _ in range(2):  # nothing is left that a later session would take for another run
        with run_lock(tmp_path / 'run'):
            assert 'run is on a disk without locks: do not start a second run of this name.' in capsys.readouterr().out


@pytest.mark.parametrize('number', [errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_a_drive_says_of_a_lock_is_told_as_it_is(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    for owner, name in ((fcntl, 'flock'), (FileLock, 'acquire'), (Path, 'mkdir')):
        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(owner, name, refuse)
            with run_lock(tmp_path / 'run'):
                pytest.fail('it was locked')
        assert str(error.value) == (
            f'{tmp_path}/run cannot be written or locked ({os.strerror(number)}): choose another OUT_DIR.')


def test_a_lock_that_cannot_be_given_back_does_not_end_a_finished_run(tmp_path, monkeypatch):
    with run_lock(tmp_path / 'run'):
        monkeypatch.setattr(fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(errno.ESTALE, 'gone')))


def test_a_folder_that_cannot_be_written_is_one_sentence(train, tmp_path):
    (tmp_path / 'file').write_text('')
    for place in (tmp_path / 'file/run', Path('/proc/run'), Path('/sys/run')):
        with pytest.raises(OSError, match=f'{place} cannot be written or locked .* choose another OUT_DIR') as error:
            fit(SAVING, small_model(), train, place)
        assert is_one_sentence(error)


# Disk

@pytest.fixture
def small_files():
    """No file can grow beyond some bytes, whoever writes it: the system refuses in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_during_a_save_leaves_the_older_state_and_the_run_continues(
        train, tmp_path, capsys, monkeypatch, small_files):
    fit(SAVING, new_model(), train, tmp_path / 'whole')
    limits, seen = {2: 300_000, 3: resource.RLIM_INFINITY}, {}

    def act(step):
        if step in limits:
            small_files(limits[step])
        seen[step] = states_of(tmp_path / 'run')

    before_step(monkeypatch, act)
    fit(SAVING, new_model(), train, tmp_path / 'run')
    assert seen[3] == ['step-00000001'] and seen[4] == ['step-00000003', 'step-00000001']
    printed = [line for line in capsys.readouterr().out.splitlines() if 'could not be saved' in line]
    assert len(printed) == 1 and 'state after step 2 could not be saved' in printed[0] and 'Free some space' in printed[0]
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_a_full_disk_when_the_run_must_stop_is_an_error_and_the_older_state_resumes(
        train, tmp_path, monkeypatch, small_files):
    fit(SAVING, new_model(), train, tmp_path / 'whole')

    def act(step):
        if step == 3:
            small_files(300_000)
            os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, act)
    with pytest.raises(OSError, match='state after step 3 could not be saved .* the one before is unchanged') as error:
        fit(SAVING, new_model(), train, tmp_path / 'run')
    small_files(resource.RLIM_INFINITY)
    assert is_one_sentence(error)
    assert states_of(tmp_path / 'run') == ['step-00000002', 'step-00000001']
    fit(SAVING, new_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


@pytest.mark.parametrize('error, told', [
    (OSError(errno.ENOSPC, 'No space left on device', 'x'), 'could not be saved (No space left on device)'),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'could not be saved (Disk quota exceeded)'),
    (RuntimeError('[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598'), 'could not be saved ([enforce'),
    (RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed'), 'could not be saved (Pytorch'),
    (OSError(), 'could not be saved (OSError)'),
    (torch.OutOfMemoryError('CUDA out of memory.'), None), (RuntimeError('CUDA error: device-side assert'), None),
    (RuntimeError(''), None)])
def test_a_save_that_fails_tells_a_full_disk_from_other_faults(train, tmp_path, capsys, monkeypatch, error, told):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(Accelerator, 'save_state', refuse)
    if told:
        fit(SAVING, small_model(), train, tmp_path / 'run')
        assert f'the state after step 1 {told}' in capsys.readouterr().out
        return
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        fit(SAVING, small_model(), train, tmp_path / 'run')
    assert 'space' not in str(raised.value) and 'could not be saved' not in capsys.readouterr().out


def test_a_disk_too_full_for_the_log_does_not_stop_the_run_and_no_row_is_lost(
        train, tmp_path, capsys, monkeypatch, small_files):
    frame, paths = broken(train, tmp_path, range(0, 72, 2))
    before_step(monkeypatch, lambda step: {2: small_files, 4: small_files}.get(step, id)(
        60 if step == 2 else resource.RLIM_INFINITY))
    fit(SAVING, small_model(), frame, tmp_path / 'run')
    log = pd.read_csv(tmp_path / 'run/log.csv')
    assert log['step'].tolist() == [1, 2, 3, 4] and log.drop(columns='selection').notna().all(axis=None)
    assert 'unreadable.txt could not be written (File too large): free some space' in capsys.readouterr().out
    assert (tmp_path / 'run/unreadable.txt').read_text().splitlines() == paths
    assert not list((tmp_path / 'run').glob('.part*'))


def test_two_states_are_kept_where_a_third_fits_else_one_and_never_none(train, tmp_path, monkeypatch):
    seen, free = [], iter([10**12] * 3 + [1000] * 100)
    monkeypatch.setattr(resume.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=next(free)))
    before_step(monkeypatch, lambda step: seen.append([name[-1] for name in states_of(tmp_path / 'run')]))
    fit(SAVING.override(epochs=2), small_model(), train, tmp_path / 'run')
    assert seen[:6] == [[], ['1'], ['2', '1'], ['3'], ['4'], ['5']]


def test_a_state_that_is_damaged_is_not_what_is_kept_when_space_is_freed(train, tmp_path, monkeypatch):
    fit(SAVING, small_model(), train, tmp_path / 'run')
    newest, older = saved_states(tmp_path / 'run/state')
    (newest / 'optimizer.bin').write_bytes(b'')
    monkeypatch.setattr(resume.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=0))
    free_space(tmp_path / 'run/state/unfinished')
    assert saved_states(tmp_path / 'run/state') == [older]


# Damaged states

@pytest.mark.parametrize('keep', [0, 100, -20])
@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.bin', 'random_states_0.pkl', 'position.json'])
def test_whichever_file_of_the_newest_state_is_cut_the_one_before_resumes(train, tmp_path, capsys, file, keep):
    fit(SAVING, small_model(), train, tmp_path / 'run')
    expected = weights(tmp_path / 'run')
    newest = saved_states(tmp_path / 'run/state')[0]
    (newest / file).write_bytes((newest / file).read_bytes()[:keep])
    fit(SAVING, small_model(), train, tmp_path / 'run')
    printed = capsys.readouterr().out
    assert f'{newest} cannot be read' in printed and 'trying the one before' in printed
    assert 'resumes from step-00000003' in printed and same(expected, weights(tmp_path / 'run'))
    assert steps_logged(tmp_path / 'run') == [1, 2, 3, 4]  # the lost step is there once


def test_a_run_none_of_whose_states_can_be_read_does_not_begin_anew_unasked(train, tmp_path):
    fit(SAVING, small_model(), train, tmp_path / 'run')
    for state in saved_states(tmp_path / 'run/state'):
        (state / 'optimizer.bin').write_bytes(b'garbage')
    with pytest.raises(ValueError, match='None of the states in .* delete this folder to start anew') as error:
        fit(SAVING, small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('file', ['optimizer.bin', 'random_states_0.pkl', 'scheduler.bin', 'custom_checkpoint_0.pkl',
                                  'pytorch_model.bin', 'scaler.pt'])
def test_a_state_that_would_run_code_does_not_run_it(train, tmp_path, file):
    config = SAVING.override(precision='fp16')
    fit(config, small_model(), train, tmp_path / 'run')
    for state in saved_states(tmp_path / 'run/state'):
        torch.save({'state': Trap(tmp_path / 'trap')}, state / file)
        if file == 'pytorch_model.bin':
            (state / 'model.safetensors').unlink()
        position = json.loads((state / 'position.json').read_text())
        position['files'] = {path.name: path.stat().st_size for path in state.iterdir() if path.name != 'position.json'}
        (state / 'position.json').write_text(json.dumps(position))
    try:
        fit(config, small_model(), train, tmp_path / 'run')
    except ValueError as error:
        assert 'None of the states' in str(error)
    assert not (tmp_path / 'trap').exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / 'trap')))
    assert (tmp_path / 'trap').exists()  # the trap does work


# An earlier session's output, attached

@pytest.mark.parametrize('place', ['', 'notebook', 'notebooks/someone/training'])
def test_a_state_in_an_attached_output_is_copied_and_continued(train, tmp_path, monkeypatch, capsys, place):
    fit(SAVING, small_model(), train, tmp_path / 'whole')
    before_step(monkeypatch, press_stop_before(3))
    attached = tmp_path / 'input' / place
    with pytest.raises(Stopped):
        fit(SAVING, small_model(), train, attached / 'run')
    before = contents(tmp_path / 'input')
    fit(SAVING, small_model(), train, tmp_path / 'working/run', search=[tmp_path / 'absent', tmp_path / 'input'])
    printed = capsys.readouterr().out
    assert f'run: {attached}/run/state/step-00000003 was copied here' in printed
    assert 'resumes from step-00000003' in printed and contents(tmp_path / 'input') == before
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'working/run'))
    assert steps_logged(tmp_path / 'working/run') == [1, 2, 3, 4]


def test_an_attached_state_of_another_configuration_is_left_alone_and_said_so(train, tmp_path, capsys):
    fit(SAVING, small_model(), train, tmp_path / 'input/run')
    fit(SAVING.override(seed=7), small_model(), train, tmp_path / 'run', search=[tmp_path / 'input'])
    printed = capsys.readouterr().out
    assert 'has another configuration (seed: 5, now 7) and is left alone' in printed and 'resumes' not in printed
    for number, (content, words) in enumerate(((None, 'There is no configuration'), ('{', 'is not a configuration'))):
        (tmp_path / 'input/run/config.json').unlink()
        if content:
            (tmp_path / 'input/run/config.json').write_text(content)
        fit(SAVING, small_model(), train, tmp_path / f'new{number}/run', search=[tmp_path / 'input'])
        printed = capsys.readouterr().out
        assert 'input/run is left alone: ' in printed and words in printed and 'another configuration' not in printed
        (tmp_path / 'input/run/config.json').touch()


def test_an_attached_state_of_other_images_is_left_alone_and_said_so(train, tmp_path, capsys):
    fit(SAVING, small_model(), train, tmp_path / 'input/run')
    fit(SAVING, small_model(), train.drop(train.index[0]), tmp_path / 'run', search=[tmp_path / 'input'])
    printed = capsys.readouterr().out
    assert 'is of other images (72 images of 12 classes' in printed and 'and is left alone' in printed
    assert 'resumes' not in printed and (tmp_path / 'run/model.safetensors').exists()


def test_of_attached_states_the_newest_whole_one_is_taken(train, tmp_path, capsys):
    fit(SAVING, small_model(), train, tmp_path / 'input/run')
    (tmp_path / 'input/run/state/step-00000004/optimizer.bin').write_bytes(b'')
    fit(SAVING, small_model(), train, tmp_path / 'run', search=[tmp_path / 'input'])
    assert 'resumes from step-00000003' in capsys.readouterr().out
    assert same(weights(tmp_path / 'input/run'), weights(tmp_path / 'run'))
