"""Stages and recipes: what each trains, that stages go on where they were stopped, towers at other sizes, distillation."""
import importlib
import math
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import demo
import utilities
from tests.test_gpus import in_a_child, without_dropout
from tests.test_training import same, weights

CONFIG = utilities.Config(**demo.settings({'image_size': 32})).override(
    batch_size=8, effective_batch=16, epochs=1, warmup_steps=1, embedding_dim=32, save_minutes=1000)
STAGED = CONFIG.override(stages=({'trains': 'head'}, {'trains': 'last 2', 'image_size': 48, 'head_lr': 1e-3}))


def test_the_last_stages_configuration_names_the_same_stages_again(tmp_path):
    stages = STAGED.each_stage()
    assert [(stage.trains, stage.image_size, stage.head_lr) for stage in stages] == [
        ('head', 32, 3e-3), ('last 2', 48, 1e-3)]
    stages[-1].save(tmp_path / 'config.json')
    assert utilities.Config.load(tmp_path / 'config.json').each_stage() == stages
    assert CONFIG.each_stage() == [CONFIG]


@pytest.mark.parametrize('stages, words', [
    (({}, {'epochs': -1}), 'Stage 2 .*Config.epochs is -1'), (({'epoch': 1},), "cannot set 'epoch'"),
    (({'stages': ()},), "cannot set 'stages'"), (({}, {'embedding_dim': 64}), "cannot set 'embedding_dim'"),
    (({'trains': 'last'},), "for example, 'last 4'"),
])
def test_a_wrong_stage_is_one_sentence(stages, words):
    with pytest.raises(ValueError, match=words) as error:
        CONFIG.override(stages=stages)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('recipe', utilities.RECIPES)
def test_a_recipe_trains_for_as_many_epochs_as_the_configuration_says(recipe):
    config = CONFIG.override(epochs=4).follow(recipe)
    assert sum(stage.epochs for stage in config.each_stage()) == 4
    assert (config == CONFIG.override(epochs=4)) == (recipe == 'place4')


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match="no recipe 'place1'; choose place4, lp-ft"):
        CONFIG.follow('place1')
    assert CONFIG.follow(None) == CONFIG


@pytest.mark.parametrize('trains, moving', [
    ('head', r'head\.'), ('tower', r'tower\.'), ('last 2', r'head\.|tower\.(proj|ln_post|transformer\.resblocks\.[45]\.)')])
def test_a_stage_changes_what_it_trains_and_nothing_else(train, tmp_path, trains, moving):
    model = utilities.new_model(CONFIG, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    utilities.fit(CONFIG.override(trains=trains), model, train, tmp_path / 'run')
    changed = {name for name, tensor in weights(tmp_path / 'run').items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if utilities.re.match(moving, name)}


def test_without_stages_it_is_fit_bit_for_bit(train, tmp_path):
    utilities.fit(CONFIG, utilities.new_model(CONFIG, 12), train, tmp_path / 'fit')
    model = utilities.new_model(CONFIG, 12)
    utilities.fit_stages(CONFIG, model, train, tmp_path / 'stages')
    assert same(weights(tmp_path / 'fit'), weights(tmp_path / 'stages'))
    assert same(weights(tmp_path / 'fit'), model.state_dict())


def test_stages_go_on_where_they_were_stopped_and_a_finished_one_is_not_trained_again(train, tmp_path, monkeypatch, capsys):
    model = utilities.new_model(STAGED, 12)
    utilities.fit_stages(STAGED, model, train, tmp_path / 'whole')
    first = utilities.open_checkpoint(tmp_path / 'whole/whole-stage-1/stage.safetensors')
    assert not (tmp_path / 'whole/whole-stage-1/state').exists()
    assert torch.equal(first['tower.proj'], utilities.new_model(STAGED, 12).tower.proj)
    assert utilities.load_run(tmp_path / 'whole').spec.image_size == 48
    assert same(weights(tmp_path / 'whole'), model.state_dict())
    assert np.array_equal(utilities.embed(model, train), utilities.embed(utilities.load_run(tmp_path / 'whole'), train))

    stopping = STAGED.override(max_hours=1e-9)
    for said in ('run-stage-1', 'run-stage-1', 'run-stage-1'):  # a step each, four in all
        with pytest.raises(utilities.Stopped, match=said):
            utilities.fit_stages(stopping, utilities.new_model(STAGED, 12), train, tmp_path / 'run')
    utilities.fit_stages(STAGED, utilities.new_model(STAGED, 12), train, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))

    trained, fit = [], utilities.fit
    monkeypatch.setattr(utilities, 'fit', lambda config, *rest, **more: trained.append(config) or fit(config, *rest, **more))
    attached = tmp_path / 'input/output'
    attached.mkdir(parents=True)
    (tmp_path / 'run/run-stage-1').rename(attached / 'run-stage-1')
    utilities.shutil.rmtree(tmp_path / 'run')
    capsys.readouterr()
    (attached / 'run').mkdir()
    (attached / 'run-stage-1').rename(attached / 'run/run-stage-1')
    utilities.fit_stages(STAGED, utilities.new_model(STAGED, 12), train, tmp_path / 'run', search=(tmp_path / 'input',))
    assert [config.trains for config in trained] == ['last 2'] and 'run-stage-1: done' in capsys.readouterr().out
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))
    with pytest.raises(ValueError, match='another configuration .seed: 5, now 6'):
        utilities.fit_stages(STAGED.override(seed=6), utilities.new_model(STAGED, 12), train, tmp_path / 'run',
                             search=(tmp_path / 'input',))


