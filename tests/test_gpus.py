"""Several processes as one, and the plan of memory: what a GPU will do, proven on CPU with gloo and fake tensors."""
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from test_faults import SAVING, SPAWN, step_hook  # noqa: F401  (a fixture)
from test_tower import full_size
from test_training import CONFIG, new_model, same, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import utilities

T4 = 14.56 * 2**30  # bytes that nvidia-smi calls 15,360 MiB, less what CUDA keeps for itself


MID_SIZE = CONFIG.override(image_size=224, bands=((8, 1e-4),))


# Memory

def mid_size():
    """An Embedder of 16 million parameters: large enough for its tensors to outweigh the libraries' own memory."""
    vision = {'image_size': 224, 'patch_size': 16, 'layers': 8, 'width': 384, 'head_width': 64}
    spec = utilities.TowerSpec('mid-size', 'random', 224, (.5,) * 3, (.5,) * 3, 'gelu', 256, {
        'library': 'open_clip', 'embed_dim': 256, 'vision_cfg': vision, 'quick_gelu': False})
    return utilities.Embedder(utilities.build_tower(spec), utilities.SubcenterHead(256, 500))


def anonymous_memory():
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def _measure(config, file):
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
        utilities.checkpoint_activations(model.tower)
    optimiser = torch.optim.AdamW(utilities.param_groups(model, config))
    for _ in range(3):
        images = torch.zeros(config.batch_size, 3, 224, 224, dtype=torch.uint8)
        targets = torch.zeros(config.batch_size, dtype=torch.long)
        utilities.arcface_loss(model(images, classify=True), targets, torch.full((500,), .3)).backward()
        optimiser.step()
    done.set()
    thread.join()
    file.write_text(str(most[0] - before))


@pytest.mark.parametrize('recompute', [False, True])
def test_the_memory_plan_is_within_15_percent_of_a_measured_run(tmp_path, monkeypatch, recompute):
    config = MID_SIZE.override(batch_size=8, effective_batch=8, checkpoint_activations=recompute)
    with FakeTensorMode():
        planned = sum(utilities.memory_plan(mid_size(), config).values())
    monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '65536')  # what is freed goes back, so that the peak is of tensors
    child = SPAWN.Process(target=_measure, args=(config, tmp_path / 'measured'))
    child.start()
    child.join()
    measured = int((tmp_path / 'measured').read_text())
    assert planned == pytest.approx(measured, rel=.15)


@functools.lru_cache
def plan_of(name, size, **changes):
    config = utilities.Config(model_name=name, image_size=size, **changes)
    with FakeTensorMode():
        tower = full_size(name, size, 'cpu')
        model = utilities.Embedder(tower, utilities.SubcenterHead(tower.spec.width, 17_642))
    return utilities.memory_plan(model, config, half=torch.float16, processes=2 if config.shard else 1)


@pytest.mark.parametrize('name, size, millions', [('ViT-H-14', 224, 632), ('ViT-L-14', 336, 304)])
def test_both_towers_fit_a_t4_at_batch_8_with_activations_recomputed(name, size, millions):
    plan = plan_of(name, size, checkpoint_activations=True)
    values = (millions + (1024 if 'H' in name else 768) * 512 / 1e6 + 17_642 * 3 * 512 / 1e6) * 1e6
    assert plan['parameters'] == pytest.approx(4 * values, rel=.002) == plan['gradients']
    assert plan['optimiser'] == pytest.approx(8 * values, rel=.002)
    assert sum(plan.values()) < T4
    assert plan_of(name, size, checkpoint_activations=False)['activations'] > 2 * plan['activations']


def test_a_sharded_tower_needs_half_of_the_memory_on_each_of_two_gpus_and_what_it_gathers():
    whole, half = plan_of('ViT-H-14', 224), plan_of('ViT-H-14', 224, shard=True)
    assert half['optimiser'] == whole['optimiser'] // 2 and half['gradients'] == whole['gradients'] // 2
    assert .5 < half['parameters'] / whole['parameters'] < .8


