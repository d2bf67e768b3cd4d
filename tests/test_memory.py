"""The plan of memory and disk: measured runs, the real towers on a T4, what to change where it is too much."""
import functools
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

from guie import memory
from guie.config import Config
from guie.losses import arcface_loss
from guie.memory import RESERVE, fitted, memory_plan, training_plan
from guie.model import Embedder, SubcenterHead, param_groups
from guie.recipes import follow_recipe
from guie.towers import TowerSpec, build_tower, checkpoint_activations
from tests.runs import CONFIG, SPAWN

T4 = 14.56 * 2**30  # bytes that nvidia-smi calls 15,360 MiB, less what CUDA keeps for itself
MID_SIZE = CONFIG.override(image_size=224, layer_lrs=((8, 1e-4),))


def full_size(name, size):
    """A real tower without weights."""
    config = open_clip.get_model_config(name)
    return build_tower(TowerSpec(name, 'random', size, (.5,) * 3, (.5,) * 3, 'gelu', config['embed_dim'], {
        'library': 'open_clip', 'embed_dim': config['embed_dim'], 'quick_gelu': False,
        'vision_cfg': config['vision_cfg'] | {'image_size': size}}))


def mid_size():
    """An Embedder of 16 million parameters: large enough for its tensors to outweigh the libraries' own memory."""
    vision = {'image_size': 224, 'patch_size': 16, 'layers': 8, 'width': 384, 'head_width': 64}
    spec = TowerSpec('mid-size', 'random', 224, (.5,) * 3, (.5,) * 3, 'gelu', 256, {
        'library': 'open_clip', 'embed_dim': 256, 'vision_cfg': vision, 'quick_gelu': False})
    return Embedder(build_tower(spec), SubcenterHead(256, 500))


def anonymous_memory():
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def measure(config, file):
    """Writes the memory that three real training steps take at most, in bytes."""
    torch.set_num_threads(1)
    small = torch.randn(1, 1, 8, 8, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(small, small, small).sum().backward()  # libraries load
    before, most, done = anonymous_memory(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], anonymous_memory())
            time.sleep(.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    model = mid_size().train()
    if config.checkpoint_activations:
        checkpoint_activations(model.tower)
    optimiser = torch.optim.AdamW(param_groups(model, config))
    for _ in range(3):
        images = torch.zeros(config.batch_size, 3, 224, 224, dtype=torch.uint8)
        targets = torch.zeros(config.batch_size, dtype=torch.long)
        arcface_loss(model(images, classify=True), targets, torch.full((500,), .3)).backward()
        optimiser.step()
    done.set()
    thread.join()
    file.write_text(str(most[0] - before))


@pytest.mark.parametrize('recompute', [False, True])
def test_the_memory_plan_is_within_15_percent_of_a_measured_run(tmp_path, monkeypatch, recompute):
    config = MID_SIZE.override(batch_size=8, effective_batch=8, checkpoint_activations=recompute)
    planned = sum(memory_plan(mid_size(), config).values())
    monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '65536')  # what is freed goes back, so that the peak is of tensors
    child = SPAWN.Process(target=measure, args=(config, tmp_path / 'measured'))
    child.start()
    child.join()
    measured = int((tmp_path / 'measured').read_text())
    assert planned == pytest.approx(measured, rel=.15)


@functools.lru_cache
def plan_of(name, size, **changes):
    config = Config(model_name=name, image_size=size, batch_size=8, **changes)
    with torch.device('meta'):
        tower = full_size(name, size)
    model = Embedder(tower, SubcenterHead(tower.spec.width, 17_642))
    return memory_plan(model, config, half=torch.float16, processes=2 if config.shard else 1)


@pytest.mark.parametrize('name, size, millions', [('ViT-H-14', 224, 632), ('ViT-L-14', 336, 304)])
def test_both_towers_fit_a_t4_at_batch_8_with_activations_recomputed(name, size, millions):
    plan = plan_of(name, size, checkpoint_activations=True)
    values = (millions + (1024 if 'H' in name else 768) * 512 / 1e6 + 17_642 * 3 * 512 / 1e6) * 1e6
    assert plan['parameters'] == pytest.approx(4 * values, rel=.002) == plan['gradients']
    assert plan['optimiser'] == pytest.approx(8 * values, rel=.002)
    assert sum(plan.values()) < T4
    assert plan_of(name, size, checkpoint_activations=False)['activations'] > 2 * plan['activations']


@pytest.mark.parametrize('gigabytes, processes, size, recompute', [
    (80, 1, 32, False), (80, 4, 8, False), (24, 1, 16, False), (15.6, 1, 32, True), (15.6, 2, 16, True), (4, 1, 1, True)])
def test_a_gpu_gets_the_largest_batch_without_recomputing_or_else_with(monkeypatch, gigabytes, processes, size, recompute):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: processes)
    monkeypatch.setattr(memory, 'available_memory', lambda: (gigabytes * 1e9, 'given'))
    with torch.device('meta'):
        tower = full_size('ViT-H-14', 224)
    config = fitted(Config(), Embedder(tower, SubcenterHead(tower.spec.width, 17_642)), processes)
    assert (config.batch_size, config.checkpoint_activations) == (size, recompute)


def cards(monkeypatch, *sizes, integrated=False):
    """GPUs of so many GB, as PyTorch shows them: those that CUDA_VISIBLE_DEVICES leaves, or parts of one (MIG)."""
    shown = [SimpleNamespace(total_memory=size * 10**9, name=f'card of {size} GB', is_integrated=integrated)
             for size in sizes]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(shown))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda number: shown[number])
    monkeypatch.setattr(memory.psutil, 'virtual_memory', lambda: SimpleNamespace(available=50 * 10**9))


