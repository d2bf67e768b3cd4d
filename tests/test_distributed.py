"""Several processes as one, and what can happen to them: proven on a CPU, where they talk by gloo."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from runs import CONFIG, apart, check_half, is_one_sentence, new_model, one_step, same, wait_for, weights

from guie import distributed, embedding, search
from guie.checkpoints import load_run, open_checkpoint
from guie.config import Config
from guie.distributed import (
    Stopped,
    autocast_dtype,
    best_device,
    end_launched,
    launch,
    processes_here,
    raise_launched_error,
    report_error,
    stop_requested,
    stop_signal,
)
from guie.embedding import embed
from guie.recipes import train as train_run
from guie.resume import is_whole, read_position, saved_states
from guie.splits import Splits
from guie.training import fit

# Two processes are one

def test_two_processes_train_the_weights_that_one_does(launched, train):
    one, two = weights(launched / 'one'), weights(launched / 'two')
    assert set(one) == set(two) and not same(one, new_model().state_dict())
    # 12 steps of AdamW, which brings noise up to the learning rate where gradients vanish: about 1e-5 was measured
    assert apart(one, two) < 1e-4
    vectors = [embed(load_run(launched / name), train) for name in ('one', 'two')]
    assert np.allclose(*vectors, atol=1e-5)
    logs = [pd.read_csv(launched / name / 'log.csv') for name in ('one', 'two')]
    assert np.allclose(logs[0]['loss'], logs[1]['loss'], atol=1e-3) and logs[0]['step'].equals(logs[1]['step'])
    scores = [json.loads(open_checkpoint(launched / name).metadata['score']) for name in ('one', 'two')]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] > 0


def test_an_sgd_step_of_two_processes_is_that_of_one(launched, train):
    one = one_step(train, CONFIG.override(max_grad_norm=1e9), lr=.1).state_dict()  # a clipped gradient would hide its scale
    both = [torch.load(launched / f'step{rank}.pt') for rank in range(2)]
    assert not same(one, new_model().state_dict()) and same(*both)
    assert all(torch.allclose(one[name], both[0][name], atol=1e-6, rtol=0) for name in one)


def test_a_gradient_too_large_for_fp16_lowers_the_scale_of_both_processes(launched):
    seen = [pd.read_csv(launched / f'half/seen{rank}.csv') for rank in range(2)]
    check_half(seen[0], launched / 'half')
    assert seen[0].equals(seen[1])


# Killed, stopped and abandoned

CUT = CONFIG.override(batch_size=4, epochs=8, save_minutes=0, augmentation='cutout', workers=0)  # 32 steps
PATIENT = {'save_minutes': 1000}  # nothing is saved but at the end of an epoch, and when it must be
NOTEBOOK = '''from guie.config import Config
from guie.recipes import train
from guie.splits import Splits
train(Config.load('{0}/config.json'), Splits.load('{0}/splits.csv'), '{0}/run', processes=2)
'''


def ranks(parent):
    """The two processes that a launcher below a process started, by rank."""
    found = {}
    for child in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error, KeyError):  # what another test has left
            if '-u' in child.cmdline():
                found[int(child.environ()['RANK'])] = child
    return [found[rank] for rank in (0, 1)]


def after_steps(run, count, act, alive=lambda: True):
    """Begins a thread that calls act() once `count` more steps of a run are in its log -> the thread."""
    def rows():
        return (run / 'log.csv').read_text().count('\n') if (run / 'log.csv').exists() else 1

    before = rows()
    thread = threading.Thread(target=lambda: (wait_for(lambda: rows() >= before + count, alive), act()), daemon=True)
    thread.start()
    return thread


def newest_step(run):
    """The step of a run's newest state, which must be whole."""
    newest = saved_states(run / 'state')[0]
    assert is_whole(newest)
    return int(newest.name.removeprefix('step-'))