def test_a_plan_that_does_not_fit_names_the_smallest_change_that_does(tmp_path, capsys):
    config = MID_SIZE.override(batch_size=16, effective_batch=16)
    with FakeTensorMode():
        model = mid_size()
    sizes = {change: sum(utilities.memory_plan(model, config.override(**dict(change))).values())
             for change in ((('checkpoint_activations', False),), (('checkpoint_activations', True),),
                            (('checkpoint_activations', True), ('batch_size', 8)))}
    for (change, fits), most in zip(list(sizes.items())[1:], list(sizes.values())):
        assert fits < most
        utilities.training_plan(config, model, tmp_path, memory=fits, disk=1e12, processes=1)
        assert f'set OVERRIDES = {dict(change)}.' in capsys.readouterr().out
    table = utilities.training_plan(config, model, tmp_path, memory=max(sizes.values()), disk=1e12, processes=1)
    assert not capsys.readouterr().out and table['GB'].iloc[:4].sum() == pytest.approx(table['GB'].iloc[4])
    utilities.training_plan(config, model, tmp_path, memory=1e6, disk=1e12, processes=1)
    assert 'do not fit into 0.0 GB (given): take a smaller tower' in capsys.readouterr().out


def test_the_plan_is_that_of_the_heaviest_stage(tmp_path):
    with FakeTensorMode():
        model = mid_size()
    staged = MID_SIZE.override(epochs=2, checkpoint_activations=False).follow('hi-res')
    heaviest = utilities.memory_plan(model, staged.each_stage()[1])
    assert heaviest['activations'] > 1.3 * utilities.memory_plan(model, staged.each_stage()[0])['activations']
    table = utilities.training_plan(staged, model, tmp_path, memory=1e12, disk=1e12, processes=1).set_index('need')
    assert table.loc['memory in all', 'GB'] == pytest.approx(sum(heaviest.values()) / 1e9)
    assert model.spec.image_size == 224


def test_a_disk_too_small_for_two_states_is_said_before_the_first_step(tmp_path, capsys):
    with FakeTensorMode():
        model = mid_size()
    weights = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    for disk, words in ((7 * weights, ''), (6.9 * weights, 'loses its state'), (3.9 * weights, 'choose another OUT_DIR.\n')):
        utilities.training_plan(MID_SIZE, model, tmp_path / 'run', memory=1e12, disk=disk)
        said = capsys.readouterr().out
        assert words in said and bool(words) == ('do not fit on the disk' in said)


@pytest.mark.parametrize('capability, built_for, runs', [
    ((7, 5), ['sm_50', 'sm_60', 'sm_70', 'sm_75', 'sm_80'], True), ((6, 0), ['sm_75', 'sm_80', 'sm_86', 'sm_90'], False),
    ((6, 1), ['sm_60'], True), ((6, 0), ['sm_61'], False), ((12, 0), ['sm_90', 'compute_90'], True),
    ((8, 9), ['sm_80'], True), ((9, 0), ['sm_90a'], True), ((10, 0), ['sm_90'], False)])
def test_a_gpu_without_kernels_in_this_pytorch_is_known_beforehand(capability, built_for, runs):
    assert utilities.has_kernels(capability, built_for) == runs


def test_a_gpu_without_kernels_is_one_sentence(monkeypatch):
    for name, value in {'is_available': True, 'get_device_capability': (6, 0), 'get_arch_list': ['sm_75', 'sm_80'],
                        'get_device_name': 'Tesla P100-PCIE-16GB'}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(RuntimeError, match=r'no kernels for the Tesla P100-PCIE-16GB .sm_60.*"GPU T4 x2"'):
        utilities.best_device()


# fp16, the precision of a T4: the same autocast, scaler and fused optimiser, on CPU

class HalfOnCPU(utilities.Accelerator):
    scale = 2. ** 17  # of the loss, at first; the gradients of these tests overflow down to about 2 ** 15

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp, self.scaler = True, torch.amp.GradScaler('cpu', init_scale=self.scale)


HALF = SAVING.override(epochs=2, precision='fp16', checkpoint_activations=True)


def _local(parameter):
    return (parameter.to_local() if hasattr(parameter, 'to_local') else parameter).detach()


