"""One or several GPUs: device, rank and precision of a process; launching several; a stop that waits for the step's end.
Launched processes share a folder with the notebook. Files in it say that stop was pressed, and what went wrong."""
import codecs
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from guie.errors import Diverged, FileError, InputError, MemoryFull, MissingError, ProcessError, Stopped
from guie.files import OutputOfOthers, reason_of

KINDS = Stopped, InputError, MissingError, FileError, MemoryFull, Diverged, ProcessError, KeyboardInterrupt
ERRORS = {kind.__name__: kind for kind in KINDS}
LOST = re.compile('Connection (reset|closed) by peer|remote process exited')  # what a process prints when another is gone
WORDS = re.compile(r'([\w.]+(Error|Exception)(: |$))|.* error: |.*: No module named ')  # how printed errors begin


def best_device():
    """This process's GPU, or the CPU. RuntimeError for a GPU that this PyTorch was not built for."""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    rank_and_world_size()  # makes its GPU PyTorch's own: the first one, else, would hold a context of every process
    try:
        torch.ones(1, device='cuda').add_(1)
    except RuntimeError as error:
        raise ProcessError(f'PyTorch {torch.__version__} cannot use the {torch.cuda.get_device_name()} ({error}): choose '
                           f'another accelerator, on Kaggle "GPU T4 x2" instead of "GPU P100".') from error
    return torch.device('cuda')


def autocast_dtype(precision):
    """torch.float16, torch.bfloat16 or None (float32) for Config.precision; 'auto' asks the device."""
    if precision != 'auto':
        return {'fp16': torch.float16, 'bf16': torch.bfloat16, 'no': None}[precision]
    if not torch.cuda.is_available():
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def rank_and_world_size():
    """(rank, processes) of a launched process; (0, 1) of any other."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return 0, 1
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def take_place():
    """(rank, processes) of a launched process that works alone, waiting for no other; its GPU becomes PyTorch's own."""
    rank, processes, gpu = (int(os.environ.pop(name, 0)) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    return rank, max(1, processes)


def processes_here():
    """How many processes to use: one a GPU, at least one. A launched process uses one, itself."""
    return 1 if rank_and_world_size()[1] > 1 else max(1, torch.cuda.device_count())


def any_process(accelerator, *flags):
    """Each flag, true if any process has it: clocks differ, but all must save or stop at the same step."""
    if accelerator.num_processes == 1:
        return flags
    total = accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=accelerator.device), 'sum')
    return tuple(value > 0 for value in total.tolist())


@contextmanager
def stop_signal(act=lambda: None):
    """Yields a list that the first Ctrl-C, or press of a notebook's stop button, fills, so that the current step can end;
    act() is called then. The second press interrupts."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in that thread alone
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_):
        if pressed and time.time() - pressed[0] > 1:  # one press may arrive twice
            raise KeyboardInterrupt
        pressed.append(time.time())
        act()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def stop_requested(folder):
    """In a launched process: whether the notebook asks to stop, or is gone. Elsewhere False."""
    return 'GUIE_NOTEBOOK' in os.environ and (Path(folder, 'stop').exists() or notebook_gone())


def notebook_gone():
    """In a launched process: whether the notebook that launched it has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int(os.environ['GUIE_NOTEBOOK'])).status() == psutil.STATUS_ZOMBIE
    return True


def end_with_notebook():
    """In a launched process that has nothing to save at its end: ends it when the notebook that launched it is gone, as when
    its kernel was restarted."""
    def watch():
        while not notebook_gone():
            time.sleep(1)
        os._exit(1)

    if 'GUIE_NOTEBOOK' in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def launch(module, folder, processes, *more, stops=True):
    """Runs `python -m module folder *more` in several processes by accelerate launch, and prints what they print. Their
    output goes through files, since a pipe would break when the notebook is killed, before they have saved.
    The stop button asks them to stop after the current step; a second press kills them. stops=False: for a module that never
    asks stop_requested; the first press kills it. An error in one of them is raised here as itself; RuntimeError if they
    could not start or were killed."""
    folder = Path(folder).absolute()
    for name in ('stop', 'error.json'):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(processes),
               '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0',
               '-m', module, str(folder), *map(str, more)]
    home = f'{Path(__file__).resolve().parents[1]}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    environment = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // processes)), **os.environ, 'PYTHONPATH': home,
                   'GUIE_NOTEBOOK': str(os.getpid())}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints, \
            stop_signal((folder / 'stop').touch) if stops else nullcontext():
        # In a session of its own: the stop button signals the notebook's group, and a file passes that on.
        try:
            child = subprocess.Popen(command, stdout=output, stderr=complaints, env=environment, start_new_session=True)
        except OSError as error:
            raise ProcessError(f'{processes} processes could not be started: {reason_of(error)}.') from error
        try:
            print_output(output, child)
        finally:
            with stop_signal():  # a press that arrives twice shall not interrupt this
                end_launched(child)
            (folder / 'stop').unlink(missing_ok=True)
        complaints.seek(0)
        raise_launched_error(folder, child.returncode, complaints.read().decode(errors='replace'), processes)


