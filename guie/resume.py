"""Resume: checkpoints of a run under way, which survive kills, full disks and new sessions."""
import errno
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from guie.config import Config, different_fields
from guie.distributed import any_process
from guie.errors import FileError, InputError, ProcessError
from guie.files import ATTACHED, attached_folders, reason_of, whole_file, write_text
from guie.splits import other_images, refuse_other_data, trained_on

BEST = 'best.safetensors'  # of a run under way; a finished one has model.safetensors
LOGGED = ['step', 'loss', 'lr', 'images/s', 'selection']  # columns of log.csv
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # of disks without locks, mostly on a network
OF_THE_DISK = re.compile('StreamWriter|inline_container|unexpected pos|open file failed|cannot be opened|Parent directory')


@dataclass
class Progress:
    """Where a run is, saved with its checkpoint."""
    step: int = 0       # optimiser steps made
    epoch: int = 0
    used: int = 0       # images of this epoch that all processes together have used
    best: float = -1.0  # best selection mP@5 so far
    data: str = ''      # describe(its images)
    skipped: int = 0    # steps left out because loss or gradient was not finite
    processes: int = 1  # that shared the work


@dataclass
class Run:
    """The parts of a run under way."""
    folder: Path
    config: Config
    accelerator: Accelerator
    model: nn.Module                # Embedder
    wrapped: nn.Module              # the model to call: a copy on each GPU, or parts of it
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler    # of fp16's gradients
    half: torch.dtype | None        # of autocast
    progress: Progress
    saved: tuple = (-1, 0.)         # (step, time) of the last checkpoint

    @property
    def main(self):
        """Whether this process writes the run's files."""
        return self.accelerator.is_main_process


@contextmanager
def run_lock(run_dir):
    """Refuses a second run in the same folder; the system frees the lock however the process ends."""
    # A soft lock, filelock's own answer to a disk without locks, would outlive a session that is killed.
    lock = FileLock(run_dir / '.lock', timeout=0, fallback_to_soft=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ProcessError(f'Another run is writing into {run_dir}: wait for it, or give this one another name.') from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, 'errno', errno.ENOSYS) not in NO_LOCKS:
            raise FileError(
                f'{run_dir} cannot be written or locked ({reason_of(error)}): choose another OUT_DIR.') from error
        print(f'{run_dir} is on a disk without locks: do not start a second run of this name.')
    try:
        yield
    finally:
        with suppress(OSError):  # a network drive may be gone
            lock.release()


class RunLog:
    """log.csv: step, loss, lr, images/s, selection (mP@5, empty where it was not scored), one row an optimiser step; rows
    after the restored step are dropped.
    Rows that a full disk refuses wait for the next step: a log is no reason to stop a run."""

    def __init__(self, run, restored):
        self.path, self.last, self.waiting = run.folder / 'log.csv', time.time(), ''
        there = restored and self.path.exists()
        rows = pd.read_csv(self.path).query(f'step <= {run.progress.step}') if there else pd.DataFrame()
        write_text(self.path, rows.reindex(columns=LOGGED).to_csv(index=False))  # an earlier version's had no selection

    def add(self, step, loss, lr, images, selection=None):
        """Appends a row -> {column: number or None}, but for the step."""
        now, size = time.time(), self.path.stat().st_size
        score, rate = '' if selection is None else f'{selection:.6f}', images / (now - self.last)
        self.waiting += f'{step},{loss:.6f},{lr:.4g},{rate:.1f},{score}\n'
        self.last = now
        try:
            with self.path.open('a') as file:
                file.write(self.waiting)
            self.waiting = ''
        except OSError:
            os.truncate(self.path, size)  # no half row
        return {'loss': loss, 'lr': lr, 'images/s': rate, 'selection': selection}