def _watched_in_half(config, model, train, run):
    """fit in fp16 that writes of every step: whether the weights moved, whether it says so, the scale."""
    utilities.Accelerator, step, seen = HalfOnCPU, utilities.optimiser_step, []

    def watched(accelerator, wrapped, *rest):
        before = [_local(parameter).clone() for parameter in model.parameters()]
        loss, moved = step(accelerator, wrapped, *rest)
        equal = all(torch.equal(old, _local(new)) for old, new in zip(before, model.parameters()))
        seen.append({'loss': loss, 'moved': not equal, 'says': moved, 'scale': accelerator.scaler.get_scale()})
        return loss, moved

    utilities.optimiser_step = watched
    utilities.fit(config, model, train, run)
    pd.DataFrame(seen).to_csv(run / f'seen{utilities.own_share()[0]}.csv', index=False)


def _train_in_half(train, folder):
    torch.set_num_threads(1)
    for name, changes, processes in (('two', {}, 2), ('sharded', {'shard': True}, 2), ('one', {'batch_size': 8}, 1)):
        config = HALF.override(**{'batch_size': 4} | changes)
        utilities.launch(_watched_in_half, config, new_model(config), train, folder / name, processes=processes)


@pytest.fixture(scope='module')
def halves(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp('halves')
    in_a_child(_train_in_half, utilities.read_dataset(tiny_world / 'train.csv'), folder)
    return folder


@pytest.mark.parametrize('name', ['one', 'two', 'sharded'])
def test_a_gradient_too_large_for_fp16_lowers_the_scale_and_leaves_weights_and_learning_rate(halves, name):
    seen = pd.read_csv(halves / name / 'seen0.csv')
    assert seen['moved'].equals(seen['says']) and seen['loss'].notna().all()
    assert 1 <= seen['moved'].argmax() <= 5 and seen['moved'].iloc[-3:].all()  # skipped until the scale fits
    assert seen['scale'].tolist() == (2. ** (17 - (~seen['moved']).cumsum())).tolist()
    lr = pd.read_csv(halves / name / 'log.csv')['lr']  # of the log: the rate that the next step takes
    assert (lr.diff().iloc[1:] != 0).tolist() == seen['moved'].iloc[1:].tolist()
    if name != 'one':
        assert seen.equals(pd.read_csv(halves / name / 'seen1.csv'))


def test_a_run_in_fp16_goes_on_bit_for_bit(train, tmp_path, monkeypatch, step_hook):  # noqa: F811
    monkeypatch.setattr(utilities, 'Accelerator', HalfOnCPU)
    utilities.fit(HALF, new_model(), train, tmp_path / 'whole')
    step_hook(lambda step: (_ for _ in ()).throw(KeyboardInterrupt) if step == 5 else None)
    with pytest.raises(KeyboardInterrupt):
        utilities.fit(HALF, new_model(), train, tmp_path / 'parts')
    monkeypatch.setattr(HalfOnCPU, 'scale', 8.)  # the state's wins
    utilities.fit(HALF, new_model(), train, tmp_path / 'parts')
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(utilities, 'Accelerator', HalfOnCPU)
    monkeypatch.setattr(HalfOnCPU, 'scale', 4.)
    model = new_model()
    model.tower.conv1.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match='gradient was not finite in 2 steps'):
        utilities.fit(HALF.override(max_skipped=1), model, train, tmp_path / 'run')
    assert len((tmp_path / 'run/not_finite.txt').read_text().splitlines()) == 2 * 16  # scales 4 and 2 were tried before


def test_a_gpu_that_runs_out_of_memory_is_one_sentence_and_the_last_state_stays(train, tmp_path, step_hook):  # noqa: F811
    def fill(step):
        if step == 3:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')

    step_hook(fill)
    with pytest.raises(MemoryError, match='ran out of memory at batch_size 8: halve it .* goes on from its last state'):
        utilities.fit(SAVING, new_model(), train, tmp_path / 'run')
    assert utilities.saved_states(tmp_path / 'run/state')[0].name == 'step-00000002'


# Several processes, each launched in a process of its own: pytest's has used autograd, whose threads no fork takes along

def in_a_child(function, *arguments):
    child = SPAWN.Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0


def without_dropout():
    torch.set_num_threads(1)
    utilities.F.dropout = lambda features, p: features


def _fit_and_look(config, model, train, run):
    utilities.fit(config, model, train, run)
    rank, _ = utilities.own_share()
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    held = sum((parameter.to_local() if utilities.is_sharded(model) else parameter).numel()
               for parameter in model.parameters())
    (run / f'held{rank}').write_text(json.dumps([sorted(kinds), held]))


