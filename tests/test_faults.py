"""What can go wrong in a long run: nothing that was saved is lost, and one sentence says what happened."""
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import notebook_launcher
from accelerate.utils import other as accelerate_files
from jupyter_client.manager import start_new_kernel
from safetensors.torch import load_file
from test_training import CONFIG, new_model, same, train_in_a_child, wait_for, weights

import utilities

SPAWN = multiprocessing.get_context('spawn')
SAVING = CONFIG.override(save_minutes=0, epochs=1)  # 4 steps of 16 photographs, a state after each


@pytest.fixture
def step_hook(monkeypatch):
    """Calls a function with the number of the optimiser step before it is made."""
    def install(act):
        original, count = utilities.optimiser_step, iter(range(1, 10**6))

        def hooked(*arguments):
            act(next(count))
            return original(*arguments)

        monkeypatch.setattr(utilities, 'optimiser_step', hooked)
    return install


def contents(folder):
    """{path: bytes} of everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def one_sentence(error):
    return '\n' not in str(error.value) and str(error.value).endswith('.')


# Killed at any moment

def small_model():
    torch.manual_seed(0)
    spec = utilities.TowerSpec('small', '', 32, (.5,) * 3, (.5,) * 3, '', 8, {})
    tower = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 8))
    return utilities.Embedder(tower, utilities.SubcenterHead(8, 12, dim=32), spec=spec)


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
    utilities.save_file = halfway(utilities.save_file)
    sys.addaudithook(watch)


def _kill_at_every_write(train, folder):
    torch.set_num_threads(1)  # forks are safe then
    model = small_model()  # each child has its own copy
    for write_step in range(1, 1000):
        run = folder / f'{write_step}'
        shutil.copytree(folder / 'begun', run, copy_function=os.link)
        child = os.fork()
        if not child:
            sys.stdout = open(os.devnull, 'w')
            _die_at(write_step)
            utilities.fit(SAVING, model, train, run)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = [state.name for state in utilities.saved_states(run / 'state')]
        survivors = [state for state in utilities.saved_states(run / 'state') if utilities._is_whole(state)]
        if status == 0:
            break
        child = os.fork()
        if not child:
            sys.stdout = open(run / 'said', 'w')
            utilities.fit(SAVING, model, train, run)
            sys.stdout.flush()
            os._exit(0)
        _, resumed = os.waitpid(child, 0)
        digest = utilities.state_digest(load_file(run / 'model.safetensors'))
        with open(folder / 'results', 'a') as file:
            file.write(json.dumps([write_step, os.WTERMSIG(status), len(left), len(survivors), resumed, digest]) + '\n')
        shutil.rmtree(run)


def test_a_kill_between_any_two_write_steps_leaves_a_state_that_ends_in_the_same_weights(train, tmp_path, step_hook):
    utilities.fit(SAVING, small_model(), train, tmp_path / 'whole')
    step_hook(lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(utilities.Stopped):
        utilities.fit(SAVING, small_model(), train, tmp_path / 'begun')
    child = SPAWN.Process(target=_kill_at_every_write, args=(train, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 0
    results = [json.loads(line) for line in (tmp_path / 'results').read_text().splitlines()]
    expected = utilities.state_digest(weights(tmp_path / 'whole'))
    assert len(results) >= 20
    for write_step, how, left, survivors, resumed, digest in results:
        assert (how, resumed, digest) == (signal.SIGKILL, 0, expected), f'write step {write_step}'
        assert survivors >= 1, f'write step {write_step}: {left} states, none whole'


def _fit_alone(config, train, run):
    utilities.fit(config, new_model(config), train, run)


def _fit_by_two(config, train, run):
    """Two processes, in a process group of their own; returns the process that launched them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    if child := os.fork():
        return child
    os.setsid()
    notebook_launcher(_fit_alone, (config, train, run), num_processes=2, use_port=port)
    os._exit(0)