@pytest.fixture(scope='module')
def troubled(tiny_world, tmp_path_factory):
    """A run of two processes of which one is killed, that is then stopped, then loses its notebook, then finishes."""
    folder = tmp_path_factory.mktemp('troubled')
    run, seen = folder / 'run', SimpleNamespace(folder=folder)
    splits = Splits(train=pd.read_csv(tiny_world / 'train.csv').assign(
        path=lambda frame: [str(tiny_world / path) for path in frame['path']], domain=''))
    with redirect_stdout(io.StringIO()) as output:
        train_run(CUT, splits, folder / 'whole', processes=2)

        after_steps(run, 2, lambda: ranks(os.getpid())[1].kill())
        with pytest.raises(RuntimeError) as seen.killed:
            train_run(CUT, splits, run, processes=2)
        seen.step_killed = newest_step(run)

        handler = signal.getsignal(signal.SIGINT)
        after_steps(run, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped) as seen.stopped:
            train_run(CUT.override(**PATIENT), splits, run, processes=2)
        seen.handler_is_back = signal.getsignal(signal.SIGINT) is handler
        seen.step_stopped, seen.files_stopped = newest_step(run), {path.name for path in run.iterdir()}

        splits.save(folder / 'splits.csv')
        CUT.override(**PATIENT).save(folder / 'config.json')
        notebook = subprocess.Popen([sys.executable, '-c', NOTEBOOK.format(folder)], stdout=subprocess.PIPE)
        after_steps(run, 2, lambda: None, lambda: notebook.poll() is None).join()
        working = ranks(notebook.pid)
        notebook.kill()
        notebook.wait()
        seen.working, (_, seen.left) = len(working), psutil.wait_procs(working, timeout=60)
        seen.step_abandoned, seen.step_logged = newest_step(run), pd.read_csv(run / 'log.csv')['step'].max()

        shutil.copytree(run, folder / 'alone')
        train_run(CUT, splits, run, processes=2)
    seen.output = output.getvalue()
    return seen


def test_a_killed_process_is_one_sentence_and_does_not_leave_the_others_waiting(troubled):
    assert 'One of 2 processes was killed, most likely because memory ran out' in str(troubled.killed.value)
    assert is_one_sentence(troubled.killed) and troubled.step_killed >= 1


def test_the_stop_button_reaches_launched_processes_and_everything_is_saved(troubled):
    step = troubled.step_stopped
    assert str(troubled.stopped.value) == (f'run: it was interrupted after {step} of 32 steps; everything is saved, run it '
                                           f'again to resume.')
    assert troubled.step_killed + 2 <= step < 32 and troubled.handler_is_back
    assert 'stop' not in troubled.files_stopped  # else the next run would end there


def test_launched_processes_save_and_end_when_their_notebook_is_killed(troubled):
    assert troubled.working == 2 and troubled.left == []
    assert troubled.step_stopped + 2 <= troubled.step_abandoned == troubled.step_logged < 32


def test_two_processes_killed_stopped_and_abandoned_resume_bit_for_bit(troubled):
    folder = troubled.folder
    assert same(weights(folder / 'whole'), weights(folder / 'run'))
    assert pd.read_csv(folder / 'run/log.csv')['step'].tolist() == list(range(1, 33))
    resumed = [line.partition(',')[0] for line in troubled.output.splitlines() if 'resumes from' in line]
    assert resumed == [f'run: resumes from step-{step:08d}' for step in (troubled.step_killed, troubled.step_abandoned)]
    assert troubled.output.count('run: hash of the weights') == 1  # one process prints


def test_one_process_resumes_for_two_saying_what_differs(troubled, tmp_path, capsys):
    frame = Splits.load(troubled.folder / 'splits.csv')['train']
    shutil.copytree(troubled.folder / 'alone', tmp_path / 'alone')
    (tmp_path / 'alone/stop').touch()  # that a kill left; only launched processes look for it
    fit(CUT.override(batch_size=8), new_model(), frame, tmp_path / 'alone')
    printed = capsys.readouterr().out
    assert 'saved by 2 processes and 1 resume it: order and augmentation of the images stay the same; dropout' in printed
    assert pd.read_csv(tmp_path / 'alone/log.csv')['step'].tolist() == list(range(1, 33))
    assert read_position(saved_states(tmp_path / 'alone/state')[0])['progress']['processes'] == 1