def _train_alike(train, folder):
    without_dropout()
    for name, changes, processes in (('two', {}, 2), ('sharded', {'shard': True}, 2), ('one', {'batch_size': 8}, 1)):
        config = CONFIG.override(**{'batch_size': 4, 'effective_batch': 16, 'augmentation': 'cutout'} | changes)
        utilities.launch(_fit_and_look, config, new_model(config), train, folder / name, processes=processes)
    vectors = [utilities.embed(utilities.load_run(folder / name), train) for name in ('one', 'two', 'sharded')]
    np.save(folder / 'vectors.npy', vectors)


@pytest.fixture(scope='module')
def alike(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp('alike')
    in_a_child(_train_alike, utilities.read_dataset(tiny_world / 'train.csv'), folder)
    return folder


@pytest.mark.parametrize('name', ['two', 'sharded'])
def test_two_processes_train_the_weights_that_one_does(alike, name):
    one, other = weights(alike / 'one'), weights(alike / name)
    assert set(one) == set(other)
    # 12 steps of AdamW, which brings noise up to the learning rate where gradients vanish: about 1e-5 was measured
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4
    vectors = np.load(alike / 'vectors.npy')
    assert abs(vectors[['one', 'two', 'sharded'].index(name)] - vectors[0]).max() < 1e-5
    logs = [pd.read_csv(alike / run / 'log.csv') for run in ('one', name)]
    assert np.allclose(logs[0]['loss'], logs[1]['loss'], atol=1e-3) and logs[0]['step'].equals(logs[1]['step'])


def test_a_sharded_model_is_distributed_tensors_of_which_each_process_holds_half(alike):
    whole = sum(tensor.numel() for tensor in weights(alike / 'one').values())
    held = [json.loads((alike / 'sharded' / f'held{rank}').read_text()) for rank in range(2)]
    assert [kinds for kinds, _ in held] == [['DTensor']] * 2
    assert sum(count for _, count in held) == whole and max(count for _, count in held) < .55 * whole


def _one_sgd_step(train, folder):
    without_dropout()
    utilities.launch(_sgd_step, train, folder / 'two', 4, processes=2)
    _sgd_step(train, folder / 'one', 8)


def _sgd_step(train, file, batch_size):
    accelerator = utilities.Accelerator(cpu=True)
    model = new_model()
    wrapped, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=.1))
    photos = utilities.Photos(train, 32, targets=np.unique(train['label'], return_inverse=True)[1])
    batches = list(utilities.loader(photos, batch_size, train=True, rank=accelerator.process_index,
                                    processes=accelerator.num_processes))[:2]
    config = CONFIG.override(clip_norm=1e9)  # a clipped gradient would hide its scale
    utilities.optimiser_step(accelerator, wrapped, optimiser, batches, torch.full((12,), .3), config)
    if accelerator.is_main_process:
        torch.save(model.state_dict(), file)


def test_an_sgd_step_of_two_processes_is_that_of_one(train, tmp_path):
    in_a_child(_one_sgd_step, train, tmp_path)
    one, two, before = torch.load(tmp_path / 'one'), torch.load(tmp_path / 'two'), new_model().state_dict()
    assert not same(one, before) and all(torch.allclose(one[name], two[name], atol=1e-6, rtol=0) for name in one)


def _resume_sharded(train, folder):
    torch.set_num_threads(1)
    for name, hours in (('whole', None), ('parts', 1e-9), ('parts', None)):
        config = SAVING.override(shard=True, max_hours=hours, batch_size=4)
        try:
            utilities.launch(utilities.fit, config, new_model(config), train, folder / name, processes=2)
        except utilities.Stopped as stopped:
            (folder / 'said').write_text(str(stopped))


def test_a_sharded_run_that_was_stopped_goes_on_bit_for_bit(train, tmp_path):
    in_a_child(_resume_sharded, train, tmp_path)
    assert 'after 1 of 4 steps; everything is saved' in (tmp_path / 'said').read_text()
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))


# What can happen to launched processes

def _refuse(words):
    raise ValueError(words)