def _kill_two(config, train, folder):
    torch.set_num_threads(1)
    assert os.waitpid(_fit_by_two(config, train, folder / 'whole'), 0)[1] == 0
    child = _fit_by_two(config, train, folder / 'killed')
    while not utilities.saved_states(folder / 'killed/state'):
        time.sleep(.005)
    os.killpg(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (folder / 'killed/model.safetensors').exists()
    shutil.copytree(folder / 'killed', folder / 'alone')
    assert os.waitpid(_fit_by_two(config, train, folder / 'killed'), 0)[1] == 0


def test_two_processes_killed_go_on_bit_for_bit_and_one_goes_on_for_them_saying_what_differs(train, tmp_path, capsys):
    config = SAVING.override(epochs=2, augmentation='cutout')
    child = SPAWN.Process(target=_kill_two, args=(config, train, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 0 and same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))
    utilities.fit(config, new_model(), train, tmp_path / 'alone')
    said = capsys.readouterr().out
    assert 'saved by 2 processes and 1 go on: order and augmentation of the photographs stay the same; dropout' in said
    assert pd.read_csv(tmp_path / 'alone/log.csv')['step'].tolist() == list(range(1, 9))


@pytest.mark.parametrize('start', [0, 16, 48])
def test_the_photographs_of_a_step_are_the_same_on_any_number_of_processes(train, start):
    photos = utilities.Photos(train, 32)
    orders = []
    for processes in (1, 2, 4):
        parts = [[batch['index'].tolist() for batch in utilities.loader(
            photos, 16 // processes, train=True, epoch=1, start=start, rank=rank, processes=processes)]
            for rank in range(processes)]
        orders.append([sorted(sum(step, [])) for step in zip(*parts)])
    assert orders[0] == orders[1] == orders[2]


def test_a_state_is_saved_at_the_end_of_each_epoch(train, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(utilities, 'keep_state', lambda accelerator, folder, progress, *rest, **options: kept.append(
        (progress.step, progress.epoch, progress.used)) or True)
    utilities.fit(CONFIG, new_model(), train, tmp_path / 'run')  # save_minutes is 1000
    assert kept == [(4, 1, 0), (8, 2, 0), (12, 3, 0)]


# Disk

@pytest.fixture
def small_files():
    """No file can grow beyond some bytes, whoever writes it: the system refuses in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_during_a_save_leaves_the_older_state_and_the_run_goes_on(
        train, tmp_path, capsys, step_hook, small_files):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'whole')
    limits = {2: 300_000, 3: resource.RLIM_INFINITY}
    seen = {}

    def act(step):
        if step in limits:
            small_files(limits[step])
        seen[step] = sorted(path.name for path in (tmp_path / 'run/state').glob('*'))

    step_hook(act)
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert seen[3] == ['step-00000001'] and seen[4] == ['step-00000001', 'step-00000003']
    said = [line for line in capsys.readouterr().out.splitlines() if 'could not be saved' in line]
    assert len(said) == 1 and 'state after step 2 could not be saved' in said[0] and 'Free some space' in said[0]
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_a_full_disk_when_the_run_must_stop_is_an_error_and_the_older_state_goes_on(
        train, tmp_path, step_hook, small_files):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'whole')

    def act(step):
        if step == 3:
            small_files(300_000)
            os.kill(os.getpid(), signal.SIGINT)

    step_hook(act)
    with pytest.raises(OSError, match='state after step 3 could not be saved .* the one before is unchanged') as error:
        utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    small_files(resource.RLIM_INFINITY)
    assert one_sentence(error) or str(error.value).count('. ') == 1
    assert [state.name for state in utilities.saved_states(tmp_path / 'run/state')] == ['step-00000002', 'step-00000001']
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_a_disk_too_full_for_the_log_does_not_stop_the_run_and_no_row_is_lost(
        train, tmp_path, capsys, step_hook, small_files):
    frame, paths = broken(train, tmp_path, range(0, 72, 2))
    step_hook(lambda step: small_files({2: 60, 4: resource.RLIM_INFINITY}[step]) if step in (2, 4) else None)
    utilities.fit(SAVING, new_model(), frame, tmp_path / 'run')
    log = pd.read_csv(tmp_path / 'run/log.csv')
    assert log['step'].tolist() == [1, 2, 3, 4] and log.notna().all(axis=None)
    assert 'unreadable.txt cannot be written (File too large): free some space.' in capsys.readouterr().out
    assert (tmp_path / 'run/unreadable.txt').read_text().splitlines() == paths
    assert not list((tmp_path / 'run').glob('*.part'))


def test_two_states_are_kept_where_a_third_fits_else_one_and_never_none(train, tmp_path, monkeypatch, step_hook):
    seen, free = [], iter([10**12] * 3 + [1000] * 100)
    monkeypatch.setattr(utilities.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=next(free)))
    step_hook(lambda step: seen.append([state.name[-1] for state in utilities.saved_states(tmp_path / 'run/state')]))
    utilities.fit(SAVING.override(epochs=2), new_model(), train, tmp_path / 'run')
    assert seen[:6] == [[], ['1'], ['2', '1'], ['3'], ['4'], ['5']]


def test_a_state_that_is_damaged_is_not_what_is_kept_when_room_is_made(train, tmp_path, monkeypatch):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    newest, older = utilities.saved_states(tmp_path / 'run/state')
    (newest / 'optimizer.bin').write_bytes(b'')
    monkeypatch.setattr(utilities.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=0))
    utilities._make_room(tmp_path / 'run/state/unfinished')
    assert utilities.saved_states(tmp_path / 'run/state') == [older]


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.bin', 'random_states_0.pkl', 'position.json'])
def test_whichever_file_of_the_newest_state_is_cut_the_one_before_goes_on(train, tmp_path, capsys, file):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    expected = weights(tmp_path / 'run')
    newest = utilities.saved_states(tmp_path / 'run/state')[0]
    (newest / file).write_bytes((newest / file).read_bytes()[:-20])
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    said = capsys.readouterr().out
    assert f'{newest} cannot be read' in said and 'going on from step-00000003' in said
    assert same(expected, weights(tmp_path / 'run'))
    assert pd.read_csv(tmp_path / 'run/log.csv')['step'].tolist() == [1, 2, 3, 4]  # the lost step stands there once


def test_a_run_none_of_whose_states_can_be_read_does_not_begin_anew_unasked(train, tmp_path):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    for state in utilities.saved_states(tmp_path / 'run/state'):
        (state / 'optimizer.bin').write_bytes(b'garbage')
    with pytest.raises(ValueError, match='None of the states in .* delete this folder to start anew') as error:
        utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert one_sentence(error)


def test_a_folder_that_cannot_be_written_is_one_sentence(train, tmp_path):
    (tmp_path / 'file').write_text('')
    for place in (tmp_path / 'file/run', Path('/proc/run'), Path('/sys/run')):
        with pytest.raises(OSError, match=f'{place} cannot be written .* choose another OUT_DIR') as error:
            utilities.fit(SAVING, new_model(), train, place)
        assert one_sentence(error)


def test_photographs_in_a_read_only_folder_are_trained_on_and_nothing_is_written_there(tiny_world, tmp_path):
    shutil.copytree(tiny_world, tmp_path / 'data')
    folders = [tmp_path / 'data', *(path for path in (tmp_path / 'data').rglob('*') if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / 'data').rglob('*'))]
    frame = utilities.read_dataset(tmp_path / 'data/train.csv')
    utilities.fit(SAVING, new_model(), frame, tmp_path / 'run')
    utilities.embed(utilities.load_run(tmp_path / 'run'), frame.head(4))
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / 'data').rglob('*'))]
    for folder in folders:
        folder.chmod(0o755)


def test_a_second_process_is_refused_and_harms_nothing(train, tmp_path):
    first = train_in_a_child(SAVING.override(epochs=50), train, tmp_path / 'run')
    wait_for(lambda: (tmp_path / 'run/state').exists(), first)
    with pytest.raises(RuntimeError, match='Another run is writing into .*: wait for it, or give this one another') as error:
        utilities.fit(SAVING.override(epochs=50), new_model(), train, tmp_path / 'run')
    assert one_sentence(error) and first.is_alive()
    first.kill()
    first.join()


# Photographs and numbers

def broken(train, tmp_path, rows):
    """The frame with unreadable files in some rows, and their paths."""
    frame = train.copy()
    for row in rows:
        (tmp_path / f'broken{row:03d}.jpg').write_bytes(b'not a photograph')
        frame.loc[row, 'path'] = str(tmp_path / f'broken{row:03d}.jpg')
    return frame, sorted(frame.loc[list(rows), 'path'])


def test_unreadable_photographs_are_listed_at_each_state_and_over_sessions(train, tmp_path, step_hook):
    frame, paths = broken(train, tmp_path, range(0, 72, 9))
    step_hook(lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(utilities.Stopped):
        utilities.fit(SAVING.override(epochs=2), new_model(), frame, tmp_path / 'run')
    before = (tmp_path / 'run/unreadable.txt').read_text().splitlines()
    assert before and set(before) <= set(paths)
    utilities.fit(SAVING.override(epochs=2), new_model(), frame, tmp_path / 'run')
    after = (tmp_path / 'run/unreadable.txt').read_text().splitlines()
    assert set(before) <= set(after) and after == sorted(set(after)) and set(after) <= set(paths)


@pytest.mark.parametrize('workers', [0, 1])
def test_when_no_photograph_can_be_read_the_run_stops_early_and_lists_them(train, tmp_path, workers):
    frame, paths = broken(train, tmp_path, range(72))
    with pytest.raises(OSError, match='More than 9 photos .max_unreadable. cannot be read; the last') as error:
        utilities.fit(SAVING.override(max_unreadable=9, workers=workers), new_model(), frame, tmp_path / 'run')
    assert '\n' not in str(error.value)
    assert set((tmp_path / 'run/unreadable.txt').read_text().splitlines()) <= set(paths)
    listed = len((tmp_path / 'run/unreadable.txt').read_text().splitlines())
    # A worker reads ahead while the main process counts, so that it may have listed a few more by then.
    assert listed == 10 if workers == 0 else 10 <= listed < 72
    assert not (tmp_path / 'run/model.safetensors').exists()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_is_left_out_and_its_photographs_named(train, tmp_path, monkeypatch, capsys, value):
    loss, calls = utilities.arcface_loss, iter(range(100))
    monkeypatch.setattr(utilities, 'arcface_loss', lambda *arguments: loss(*arguments) * (
        value if next(calls) == 3 else 1))  # of the second step, the second batch
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    named = [line.split('\t') for line in (tmp_path / 'run/not_finite.txt').read_text().splitlines()]
    assert len(named) == 16 and {step for step, _ in named} == {'step 2'}
    order = np.random.default_rng([SAVING.seed, 0]).permutation(72)[16:32]
    assert [path for _, path in named] == train['path'].iloc[order].tolist()
    assert 'step 2: loss or gradient not finite, left out' in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / 'run').values())
    assert np.isnan(pd.read_csv(tmp_path / 'run/log.csv')['loss']).tolist() == [False, True, False, False]


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(train, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(100))

    def infinite_once(parameters, most):
        norm = clip(parameters, most)
        return norm * float('inf') if next(calls) == 1 else norm

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', infinite_once)
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 16


def test_more_skipped_steps_than_allowed_stop_the_run_and_the_last_state_stays(train, tmp_path, monkeypatch):
    loss, calls = utilities.arcface_loss, iter(range(100))
    monkeypatch.setattr(utilities, 'arcface_loss', lambda *arguments: loss(*arguments) * (
        float('nan') if next(calls) >= 2 else 1))
    with pytest.raises(FloatingPointError, match='not finite in 2 steps .max_skipped is 1.*not_finite.txt') as error:
        utilities.fit(SAVING.override(max_skipped=1), new_model(), train, tmp_path / 'run')
    assert one_sentence(error)
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 32
    monkeypatch.setattr(utilities, 'arcface_loss', loss)
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert (tmp_path / 'run/model.safetensors').exists()


def test_a_killed_worker_is_one_sentence_and_the_run_goes_on_from_its_last_state(train, tmp_path, step_hook):
    config = SAVING.override(workers=1, augmentation='cutout')
    utilities.fit(config, new_model(), train, tmp_path / 'whole')

    def children():
        return {int(child) for child in Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()}

    before = children()

    def kill_the_worker(step):
        if step == 3:
            worker, = children() - before
            os.kill(worker, signal.SIGKILL)
            signal.sigtimedwait([], 10)  # until the loader is told

    step_hook(kill_the_worker)
    with pytest.raises(utilities.Stopped, match='a data-loading process was killed.*workers lower.*its last state') as error:
        utilities.fit(config, new_model(), train, tmp_path / 'run')
    assert one_sentence(error)
    utilities.fit(config, new_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_the_stop_button_saves_the_step_and_leaves_a_usable_kernel(train, tmp_path, step_hook):
    config = SAVING.override(save_minutes=1000, augmentation='cutout')
    utilities.fit(config, new_model(), train, tmp_path / 'whole')
    handler = signal.getsignal(signal.SIGINT)
    step_hook(lambda step: step == 2 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(utilities.Stopped, match='interrupted after 2 of 4 steps; everything is saved') as error:
        utilities.fit(config, new_model(), train, tmp_path / 'run')
    assert one_sentence(error) and signal.getsignal(signal.SIGINT) is handler
    utilities.fit(config, new_model(), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))


def test_a_notebook_that_is_interrupted_while_it_trains_keeps_its_state_and_its_kernel(train, tmp_path):
    train.to_csv(tmp_path / 'train.csv', index=False)
    code = ("import sys; sys.path.insert(0, 'tests')\nimport pandas as pd, utilities\nfrom test_faults import *\n"
            f"frame = pd.read_csv('{tmp_path}/train.csv', dtype=str)\n"
            f"utilities.fit(CONFIG.override(epochs=10_000), new_model(), frame, '{tmp_path}/run')")
    manager, kernel = start_new_kernel(kernel_name='python3')
    try:
        request, log = kernel.execute(code), tmp_path / 'run/log.csv'
        while not (log.exists() and log.read_text().count('\n') > 2):
            while kernel.shell_channel.msg_ready():  # a late answer to start_new_kernel, or that the cell has failed
                message = kernel.get_shell_msg()
                assert message['parent_header']['msg_id'] != request, message['content']
            time.sleep(.05)
        manager.interrupt_kernel()
        reply = kernel._recv_reply(request, timeout=60)['content']
        assert reply['ename'] == 'Stopped' and 'everything is saved, run it again to go on.' in reply['evalue']
        assert kernel.execute_interactive('assert len(frame) == 72', timeout=60)['content']['status'] == 'ok'
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    assert utilities._is_whole(utilities.saved_states(tmp_path / 'run/state')[0])


def test_pressed_twice_the_stop_button_acts_at_once(train, tmp_path, step_hook):
    def press(step):
        for _ in range(2 * (step == 3)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)  # sooner, it is one press that arrived twice

    step_hook(press)
    with pytest.raises(KeyboardInterrupt):
        utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert [state.name for state in utilities.saved_states(tmp_path / 'run/state')] == ['step-00000002', 'step-00000001']


# An earlier session's output, attached

@pytest.mark.parametrize('place', ['', 'notebook', 'notebooks/someone/training'])
def test_a_state_in_an_attached_output_is_copied_and_continued(train, tmp_path, step_hook, capsys, place):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'whole')
    step_hook(lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    attached = tmp_path / 'input' / place
    with pytest.raises(utilities.Stopped):
        utilities.fit(SAVING, new_model(), train, attached / 'run')
    before = contents(tmp_path / 'input')
    utilities.fit(SAVING, new_model(), train, tmp_path / 'working/run', search=[tmp_path / 'absent', tmp_path / 'input'])
    said = capsys.readouterr().out
    assert f'run: {attached}/run/state/step-00000003 was copied here' in said and 'going on from step-00000003' in said
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'working/run')) and contents(tmp_path / 'input') == before
    assert pd.read_csv(tmp_path / 'working/run/log.csv')['step'].tolist() == [1, 2, 3, 4]


def test_an_attached_state_of_another_configuration_is_left_alone_and_said_so(train, tmp_path, capsys):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'input/run')
    utilities.fit(SAVING.override(seed=7), new_model(), train, tmp_path / 'run', search=[tmp_path / 'input'])
    said = capsys.readouterr().out
    assert 'has another configuration (seed: 5, now 7) and is left alone' in said and 'going on' not in said
    (tmp_path / 'input/run/config.json').unlink()
    utilities.fit(SAVING, new_model(), train, tmp_path / 'new/run', search=[tmp_path / 'input'])
    assert 'no configuration' in capsys.readouterr().out and (tmp_path / 'new/run/model.safetensors').exists()


def test_of_attached_states_the_newest_whole_one_is_taken(train, tmp_path, capsys):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'input/run')
    (tmp_path / 'input/run/state/step-00000004/optimizer.bin').write_bytes(b'')
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run', search=[tmp_path / 'input'])
    assert 'going on from step-00000003' in capsys.readouterr().out
    assert same(weights(tmp_path / 'input/run'), weights(tmp_path / 'run'))


# Strangers' files

class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('file', ['optimizer.bin', 'random_states_0.pkl', 'scheduler.bin', 'custom_checkpoint_0.pkl',
                                  'pytorch_model.bin'])
def test_a_state_that_would_run_code_does_not_run_it(train, tmp_path, file):
    utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    for state in utilities.saved_states(tmp_path / 'run/state'):
        torch.save({'state': Trap(tmp_path / 'trap')}, state / file)
        if file == 'pytorch_model.bin':
            (state / 'model.safetensors').unlink()
        position = json.loads((state / 'position.json').read_text())
        position['files'] = {path.name: path.stat().st_size for path in state.iterdir() if path.name != 'position.json'}
        (state / 'position.json').write_text(json.dumps(position))
    try:
        utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    except ValueError as error:
        assert 'None of the states' in str(error)
    assert not (tmp_path / 'trap').exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / 'trap')))
    assert (tmp_path / 'trap').exists()  # the trap does work


# Repeating

def test_the_digest_of_the_weights_is_printed_and_the_same_for_the_same_seed(train, tmp_path, capsys):
    said = []
    for name, seed in (('a', 5), ('b', 5), ('c', 6)):
        utilities.fit(SAVING.override(seed=seed), new_model(), train, tmp_path / name)
        line, = [line for line in capsys.readouterr().out.splitlines() if 'digest of the weights' in line]
        assert line == f'{name}: digest of the weights {utilities.state_digest(weights(tmp_path / name))}'
        said.append(line.split()[-1])
    assert said[0] == said[1] != said[2]