# What a launch ends in

def test_what_a_launched_process_raises_arrives_as_itself_and_every_process_is_launched_once(tmp_path, capsys):
    (tmp_path / 'task').write_text('refuse')
    (tmp_path / 'error.json').write_text('["OSError", "of the run before"]')
    (tmp_path / 'stop').touch()
    with pytest.raises(ValueError, match=r'^The words of process [01]\.$') as error:
        launch('tests.launched', tmp_path, 2)
    assert is_one_sentence(error) and len(list(tmp_path.glob('process *'))) == 2 and not (tmp_path / 'stop').exists()
    printed = capsys.readouterr().out
    assert [printed.count(f'process {rank} of 2 prints ü\n') for rank in (0, 1)] == [300, 300]  # gloo may print beside them


def test_what_the_launcher_refuses_is_told_in_its_own_words(tmp_path):
    with pytest.raises(RuntimeError, match='^2 processes could not be started or ended early: .*named tests.none') as error:
        launch('tests.none', tmp_path, 2)
    assert '\n' not in str(error.value)


FAILED = '''  File "api.py", line 386, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : {0} (pid: 11741)
'''
LOST = '["RuntimeError", "RuntimeError: [pair.cc:561] Connection closed by peer [127.0.0.1]:32931."]'


@pytest.mark.parametrize('left, complaints, kind, words', [
    ('["MemoryFull", "The GPU is full."]', FAILED.format('1'), MemoryError, 'The GPU is full.'),
    ('["RuntimeError", "KeyError: 5"]', FAILED.format('1'), RuntimeError, 'KeyError: 5'),
    ('', FAILED.format('-9'), RuntimeError, 'One of 2 processes was killed, most likely because memory ran out'),
    ('', FAILED.format('-9') + FAILED.format('-6'), RuntimeError, 'One of 2 processes was killed, most likely'),
    (LOST, FAILED.format('-15') + FAILED.format('-9'), RuntimeError, 'One of 2 processes was killed, most likely'),
    ('', 'forcefully exiting via SIGKILL\n' + FAILED.format('-9') + 'ImportError: none\n' + FAILED.format('1'), RuntimeError,
     '2 processes could not be started or ended early: ImportError: none'),  # the launcher killed the other
    ('', FAILED.format('-15') + 'what():  CUDA error\nc10.Error: lost\n' + FAILED.format('-6'), RuntimeError,
     'One of 2 processes was killed by SIGABRT (c10.Error: lost): run this cell again'),
    (LOST, FAILED.format('-11'), RuntimeError, 'One of 2 processes was killed by SIGSEGV'),
    ('', FAILED.format('-7'), RuntimeError, 'One of 2 processes was killed by SIGBUS'),
    (LOST, 'ConnectionError: Connection reset by peer\nOSError: no port\n' + FAILED.format('1'), RuntimeError,
     '2 processes could not be started or ended early: OSError: no port'),
    (LOST, '', RuntimeError, '2 processes could not be started or ended early: RuntimeError: [pair.cc:561] Connection'),
    ('["InputEr', 'SystemExit: none\nValueError: a full disk cut the report', RuntimeError,
     '2 processes could not be started or ended early: ValueError: a full disk cut the report'),
    ('', '[rank1]: Traceback (most recent call last):\n[rank1]:   File "x", line 1, in <module>\n[rank1]: Odd: words\n',
     RuntimeError, '2 processes could not be started or ended early: Odd: words'),
    ('', 'Traceback (most recent call last):\n  File "x", line 1, in f\n    assert False\nAssertionError\n', RuntimeError,
     '2 processes could not be started or ended early: AssertionError'),
    ('', '/usr/bin/python: No module named accelerate\n', RuntimeError,
     '2 processes could not be started or ended early: /usr/bin/python: No module named accelerate'),
    ('', '/a.py:3: UserWarning: old\n  Traceback\nImportError: no bitsandbytes\n' + FAILED.format('1'), RuntimeError,
     '2 processes could not be started or ended early: ImportError: no bitsandbytes'),
    ('', 'usage: accelerate\naccelerate: error: unrecognized arguments: --x', RuntimeError,
     '2 processes could not be started or ended early: accelerate: error: unrecognized arguments: --x'),
    ('', '', RuntimeError, '2 processes could not be started or ended early: ')])