def _die():
    if utilities.own_share()[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _count(folder):
    utilities.launch(lambda: (folder / f'{os.getpid()}').touch())  # within a launched process: an ordinary call


def _said(function, *arguments, folder, processes=2):
    """Writes the exception that a launch ends in."""
    try:
        utilities.launch(function, *arguments, processes=processes)
    except BaseException as error:
        (folder / 'said').write_text(f'{type(error).__name__}: {error}')


def said(function, *arguments, folder):
    child = SPAWN.Process(target=functools.partial(_said, function, *arguments, folder=folder))
    child.start()
    child.join()
    return (folder / 'said').read_text()


def test_what_a_launched_process_raises_arrives_as_itself(tmp_path):
    assert said(_refuse, 'the words', folder=tmp_path) == 'ValueError: the words'


def test_a_killed_process_is_one_sentence_and_does_not_leave_the_others_waiting(tmp_path):
    started = time.time()
    assert 'One of 2 processes was killed, most likely for want of memory' in said(_die, folder=tmp_path)
    assert time.time() - started < 50


def _die_while_the_other_waits_for_it():
    rank, _ = utilities.own_share()
    torch.distributed.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def test_the_reason_is_the_killed_process_and_not_the_lost_connection_to_it(tmp_path):
    assert 'One of 2 processes was killed, most likely for want of memory' in said(
        _die_while_the_other_waits_for_it, folder=tmp_path)


def test_every_process_is_launched_once(tmp_path):
    in_a_child(functools.partial(utilities.launch, processes=2), _count, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def _after_accelerate(folder):
    utilities.Accelerator(cpu=True)
    _said(_count, folder, folder=folder)


def test_where_processes_cannot_be_forked_any_more_the_reason_is_said(tmp_path):
    in_a_child(_after_accelerate, tmp_path)
    assert (tmp_path / 'said').read_text().startswith('ValueError: To launch a multi-')


def test_where_cuda_is_in_use_one_gpu_works_and_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.warns(UserWarning, match='1 of 2 GPUs works. For all of them restart the kernel'):
        assert utilities.launch(lambda: 'the result', processes=2) == 'the result'


def _stop(train, folder):
    torch.set_num_threads(1)
    config, pid = SAVING.override(epochs=1000, batch_size=4), os.getpid()

    def press():
        while not utilities.saved_states(folder / 'run/state'):
            time.sleep(.01)
        os.kill(pid, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    _said(utilities.fit, config, new_model(config), train, folder / 'run', folder=folder)


def test_the_stop_button_reaches_launched_processes_and_everything_is_saved(train, tmp_path):
    in_a_child(_stop, train, tmp_path)
    assert re.search('Stopped: run: it was interrupted after .* everything is saved', (tmp_path / 'said').read_text())
    assert utilities._is_whole(utilities.saved_states(tmp_path / 'run/state')[0])


def test_a_training_notebook_as_a_script_runs_in_processes_that_a_launcher_started(tiny_world, tmp_path):
    photos = str(tiny_world / 'train.csv')
    values = {'DEMO': True, 'OUT_DIR': str(tmp_path / 'runs'), 'TRAIN': photos, 'QUERY': photos, 'INDEX': photos,
              'SELECTION': [photos, photos], 'OVERRIDES': {'epochs': 1, 'batch_size': 4, 'effective_batch': 16,
                                                           'image_size': 32}}
    code = []
    for cell in (cell for cell in nbformat.read('train_vit_h_224.ipynb', 4).cells if cell.cell_type == 'code'):
        code.append(cell.source)
        if 'parameters' in cell.metadata.get('tags', []):
            code += [f'{name} = {value!r}' for name, value in values.items()]
    (tmp_path / 'script.py').write_text('\n\n'.join(code))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               tmp_path / 'script.py']
    environment = {**os.environ, 'PYTHONPATH': os.getcwd(), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / 'runs/vit_h_224_none'
    scores = pd.read_csv(run / 'scores.csv')
    assert scores['stage'].tolist() == ['untrained'] * 2 + ['ingredient'] * 2 and scores['mp5'].between(.05, 1).all()
    state = utilities.read_position(utilities.saved_states(run / 'state')[0])
    assert state['progress']['processes'] == 2 and state['progress']['step'] == 4