def print_output(file, child):
    """Prints what a running process writes into a file, until it ends."""
    decoder, place, running, shown = codecs.getincrementaldecoder('utf-8')('replace'), 0, True, OutputOfOthers()
    while running:
        running = child.poll() is None
        while block := os.pread(file.fileno(), 65_536, place):
            place += len(block)
            shown.write(decoder.decode(block))
        time.sleep(.1 * running)


def end_launched(child):
    """Kills a launcher that still runs, and its processes, which are in sessions of their own."""
    if child.poll() is None:
        launcher = psutil.Process(child.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        child.wait()


def raise_launched_error(folder, returncode, complaints, processes):
    """Raises the error in error.json, or else what the launched processes or their launcher printed as one."""
    if not returncode:  # what is there may be of another launch in this folder, which was refused
        return
    name = message = ''
    with suppress(FileNotFoundError, ValueError):  # a full disk leaves half of it
        name, message = json.loads((folder / 'error.json').read_text())
    if name and not LOST.search(message):
        raise ERRORS.get(name, ProcessError)(message)
    codes = [returncode, *map(int, re.findall(r'exitcode *: (-?\d+)', complaints))]  # the last one ended first
    of_launcher = 'via SIGKILL' in complaints  # it killed those that would not end
    if codes[-1] == -signal.SIGKILL or -signal.SIGKILL in codes and not of_launcher:  # others may abort when one is killed
        raise ProcessError(f'One of {processes} processes was killed, most likely because memory ran out: lower workers or '
                           f'batch_size and run this cell again; a run resumes from its last state.')
    reason = first_reason(complaints) or message
    if codes[-1] >= 0:
        raise ProcessError(f'{processes} processes could not be started or ended early: {reason}')
    raise ProcessError(f'One of {processes} processes was killed by {signal.Signals(-codes[-1]).name} ({reason}): run this '
                       f'cell again; a run resumes from its last state.')


def first_reason(complaints):
    """The first printed line that says why processes ended, or else their first line.
    It follows the indented lines of a traceback, or looks like an error. That another process is gone is no reason."""
    lines = (re.sub(r'^\[rank\d+\]: ?', '', line).rstrip() for line in complaints.splitlines() if 'Warning' not in line)
    lines = [*filter(None, lines)]
    told = [line for before, line in zip(['', *lines], lines)
            if WORDS.match(line) or before.startswith(('    ', '  File "')) and not line.startswith((' ', 'Traceback'))]
    empty = re.compile(f'ChildFailed|closing signal|{LOST.pattern}')
    return next((line[:500] for line in told + lines if not empty.search(line)), '')


def report_error(folder, work):
    """In a launched process: runs work(); the first error of all processes is left in folder/error.json. folder: None where
    the command names none."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A line in one write, since the processes share a file: the launcher starts python -u, whose print makes two.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        name = type(error).__name__
        message = str(error) if name in ERRORS else f'{name}: {" ".join(str(error).split())[:500]}'
        if folder is not None:
            with suppress(OSError), open(Path(folder) / 'error.json', 'x') as file:  # the others fail as this one is gone
                json.dump([name, message], file)
        raise SystemExit(message) from None
    if torch.distributed.is_initialized():
        if torch.distributed.get_backend() == 'nccl':
            return torch.distributed.destroy_process_group()  # else it warns
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo, of the CPU: destroying it may hang (PyTorch 2.6), and its threads may abort Python's own end