def test_the_first_reason_is_what_is_raised(tmp_path, left, complaints, kind, words):
    if left:
        (tmp_path / 'error.json').write_text(left)
    with pytest.raises(kind) as error:
        raise_launched_error(tmp_path, 1, complaints, 2)
    assert isinstance(error.value, kind) and str(error.value).startswith(words) and '\n' not in str(error.value)


DEATHS = {  # what a process does, what the notebook is told
    'import no_such_thing': 'ended early: ModuleNotFoundError: No module named .no_such_thing',
    'assert False': 'ended early: AssertionError', 'import os; os.abort()': 'One of 2 processes was killed by SIGABRT',
    'import os; os._exit(3)': 'exitcode: 3',
    'import os; os.kill(os.getpid(), 9)': 'One of 2 processes was killed, most likely because memory ran out'}


@pytest.mark.parametrize('death', DEATHS)
def test_how_a_process_really_ends_is_what_is_told(tmp_path, monkeypatch, death):
    (tmp_path / 'dying.py').write_text(f'import os, time\nif os.environ["RANK"] == "1":\n    {death}\ntime.sleep(60)\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    with pytest.raises(RuntimeError, match=DEATHS[death]) as error:
        launch('dying', tmp_path, 2)
    assert '\n' not in str(error.value)


def test_a_launcher_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, 'Cannot allocate memory')

    monkeypatch.setattr(distributed.subprocess, 'Popen', refuse)
    with pytest.raises(RuntimeError, match='^2 processes could not be started: Cannot allocate memory.$'):
        launch('tests.launched', tmp_path, 2)


def test_processes_that_end_well_raise_nothing(tmp_path):
    raise_launched_error(tmp_path, 0, 'ImportError: a warning of some library', 2)
    (tmp_path / 'error.json').write_text('["ProcessError", "Another run is writing."]')  # one that was refused meanwhile
    raise_launched_error(tmp_path, 0, '', 2)


@pytest.mark.parametrize('raised, kept', [(Stopped('run: stopped.'), ['Stopped', 'run: stopped.']),
                                          (KeyError('x'), ['KeyError', "KeyError: 'x'"]),
                                          (RuntimeError('CUDA:\n odd'), ['RuntimeError', 'RuntimeError: CUDA: odd']),
                                          (KeyboardInterrupt(), ['KeyboardInterrupt', ''])])
def test_the_first_error_of_all_processes_is_kept_and_each_is_printed(tmp_path, raised, kept):
    def work():
        raise raised

    for error, words in ((work, kept[1]), (lambda: [][0], 'IndexError: list index out of range')):
        with pytest.raises(SystemExit) as ended:
            report_error(tmp_path, error)
        assert ended.value.code == words  # printed, and the exit code is 1
    assert json.loads((tmp_path / 'error.json').read_text()) == kept


# The stop button

@pytest.fixture
def sleepers(monkeypatch):
    """Instead of launched processes, a launcher and its process, in a session of its own, that do nothing; their list."""
    code, started, popen = ('import subprocess; subprocess.Popen(["sleep", "60"], start_new_session=True).wait()', [],
                            subprocess.Popen)

    def start(command, **options):
        child = popen([sys.executable, '-c', code], **options)
        wait_for(lambda: psutil.Process(child.pid).children())
        started.extend([psutil.Process(child.pid), *psutil.Process(child.pid).children()])
        return child

    monkeypatch.setattr(distributed.subprocess, 'Popen', start)
    return started


@pytest.mark.parametrize('stops, presses', [(True, 2), (False, 1)])
def test_pressed_twice_the_stop_button_ends_launched_processes_and_once_those_that_never_look(
        tmp_path, request, sleepers, stops, presses):
    def press():
        for _ in range(presses):
            time.sleep(2)  # within one second it is one press that arrived twice
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Thread(target=lambda: (wait_for(lambda: sleepers), press()), daemon=True).start()
    started = time.time()
    with pytest.raises(KeyboardInterrupt):
        launch('tests.launched', tmp_path, 2, stops=stops)
    assert time.time() - started > 2 * presses and len(sleepers) == 2
    assert psutil.wait_procs(sleepers, timeout=10)[1] == [] and list(tmp_path.iterdir()) == []


