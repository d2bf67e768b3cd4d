"""Recipes and stages: what each trains, that stages resume where they were stopped, towers at other sizes."""
import json
import re
import shutil

import numpy as np
import pytest
import torch

import demo
from guie import recipes, training
from guie.checkpoints import load_run, open_checkpoint
from guie.config import Config
from guie.distributed import launch
from guie.embedding import embed
from guie.errors import ProcessError, Stopped
from guie.losses import adaptive_margins
from guie.recipes import RECIPES, follow_recipe
from guie.resume import read_position, run_lock, saved_states
from guie.splits import Splits
from tests.runs import apart, contents, new_model, same, weights, without_dropout

CONFIG = Config(**demo.settings({'image_size': 32})).override(
    batch_size=8, effective_batch=16, epochs=1, warmup_steps=1, embedding_dim=32, save_minutes=1000)
STAGED = CONFIG.override(stages=({'trains': 'head'}, {'trains': 'last 2', 'image_size': 48, 'head_lr': 1e-3}))


@pytest.fixture
def splits(train):
    return Splits(train=train)


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_trains_for_as_many_epochs_as_the_configuration_says(recipe):
    config = follow_recipe(CONFIG.override(epochs=4), recipe)
    cached = [stage.epochs for stage in config.each_stage() if stage.trains == 'cached head']  # over vectors: a moment each
    assert cached == ([80] if recipe in ('frozen-head', 'lp-ft') else [])
    assert sum(stage.epochs for stage in config.each_stage()) - sum(cached) == (0 if recipe == 'frozen-head' else 4)
    assert (config == CONFIG.override(epochs=4)) == (recipe == 'place4')


def test_the_recipes_of_the_other_places_are_there():
    assert {'place4', 'lp-ft', 'locked-head', 'slow-tower', 'direct-64', 'hi-res', 'overlap'} <= set(RECIPES)


@pytest.mark.parametrize('name, side, best, larger', [
    ('ViT-H-14', 224, 336, 280), ('ViT-L-14', 224, 336, 280), ('ViT-L-14-336', 336, 504, 420),
    ('ViT-SO400M-14-SigLIP', 224, 336, 280), ('ViT-SO400M-14-SigLIP-384', 384, 576, 480),  # 384 are no whole patches either
    ('local-dir:media/miniature', 64, 96, 80), ('RN50', 224, 336, 280),
    ('ViT-B-32', 224, '336 to 352', '280 to 288'), ('ViT-B-16', 224, 336, '280 to 272')])
def test_a_recipe_takes_a_side_that_whole_patches_cover_and_says_where_it_is_another(name, side, best, larger, capsys):
    config = Config(model_name=name, pretrained='', image_size=side)
    for recipe, expected in (('best', best), ('hi-res', larger)):
        taken = follow_recipe(config, recipe).each_stage()[-1].image_size
        before, _, after = str(expected).rpartition(' to ')
        said = f'{before} px are no whole number of patches of {name}: the recipe takes {after}.\n' if before else ''
        assert taken == int(after) and capsys.readouterr().out == said


def test_the_tower_of_a_recipe_sees_the_edges_of_its_images(capsys):
    config = follow_recipe(CONFIG, 'hi-res').each_stage()[-1]
    assert '40 px are no whole number of patches of local-dir:media/miniature' in capsys.readouterr().out
    model, side = new_model(config).eval(), config.image_size
    images = torch.zeros(3, 3, side, side, dtype=torch.uint8)
    images[1, :, -1], images[2, :, :, -1] = 255, 255
    with torch.inference_mode():
        plain, *edges = model(images)
    assert model.spec.image_size == 48 and all((plain - edge).abs().max() > 1e-3 for edge in edges)


def test_lp_ft_fine_tunes_from_a_head_on_cached_vectors_whatever_the_augmentation(splits, tmp_path):
    config = follow_recipe(CONFIG.override(augmentation='happywhale'), 'lp-ft')
    assert [stage.augmentation for stage in config.each_stage()] == ['none', 'happywhale']
    recipes.train(config, splits, tmp_path / 'run')
    first, last = (open_checkpoint(tmp_path / file) for file in ('run/run-stage-1/stage.safetensors', 'run'))
    start = new_model(config).state_dict()
    assert torch.equal(first['tower.proj'], start['tower.proj']) and not torch.equal(first['tower.proj'], last['tower.proj'])
    for name in ('head.embedding.weight', 'head.centers'):  # it goes on from there
        assert (last[name] - first[name]).norm() < (last[name] - start[name]).norm()


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match="no recipe 'place1'; choose place4, best"):
        follow_recipe(CONFIG, 'place1')
    assert follow_recipe(CONFIG, None) == CONFIG