def save_checkpoint(run, required=False):
    """Saves everything needed to resume as <run>/state/step-<n>; the new one is complete before an older one goes.
    If the disk refuses, that is printed and the run continues with the older one in place: there may be space the next time.
    With `required` it is an OSError."""
    beside = run.folder / 'state' / 'unfinished'
    run.progress.processes = run.accelerator.num_processes
    for mine, act in ((run.main, partial(free_space, beside)), (True, partial(run.accelerator.save_state, beside)),
                      (run.main, partial(complete, run, beside))):
        problem = None
        try:
            if mine:
                act()
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = error
        if any_process(run.accelerator, problem is not None)[0]:
            if run.main:
                shutil.rmtree(beside, ignore_errors=True)
            if isinstance(problem, RuntimeError) and not OF_THE_DISK.search(str(problem)):  # torch's writer raises it too
                raise problem
            reason = reason_of(problem) if problem else 'in another process'
            sentence = (f'{beside.parent}: the state after step {run.progress.step} could not be saved ({reason}); the one '
                        f'before is unchanged. Free some space or choose another OUT_DIR.')
            if required:
                raise FileError(sentence) from problem
            return run.accelerator.print(sentence)
    run.saved = run.progress.step, time.time()


def saved_states(folder):
    """The states in a folder, newest first."""
    return sorted(folder.glob('step-*'), reverse=True)


def read_position(state):
    """A state's position.json: progress, schedule, scaler, files. OSError if a file is missing or truncated."""
    position = json.loads((state / 'position.json').read_text())
    for name, size in position['files'].items():
        if (state / name).stat().st_size != size:
            raise FileError(f'{name} is truncated')
    return position


def is_whole(state):
    """Whether a state has all of its files, in full length."""
    with suppress(OSError, ValueError, KeyError):
        return bool(read_position(state))
    return False


def free_space(beside):
    """Deletes what a killed save left and, where another state would not fit, all states but the newest whole one."""
    shutil.rmtree(beside, ignore_errors=True)
    whole = [state for state in saved_states(beside.parent) if is_whole(state)]
    if whole and shutil.disk_usage(beside.parent).free < sum(read_position(whole[0])['files'].values()):
        for old in saved_states(beside.parent):
            if old != whole[0]:
                shutil.rmtree(old)


def complete(run, beside):
    """Gives a saved state its position and its name, then deletes older ones: two stay where a third fits, else one."""
    sizes = {file.name: file.stat().st_size for file in sorted(beside.iterdir())}
    position = {'progress': asdict(run.progress), 'schedule': run.schedule.state_dict(), 'scaler': run.scaler.state_dict(),
                'files': sizes}
    write_text(beside / 'position.json', json.dumps(position, indent=1))
    target = beside.with_name(f'step-{run.progress.step:08d}')
    while target.exists():  # a damaged state of this step; + sorts after it
        target = target.with_name(target.name + '+')
    beside.replace(target)
    fits = shutil.disk_usage(beside.parent).free >= sum(sizes.values())
    for old in saved_states(beside.parent)[2 if fits else 1:]:
        shutil.rmtree(old)


def refuse_other_config(run_dir, config):
    """ValueError if a folder holds a run, begun or finished, of another configuration."""
    run_dir = Path(run_dir)
    saved, weights = run_dir / 'config.json', [run_dir / f'{name}.safetensors' for name in ('model', 'stage')]
    if saved.exists() and (saved_states(run_dir / 'state') or any(file.exists() for file in weights)):
        if difference := different_fields(Config.load(saved), config):
            raise InputError(f'{run_dir} holds a run with another configuration ({", ".join(difference)}): give this run '
                             f'another name as RUN, or delete that folder.')


def refuse_other_run(run_dir, config, data):
    """ValueError if a folder holds a run of another configuration, or of other images than `data`, a line of describe."""
    refuse_other_config(run_dir, config)
    refuse_other_data(run_dir, data)