def _by_two_processes(train, folder):
    without_dropout()
    for name, processes in (('two', 2), ('sharded', 2), ('one', 1)):  # after this one none can be launched
        config = STAGED.override(batch_size=4, shard=name == 'sharded', distil=1.)
        utilities.launch(utilities.fit_stages, config, utilities.new_model(config, 12), train, folder / name,
                         processes=processes)


def test_two_processes_go_through_the_stages_as_one_does(train, tmp_path):
    in_a_child(_by_two_processes, train, tmp_path)
    one = weights(tmp_path / 'one')
    for name in ('two', 'sharded'):
        other = weights(tmp_path / name)
        assert set(one) == set(other) and not (tmp_path / name / f'{name}-stage-1/state').exists()
        # AdamW brings noise up to the learning rate where gradients vanish
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-3


def test_the_hours_of_a_session_are_those_of_all_stages_together(train, tmp_path, monkeypatch):
    begun, fit = [], utilities.fit
    monkeypatch.setattr(utilities, 'fit', lambda *given, started, **more: begun.append(started) or fit(
        *given, started=started - 3600 * (len(begun) - 1), **more))
    with pytest.raises(utilities.Stopped, match='^run: 0.5 hours are over after 1 of 4'):
        utilities.fit_stages(STAGED.override(max_hours=.5), utilities.new_model(STAGED, 12), train, tmp_path / 'run')
    assert begun[0] == begun[1]


def test_only_the_domains_asked_for_are_trained_on_and_targets_stay_those_of_all_classes(train, tmp_path, monkeypatch):
    frame = train.assign(domain=np.where(train['label'].isin(sorted(train['label'].unique())[:6]), 'first', 'last'))
    seen, photos = [], utilities.Photos
    monkeypatch.setattr(utilities, 'Photos', lambda frame, *rest, **more: seen.append((frame, more)) or photos(
        frame, *rest, **more))
    utilities.fit(CONFIG.override(domains=('last',)), utilities.new_model(CONFIG, 12), frame, tmp_path / 'run')
    (chosen, options), = seen
    assert set(chosen['domain']) == {'last'} and set(options['targets']) == set(range(6, 12))
    with pytest.raises(ValueError, match="none of the domains 'nowhere'; theirs are first, last"):
        utilities.fit(CONFIG.override(domains=('nowhere',)), utilities.new_model(CONFIG, 12), frame, tmp_path / 'other')