@pytest.mark.parametrize('trains, moving', [
    ('head', r'head\.'), ('tower', r'tower\.'), ('last 2', r'head\.|tower\.(proj|ln_post|transformer\.resblocks\.[45]\.)')])
def test_a_stage_changes_what_it_trains_and_nothing_else(train, tmp_path, trains, moving):
    model = new_model(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.fit(CONFIG.override(trains=trains), model, train, tmp_path / 'run')
    changed = {name for name, tensor in weights(tmp_path / 'run').items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if re.match(moving, name)}


def test_without_stages_it_is_fit_bit_for_bit(splits, tmp_path):
    training.fit(CONFIG, new_model(CONFIG), splits['train'], tmp_path / 'fit')
    model = recipes.train(CONFIG, splits, tmp_path / 'stages')
    assert same(weights(tmp_path / 'fit'), weights(tmp_path / 'stages'))
    assert same(weights(tmp_path / 'fit'), model.state_dict()) and not model.training


def test_stages_resume_where_stopped_and_a_finished_one_is_not_trained_again(splits, tmp_path, monkeypatch, capsys):
    model = recipes.train(STAGED, splits, tmp_path / 'whole')
    first = open_checkpoint(tmp_path / 'whole/whole-stage-1/stage.safetensors')
    assert not (tmp_path / 'whole/whole-stage-1/state').exists()
    assert torch.equal(first['tower.proj'], new_model(STAGED).tower.proj)
    assert load_run(tmp_path / 'whole').spec.image_size == 48 and same(weights(tmp_path / 'whole'), model.state_dict())

    stopping = STAGED.override(max_hours=1e-9)
    for _ in range(3):  # a step each, four in all
        with pytest.raises(Stopped, match='run-stage-1'):
            recipes.train(stopping, splits, tmp_path / 'run')
    recipes.train(STAGED, splits, tmp_path / 'run')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))

    trained, fit = [], training.fit
    monkeypatch.setattr(training, 'fit', lambda config, *rest, **more: trained.append(config) or fit(config, *rest, **more))
    attached = tmp_path / 'input/notebooks/somebody/output/run'
    attached.mkdir(parents=True)
    (tmp_path / 'run/run-stage-1').rename(attached / 'run-stage-1')
    shutil.rmtree(tmp_path / 'run')
    capsys.readouterr()
    recipes.train(STAGED, splits, tmp_path / 'run', search=(tmp_path / 'input',))
    assert [config.trains for config in trained] == ['last 2'] and 'run-stage-1: done' in capsys.readouterr().out
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'run'))
    with pytest.raises(ValueError, match='another configuration .seed: 5, now 6'):
        recipes.train(STAGED.override(seed=6), splits, tmp_path / 'run', search=(tmp_path / 'input',))
    capsys.readouterr()
    recipes.train(STAGED.override(seed=6), splits, tmp_path / 'other/run', search=(tmp_path / 'input',))
    said = capsys.readouterr().out
    assert f'{attached}/run-stage-1 has another configuration (seed: 5, now 6) and is left alone.' in said
    assert 'run-stage-1: hash of the weights' in said


def test_a_finished_stage_of_other_images_is_not_built_upon(splits, tmp_path, capsys):
    recipes.train(STAGED, splits, tmp_path / 'input/run')
    others = Splits(train=splits['train'][splits['train']['label'] != splits['train']['label'][0]])
    expected = recipes.train(STAGED, others, tmp_path / 'alone/run').state_dict()
    for name in ('model.safetensors', 'config.json', 'log.csv'):  # the session ended within its second stage
        (tmp_path / 'input/run' / name).unlink()
    shutil.rmtree(tmp_path / 'input/run/state')
    capsys.readouterr()
    model = recipes.train(STAGED, others, tmp_path / 'run', search=[tmp_path / 'input'])
    said = capsys.readouterr().out
    assert f'{tmp_path}/input/run/run-stage-1 is of other images (72 images of 12 classes' in said and 'left alone' in said
    assert 'run-stage-1: done' not in said and same(model.state_dict(), expected)

    shutil.copytree(tmp_path / 'input/run', tmp_path / 'own')
    (tmp_path / 'own/run-stage-1').rename(tmp_path / 'own/own-stage-1')
    before = contents(tmp_path / 'own')
    with pytest.raises(ValueError, match='own holds a run on other images .hash .*: give this run another name'):
        recipes.train(STAGED, others, tmp_path / 'own')
    assert contents(tmp_path / 'own') == before
    recipes.train(STAGED, splits, tmp_path / 'own')  # its own images go on
    assert 'own-stage-1: done' in capsys.readouterr().out


