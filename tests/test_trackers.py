"""Trackers: what TensorBoard shows is what log.csv holds, over sessions, and no tracker changes or stops a run."""
import pandas as pd
import pytest
from accelerate.tracking import get_available_trackers
from runs import SAVING, before_step, is_one_sentence, press_stop_before, same, small_model, weights

from guie.begin import begin_run
from guie.errors import Stopped
from guie.trackers import chosen_trackers
from guie.training import fit

pytest.importorskip('tensorboard', reason='tensorboard is not installed: trackers are untested')
TRACKED = SAVING.override(tracker='tensorboard')


def events_of(run):
    """{name: [events]} that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / 'guie')).Reload()
    return {name: events.Scalars(name) for name in events.Tags()['scalars']}


def steps_shown(run):
    """The steps whose loss TensorBoard shows."""
    return [event.step for event in events_of(run)['loss']]


def shown(run):
    """{name: {step: value}} that TensorBoard shows of a run."""
    return {name: {event.step: event.value for event in events} for name, events in events_of(run).items()}


def check_shown(run):
    """TensorBoard shows the numbers of log.csv, every step once."""
    log = pd.read_csv(run / 'log.csv', index_col='step')
    seen = shown(run)
    assert seen.keys() == {name for name in log if log[name].notna().any()}
    for name, values in seen.items():
        rounding = {'rel': 1e-2, 'abs': .06} if name == 'images/s' else {'rel': 1e-3}
        assert values == pytest.approx(log[name].dropna().to_dict(), **rounding), name


def test_tensorboard_shows_what_log_csv_holds_and_the_weights_are_those_of_a_run_without(train, tmp_path):
    scores = iter([.25, .5])
    for name, config in (('run', TRACKED), ('without', SAVING)):
        fit(config.override(validate_every=2), small_model(), train, tmp_path / name, lambda model: next(scores, .75))
    check_shown(tmp_path / 'run')
    assert shown(tmp_path / 'run')['selection'] == {2: .25, 4: .5} and steps_shown(tmp_path / 'run') == [1, 2, 3, 4]
    assert (pd.read_csv(tmp_path / 'run/log.csv')['loss'] == pd.read_csv(tmp_path / 'without/log.csv')['loss']).all()
    assert not (tmp_path / 'without/guie').exists()
    settings, = (tmp_path / 'run/guie').glob('*/hparams.yml')
    assert 'head_lr: 0.003' in settings.read_text()


def test_a_run_that_resumes_continues_its_steps_and_those_lost_with_their_state_are_gone(train, tmp_path, monkeypatch):
    fit(SAVING, small_model(), train, tmp_path / 'without')
    config = TRACKED.override(save_minutes=1000)  # no state but that of a stop

    def kill(step):
        if step == 2:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_step(patch, press_stop_before(2))
        fit(config, small_model(), train, tmp_path / 'run')
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        before_step(patch, kill)
        fit(config, small_model(), train, tmp_path / 'run')
    assert steps_shown(tmp_path / 'run') == [1, 2, 3]  # and the state is that after 2
    fit(config, small_model(), train, tmp_path / 'run')
    assert steps_shown(tmp_path / 'run') == [1, 2, 3, 4]
    check_shown(tmp_path / 'run')
    assert same(weights(tmp_path / 'without'), weights(tmp_path / 'run'))
    sessions = sorted((tmp_path / 'run/guie').iterdir())
    fit(config, small_model(), train, tmp_path / 'run')  # a finished run has nothing to show
    assert sorted((tmp_path / 'run/guie').iterdir()) == sessions


def test_the_tracker_may_differ_between_the_sessions_of_a_run(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_step(patch, press_stop_before(2))
        fit(SAVING, small_model(), train, tmp_path / 'run')
    fit(TRACKED, small_model(), train, tmp_path / 'run')
    assert steps_shown(tmp_path / 'run') == [3, 4]


@pytest.mark.parametrize('run', ['two', 'sharded'])
def test_of_two_processes_one_logs_and_they_stay_connected(launched, run):
    assert steps_shown(launched / run) == list(range(1, 13))
    check_shown(launched / run)
    assert (launched / 'half-sharded/model.safetensors').exists()  # what they trained afterwards


@pytest.mark.parametrize('names', ['tensorbord', 'tensorboard, mystery', 'mystery'])
def test_a_tracker_that_is_not_installed_is_one_sentence_before_anything_is_written(train, tmp_path, names):
    config = SAVING.override(tracker=names)
    calls = [lambda: fit(config, small_model(), train, tmp_path / 'run'),
             lambda: begin_run(config, 'tower', str(tmp_path / 'no data'), tmp_path / 'out')]
    for call in calls:
        with pytest.raises(ValueError, match='^Config.tracker is .* is not installed or unknown .*tensorboard') as error:
            call()
        assert is_one_sentence(error) or str(error.value).endswith('Did you mean tensorboard?')
    assert not list(tmp_path.iterdir())


def test_several_trackers_are_separated_by_commas_and_all_are_those_installed():
    assert chosen_trackers('') is None and chosen_trackers(' , ') is None
    assert chosen_trackers('tensorboard') == ['tensorboard'] and chosen_trackers('all') == ['all']
    assert chosen_trackers(','.join(map(str, get_available_trackers()))) == [*map(str, get_available_trackers())]


def test_a_tracker_that_does_not_start_is_one_sentence(train, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/guie').write_text('a file where its folder would be')
    with pytest.raises(ValueError, match="Config.tracker 'tensorboard' did not start .*: log in to it, or set") as error:
        fit(TRACKED, small_model(), train, tmp_path / 'run')
    assert is_one_sentence(error)


def test_a_tracker_that_fails_on_the_way_does_not_stop_the_run(train, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter
    add = SummaryWriter.add_scalar

    def refuse(self, name, value, global_step, **options):
        if global_step == 3:
            raise ConnectionError('the network is down')
        add(self, name, value, global_step, **options)

    monkeypatch.setattr(SummaryWriter, 'add_scalar', refuse)
    fit(TRACKED, small_model(), train, tmp_path / 'run')
    printed = capsys.readouterr().out
    assert printed.count('The tracker tensorboard failed at step 3 (the network is down)') == 1
    assert len(pd.read_csv(tmp_path / 'run/log.csv')) == 4 and steps_shown(tmp_path / 'run') == [1, 2]
