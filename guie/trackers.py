"""Trackers: a run's losses and scores in TensorBoard, Weights & Biases, MLflow or another of accelerate's trackers."""
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from accelerate.tracking import get_available_trackers

from guie.errors import InputError
from guie.files import did_you_mean, reason_of

PROJECT = 'guie'  # W&B's project, MLflow's experiment, TensorBoard's folder in that of the run


def chosen_trackers(names):
    """The names in Config.tracker as a list, for accelerate's log_with; None for ''.
    names: separated by commas, or 'all'. ValueError for a tracker that is unknown to accelerate or not installed."""
    chosen = [name.strip() for name in names.split(',') if name.strip()]
    installed = sorted(map(str, get_available_trackers()))
    for name in chosen:
        if name not in installed and (name != 'all' or not installed):
            raise InputError(f"Config.tracker is {names!r}, and {name!r} is not installed or unknown to accelerate: install "
                             f"it, or choose among those that are ({', '.join(installed) or 'none'}), or ''."
                             f'{did_you_mean(name, installed)}')
    return chosen or None


@contextmanager
def trackers(run, steps):
    """While a Run trains, the trackers of its main process are open and know its settings; not if all `steps` are made.
    Each session is a run of its own for W&B and MLflow; TensorBoard joins them. ValueError, in one sentence, if a tracker
    cannot start, as without a login."""
    if not run.main or not run.accelerator.log_with or run.progress.step >= steps:
        yield
        return
    settings = {name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in asdict(run.config).items()}
    options = {'tensorboard': {'purge_step': run.progress.step + 1},  # hides what a killed session logged after its state
               'wandb': {'name': run.folder.name, 'dir': str(run.folder)}, 'mlflow': {'run_name': run.folder.name}}
    try:
        run.accelerator.init_trackers(PROJECT, settings, options)
    except Exception as error:  # every tracker has errors of its own
        raise InputError(f'A tracker of Config.tracker {run.config.tracker!r} did not start ({reason_of(error)}): log in to '
                         f'it, or set tracker to "".') from error
    try:
        yield
    finally:
        for tracker in [*run.accelerator.trackers]:
            attempt(run, tracker, tracker.finish)  # accelerate's end_training would part the processes too


def track(run, values):
    """Logs {name: number or None} at the current step, Nones left out."""
    values = {name: value for name, value in values.items() if value is not None}
    for tracker in [*run.accelerator.trackers]:
        attempt(run, tracker, partial(tracker.log, values, step=run.progress.step))


def attempt(run, tracker, act):
    """Calls act(); a tracker that fails is printed and left out from then on: it is no reason to stop a run."""
    try:
        act()
    except Exception as error:  # every tracker has errors of its own
        run.accelerator.trackers.remove(tracker)
        print(f'The tracker {tracker.name} failed at step {run.progress.step} ({reason_of(error)}) and gets nothing more of '
              f'this session; log.csv has every step.')