def test_no_stage_begins_in_the_folder_of_another_configuration(splits, tmp_path, monkeypatch):
    recipes.train(CONFIG, splits, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    monkeypatch.setattr(recipes, 'train_stage', lambda *_, **__: pytest.fail('a stage began'))
    with pytest.raises(ValueError, match='/run holds a run with another configuration .*image_size: 32, now 48'):
        recipes.train(STAGED, splits, tmp_path / 'run')
    assert contents(tmp_path / 'run') == before


def test_the_vectors_of_a_staged_run_are_those_of_its_file(splits, tmp_path):
    model = recipes.train(STAGED, splits, tmp_path / 'run')
    assert np.array_equal(embed(model, splits['train']), embed(load_run(tmp_path / 'run'), splits['train']))


def test_the_hours_of_a_session_are_those_of_all_stages_together(splits, tmp_path, monkeypatch):
    begun, fit = [], training.fit
    monkeypatch.setattr(training, 'fit', lambda *given, started, **more: begun.append(started) or fit(
        *given, started=started - 3600 * (len(begun) - 1), **more))
    with pytest.raises(Stopped, match='^run: 0.5 hours are over after 1 of 4'):
        recipes.train(STAGED.override(max_hours=.5), splits, tmp_path / 'run')
    assert begun[0] == begun[1]


def test_several_processes_are_launched_for_each_stage_with_what_it_begins_with(splits, tmp_path, monkeypatch):
    launched = []

    def launch_here(module, folder, processes):  # what its processes would do, in this one
        launched.append((module, folder.name, processes, json.loads((folder / 'job/options.json').read_text())))
        training.main(folder)

    monkeypatch.setattr(recipes, 'launch', launch_here)
    recipes.train(STAGED, splits, tmp_path / 'run', processes=2)
    assert [call[:3] for call in launched] == [('guie.training', 'run-stage-1', 2), ('guie.training', 'run', 2)]
    first, second = (call[3] for call in launched)
    assert (first['weights'], first['epoch'], second['epoch']) == (None, 0, 1)
    assert second['weights'].endswith('run-stage-1/stage.safetensors') and first['started'] == second['started']
    recipes.train(STAGED, splits, tmp_path / 'here', processes=1)
    assert same(weights(tmp_path / 'run'), weights(tmp_path / 'here'))


def test_two_processes_go_through_the_stages_as_one_does_each_holding_a_part(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, 'launch', lambda module, folder, processes: launch('tests.launched', folder, processes))
    recipes.train(STAGED.override(batch_size=4, shard=True), splits, tmp_path / 'two', processes=2)
    without_dropout(monkeypatch)
    recipes.train(STAGED, splits, tmp_path / 'one', processes=1)
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    # AdamW brings noise up to the learning rate where gradients vanish
    assert set(one) == set(two) and apart(one, two) < 1e-3 and not (tmp_path / 'two/two-stage-1/state').exists()
    assert read_position(saved_states(tmp_path / 'two/state')[0])['progress']['processes'] == 2


def test_margins_grow_every_epoch_also_over_stages(splits, tmp_path, monkeypatch):
    used, loss = [], training.arcface_loss
    monkeypatch.setattr(training, 'arcface_loss', lambda cosine, labels, margins, scale: used.append(
        margins[0].item()) or loss(cosine, labels, margins, scale))
    config = CONFIG.override(margin_growth=.1, stages=({'epochs': 2, 'trains': 'head'}, {'epochs': 1, 'trains': 'head'}))
    recipes.train(config, splits, tmp_path / 'run')
    steps = 4 * 2  # of an epoch, two batches a step
    assert used == pytest.approx([.275] * steps + [.375] * steps + [.475] * steps) and len(used) == 3 * steps
    assert adaptive_margins([6] * 12)[0].item() == pytest.approx(.275, rel=1e-6)


@pytest.mark.parametrize('name, meant', [
    ('lpft', 'lp-ft'), ('Place4', 'place4'), ('hires', 'hi-res'), ('locked_head', 'locked-head')])
def test_a_misspelt_recipe_is_one_sentence_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f'^There is no recipe {name!r}; choose .* Did you mean {meant}') as error:
        follow_recipe(Config(), name)
    assert '\n' not in str(error.value)


def test_a_second_notebook_leaves_the_job_of_a_run_under_way_alone(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, 'launch', lambda *_: pytest.fail('launched'))
    with run_lock(tmp_path / 'run'), pytest.raises(ProcessError, match='^Another run is writing into .*/run: wait for it'):
        recipes.train(CONFIG, splits, tmp_path / 'run', processes=2)
    assert not (tmp_path / 'run/job').exists()