@pytest.mark.parametrize('sizes, integrated, room, words', [
    ((), False, 50e9, 'free on this machine'), ((10,), False, 10e9 - RESERVE, 'of one card of 10 GB, less 1 GiB for CUDA'),
    ((80, 24), False, 24e9 - RESERVE, 'of one card of 24 GB, less 1 GiB'),
    ((128,), True, 50e9 - RESERVE, 'free on this machine, which its card of 128 GB shares'),
    ((8,), True, 8e9 - RESERVE, 'free on this machine, which its card of 8 GB shares')])
def test_the_memory_there_is_is_that_of_the_smallest_gpu_that_is_seen(monkeypatch, sizes, integrated, room, words):
    cards(monkeypatch, *sizes, integrated=integrated)
    found, said = memory.available_memory()
    assert found == room and said.startswith(words)


@pytest.mark.parametrize('error', [
    RuntimeError('The NVIDIA driver on your system is too old\nupdate it'), RuntimeError(''),
    RuntimeError('No CUDA GPUs are available'), AssertionError('Torch not compiled with CUDA')])
def test_a_gpu_that_cannot_be_asked_is_named_and_the_machines_memory_is_planned_for(monkeypatch, error):
    def refuse(number):
        raise error

    cards(monkeypatch, 16)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', refuse)
    monkeypatch.setenv('PATH', '')  # nor is there an nvidia-smi
    found, said = memory.available_memory()
    assert found == 50e9 and said.startswith('free on this machine, whose GPU PyTorch cannot use: ') and '\n' not in said


@pytest.mark.parametrize('given', [{'batch_size': 2}, {'checkpoint_activations': True}, {'effective_batch': 12}])
def test_what_the_configuration_says_is_kept_and_a_cpu_takes_8_images(given):
    config = fitted(Config(**given), mid_size(), 1)
    wanted = Config(**{'batch_size': 6 if 'effective_batch' in given else 8, 'checkpoint_activations': False} | given)
    assert config == wanted


def test_a_sharded_tower_needs_half_of_the_memory_on_each_of_two_gpus_and_what_it_gathers():
    whole, half = plan_of('ViT-H-14', 224), plan_of('ViT-H-14', 224, shard=True)
    assert half['optimiser'] == whole['optimiser'] // 2 and half['gradients'] == whole['gradients'] // 2
    assert .5 < half['parameters'] / whole['parameters'] < .8


def test_a_plan_that_does_not_fit_names_the_smallest_change_that_does(tmp_path, capsys):
    config = MID_SIZE.override(batch_size=16, effective_batch=16)
    model = mid_size()
    sizes = {change: sum(memory_plan(model, config.override(**dict(change))).values())
             for change in ((('checkpoint_activations', False),), (('checkpoint_activations', True),),
                            (('checkpoint_activations', True), ('batch_size', 8)))}
    for (change, fits), most in zip(list(sizes.items())[1:], list(sizes.values())):
        assert fits < most
        training_plan(config, model, tmp_path, memory=fits, disk=1e12, processes=1)
        assert f'set OVERRIDES = {dict(change)}.' in capsys.readouterr().out
    table = training_plan(config, model, tmp_path, memory=max(sizes.values()), disk=1e12, processes=1)
    assert not capsys.readouterr().out and table['GB'].iloc[:4].sum() == pytest.approx(table['GB'].iloc[4])
    training_plan(config, model, tmp_path, memory=1e6, disk=1e12, processes=1)
    assert 'do not fit into 0.0 GB (given): take a smaller tower' in capsys.readouterr().out


def test_the_plan_is_that_of_the_heaviest_stage(tmp_path):
    model = mid_size()
    staged = follow_recipe(MID_SIZE.override(epochs=2, checkpoint_activations=False), 'hi-res')
    heaviest = memory_plan(model, staged.each_stage()[1])
    assert heaviest['activations'] > 1.3 * memory_plan(model, staged.each_stage()[0])['activations']
    table = training_plan(staged, model, tmp_path, memory=1e12, disk=1e12, processes=1).set_index('need')
    assert table.loc['memory in all', 'GB'] == pytest.approx(sum(heaviest.values()) / 1e9)
    assert model.spec.image_size == 224


def test_a_disk_too_small_for_two_checkpoints_is_named_before_the_first_step(tmp_path, capsys):
    model = mid_size()
    weights = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    for disk, words in ((7 * weights, ''), (6.9 * weights, 'loses its state'), (3.9 * weights, 'choose another OUT_DIR.\n')):
        training_plan(MID_SIZE, model, tmp_path / 'run', memory=1e12, disk=disk)
        said = capsys.readouterr().out
        assert words in said and bool(words) == ('do not fit on the disk' in said)


def test_a_drive_that_does_not_say_how_much_is_free_is_not_full(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory.shutil, 'disk_usage', lambda place: SimpleNamespace(total=0, used=0, free=0))
    training_plan(MID_SIZE.override(batch_size=8, effective_batch=8), mid_size(), tmp_path / 'run', memory=1e12)
    assert 'do not fit' not in capsys.readouterr().out


def test_a_head_that_compares_the_images_of_a_batch_never_gets_one_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(memory, 'available_memory', lambda: (1e9, 'given'))
    with torch.device('meta'):
        tower = full_size('ViT-L-14', 336)
        model = Embedder(tower, SubcenterHead(tower.spec.width, 100, norm=True))
    assert fitted(Config(head_norm=True), model, 1).batch_size == 2