def test_processes_that_ended_by_themselves_are_left_alone():
    child = subprocess.Popen(['true'])
    child.wait()
    end_launched(child)


def test_one_press_that_arrives_twice_is_one_and_the_handler_comes_back():
    handler, acted = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), stop_signal(lambda: acted.append(1)) as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed and acted
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail('the second press did nothing')
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_thread_other_than_the_main_one_takes_no_signals():
    seen = []

    def work():
        with stop_signal() as pressed:
            seen.append(pressed)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_a_launched_process_is_asked_to_stop_by_a_file_or_by_the_end_of_its_notebook(tmp_path, monkeypatch):
    notebook = subprocess.Popen(['sleep', '60'])
    monkeypatch.setenv('GUIE_NOTEBOOK', str(notebook.pid))
    assert not stop_requested(tmp_path)
    (tmp_path / 'stop').touch()
    assert stop_requested(tmp_path)
    (tmp_path / 'stop').unlink()
    notebook.kill()
    wait_for(lambda: psutil.Process(notebook.pid).status() == psutil.STATUS_ZOMBIE)
    assert stop_requested(tmp_path)  # nobody has asked yet how it ended
    notebook.wait()
    assert stop_requested(tmp_path)
    monkeypatch.delenv('GUIE_NOTEBOOK')
    assert not stop_requested(tmp_path)


@pytest.mark.parametrize('launched', [True, False])
def test_a_process_that_embeds_ends_with_the_notebook_that_launched_it_and_else_goes_on(tmp_path, launched):
    notebook = subprocess.Popen(['sleep', '60'])
    code = (f"import time; from guie.distributed import end_with_notebook; end_with_notebook(); "
            f"open('{tmp_path}/begun', 'w'); time.sleep({60 if launched else 2.5})")
    child = subprocess.Popen([sys.executable, '-c', code], env=os.environ | (
        {'GUIE_NOTEBOOK': str(notebook.pid)} if launched else {}))
    wait_for((tmp_path / 'begun').exists)
    assert child.poll() is None
    notebook.kill()
    notebook.wait()
    assert child.wait(timeout=30) == int(launched)


@pytest.mark.parametrize('module, given', [(embedding, 1), (search, 2)])
def test_processes_that_embed_watch_their_notebook_before_anything_else(tmp_path, monkeypatch, module, given):
    monkeypatch.setattr(module, 'end_with_notebook', lambda: pytest.fail('watched'))
    with pytest.raises(pytest.fail.Exception, match='watched'):
        module.main(*[tmp_path] * given)


# Devices

def test_as_many_processes_work_as_there_are_gpus_and_one_within_a_launched_process(monkeypatch):
    assert processes_here() == max(1, torch.cuda.device_count())
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert processes_here() == 2
    monkeypatch.setattr(distributed, 'rank_and_world_size', lambda: (1, 2))
    assert processes_here() == 1


def test_a_gpu_without_kernels_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla P100-PCIE-16GB')
    monkeypatch.setattr(torch, 'ones', refuse)
    with pytest.raises(RuntimeError, match=r'^PyTorch \S+ cannot use the Tesla P100-PCIE-16GB .*no kernel image.*"GPU T4 x2"'
                       ) as error:
        best_device()
    assert is_one_sentence(error)


@pytest.mark.parametrize('precision, capability, dtype', [
    ('auto', None, None), ('auto', (7, 5), torch.float16), ('auto', (8, 0), torch.bfloat16), ('no', (8, 0), None),
    ('fp16', None, torch.float16), ('bf16', None, torch.bfloat16)])
def test_the_precision_is_that_of_the_configuration_or_what_the_gpu_has(monkeypatch, precision, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    assert autocast_dtype(Config(precision=precision).precision) == dtype