def slow_relation_loss(student, teacher):
    """Pair by pair and triplet by triplet, as in the paper."""
    def relations(rows):
        rows = [row / row.norm() for row in rows.double()]
        n = len(rows)
        pairs = {(i, j): (rows[i] - rows[j]).norm().item() for i in range(n) for j in range(n)}
        mean = sum(pairs.values()) / (n * n - n)
        angles = {}
        for i, j, k in np.ndindex(n, n, n):
            one, other = rows[j] - rows[i], rows[k] - rows[i]
            length = pairs[i, j] * pairs[i, k]
            angles[i, j, k] = (one @ other).item() / length if length else 0.
        return {key: value / mean for key, value in pairs.items()}, angles

    def huber(found, wanted):
        apart = [abs(found[key] - wanted[key]) for key in found]
        return sum(a * a / 2 if a < 1 else a - .5 for a in apart) / len(apart)

    (near, angle), (near_to_be, angle_to_be) = relations(student), relations(teacher)
    return huber(near, near_to_be) + 2 * huber(angle, angle_to_be)


def test_the_relation_loss_equals_a_slow_reference_and_ignores_turning_and_length():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4), torch.randn(6, 9)
    assert utilities.relation_loss(student, teacher).item() == pytest.approx(slow_relation_loss(student, teacher), rel=1e-5)
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    assert utilities.relation_loss(3 * student @ turn, student).item() == pytest.approx(0, abs=1e-6)
    twice = student[[0, 0, 1, 2]].requires_grad_()  # equal rows have no direction
    utilities.relation_loss(twice, teacher[:4]).backward()
    assert twice.grad.isfinite().all()


def test_distillation_brings_distances_nearer_to_the_teachers(train, tmp_path):
    apart = {}
    for weight in (0., 30.):
        config = CONFIG.override(distil=weight, embedding_dim=16, epochs=4)
        model = utilities.new_model(config, 12)
        teacher = torch.from_numpy(utilities.embed(utilities.Embedder(model.tower), train))
        utilities.fit_stages(config, model, train, tmp_path / str(weight))
        found = torch.from_numpy(utilities.embed(model, train))
        apart[weight] = utilities.relation_loss(found, teacher).item()
    assert apart[30.] < .9 * apart[0.]


def test_margins_grow_every_epoch_also_over_stages(train, tmp_path, monkeypatch):
    used, loss = [], utilities.arcface_loss
    monkeypatch.setattr(utilities, 'arcface_loss', lambda cosine, labels, margins, scale: used.append(
        margins[0].item()) or loss(cosine, labels, margins, scale))
    config = CONFIG.override(margin_growth=.1, stages=({'epochs': 2, 'trains': 'head'}, {'epochs': 1, 'trains': 'head'}))
    utilities.fit_stages(config, utilities.new_model(config, 12), train, tmp_path / 'run')
    steps = 4 * 2  # of an epoch, two batches a step
    assert used == pytest.approx([.275] * steps + [.375] * steps + [.475] * steps) and len(used) == 3 * steps
    assert math.isclose(utilities.adaptive_margins([6] * 12)[0].item(), .275, rel_tol=1e-6)



@pytest.mark.parametrize('changes', [{'sampling': 'classes'}, {'sampling': 'domains'}, {'partial_centers': .3}])
def test_a_run_with_another_sampling_or_some_centres_goes_on_bit_for_bit(train, tmp_path, monkeypatch, changes):
    train = train.iloc[:66].assign(domain=['a'] * 40 + ['b'] * 26)  # 11 classes of 6, in two kinds
    config, classes = CONFIG.override(**changes, epochs=2), train['label'].nunique()
    utilities.fit(config, utilities.new_model(config, classes), train, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        step, calls = utilities.optimiser_step, iter(range(100))

        def late(*arguments):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return step(*arguments)
        patch.setattr(utilities, 'optimiser_step', late)
        with pytest.raises(KeyboardInterrupt):
            utilities.fit(config.override(save_minutes=0), utilities.new_model(config, classes), train, tmp_path / 'parts')
    utilities.fit(config.override(save_minutes=0), utilities.new_model(config, classes), train, tmp_path / 'parts')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))
    utilities.fit(CONFIG.override(epochs=2), utilities.new_model(CONFIG, classes), train, tmp_path / 'plain')
    assert not same(weights(tmp_path / 'whole'), weights(tmp_path / 'plain'))


def test_the_memory_plan_counts_the_classes_that_a_batch_is_compared_with():
    model = utilities.new_model(CONFIG, 20_000)
    all_of_them, some = (utilities.memory_plan(model, CONFIG.override(partial_centers=share)) for share in (1., .1))
    assert some['activations'] < .9 * all_of_them['activations'] and some['gradients'] == all_of_them['gradients']