def restore_state(run, steps):
    """Loads the newest state that can be read; True if there was one. A run of another configuration or data is an error.
    steps: of the whole run."""
    states = saved_states(run.folder / 'state')
    refuse_other_run(run.folder, run.config, run.progress.data)
    for state in states:
        problem = None
        try:
            position = read_position(state)
            run.accelerator.load_state(state)
            run.schedule.load_state_dict(position['schedule'])
            scaler = position.get('scaler')
            if (state / 'scaler.pt').exists():  # of an earlier version
                scaler = torch.load(state / 'scaler.pt', weights_only=True)
            if scaler and run.scaler.is_enabled():  # it may have had another precision
                run.scaler.load_state_dict(scaler)
        except Exception as error:  # a damaged file makes the readers raise almost anything
            problem = error
        if not any_process(run.accelerator, problem is not None)[0]:
            vars(run.progress).update(position['progress'])
            run.saved = run.progress.step, time.time()
            print_resumed(run, state, steps)
            return True
        run.accelerator.print(f'{state} cannot be read ({str(problem).splitlines()[0]}); trying the one before.')
    if states:  # the model may hold parts of them already
        raise InputError(f'None of the states in {run.folder / "state"} can be read: give this run another name as RUN, or '
                         f'delete this folder to start anew.')
    return False


def print_resumed(run, state, steps):
    """Prints where a run resumes, and what another number of processes changes."""
    progress, now = run.progress, run.accelerator.num_processes
    place = f'epoch {progress.epoch + 1}, {progress.used:,} of its images used'
    if progress.step >= steps:
        place = 'the last: nothing is left to train'
    run.accelerator.print(f'{run.folder.name}: resumes from {state.name}, {place}')
    if progress.processes != now:
        run.accelerator.print(f'The state was saved by {progress.processes} processes and {now} resume it: order and '
                              f'augmentation of the images stay the same; dropout and the order in which gradients are '
                              f'summed do not, so weights will differ slightly.')


def is_same_run(folder, saved, config, data):
    """Whether an attached folder is of a configuration and of images; prints what differs, else. saved: its own Config."""
    if difference := different_fields(saved, config):
        print(f'{folder} has another configuration ({", ".join(difference)}) and is left alone.')
    elif other_images(there := trained_on(folder), data):
        print(f'{folder} is of other images ({there}; now {data}) and is left alone.')
    else:
        return True
    return False


def copy_attached_state(run_dir, config, data, search=ATTACHED):
    """If the run has no state, copies its newest whole one, with log and weights, from an attached earlier output (as on
    Kaggle). Looks in folders of the run's name below those of `search`. Errors as in refuse_other_run."""
    folder = run_dir / 'state'
    if saved_states(folder):
        return
    refuse_other_run(run_dir, config, data)  # whose weights a copy would replace
    states = [state for place in map(Path, attached_folders(search)) if place.name == run_dir.name
              for state in saved_states(place / 'state')]
    for state in filter(is_whole, sorted(states, key=lambda state: state.name, reverse=True)):
        run = state.parent.parent
        try:
            saved = Config.load(run / 'config.json')
        except (OSError, ValueError) as error:
            print(f'{run} is left alone: {error}')
            continue
        if not is_same_run(run, saved, config, data):
            continue
        try:
            for name in ('config.json', 'log.csv', BEST, 'model.safetensors', 'unreadable.txt', 'not_finite.txt'):
                if (run / name).exists():
                    with whole_file(run_dir / name) as beside:
                        shutil.copyfile(run / name, beside)
            shutil.rmtree(folder / 'unfinished', ignore_errors=True)
            shutil.copytree(state, folder / 'unfinished', copy_function=shutil.copyfile)
            (folder / 'unfinished').replace(folder / state.name)
        except OSError as error:
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.__cause__ or error  # the first file's
            raise FileError(f'{state} could not be copied into {folder} ({reason}): free some space or choose another '
                            f'OUT_DIR.') from error
        return print(f'{run_dir.name}: {state} was copied here')
