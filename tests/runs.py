"""What the tests of training share: the settings, models and weights of small runs."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from guie import model, training
from guie.config import Config
from guie.images import ImageDataset, loader
from guie.model import Embedder, SubcenterHead
from guie.resume import Progress
from guie.towers import TowerSpec

CONFIG = Config(model_name='local-dir:media/miniature', pretrained='miniature', image_size=32, layer_lrs=((6, 1e-4),),
                head_lr=3e-3, scale=16., embedding_dim=32, batch_size=8, effective_batch=16, epochs=3, warmup_steps=2,
                save_minutes=1000)
SAVING = CONFIG.override(save_minutes=0, epochs=1)  # 4 steps of 16 images, a state after each
HALF = SAVING.override(epochs=2, precision='fp16', checkpoint_activations=True)
torch.set_num_threads(1)  # runs this small would only wait for the other threads
SPAWN = multiprocessing.get_context('spawn')


def new_model(config=CONFIG, classes=12):
    """The miniature CLIP's tower and a new head."""
    return model.new_model(config, classes)


def small_model(classes=12):
    """An Embedder of 1,800 weights, for what holds with any tower."""
    torch.manual_seed(0)
    spec = TowerSpec('small', '', 32, (.5,) * 3, (.5,) * 3, '', 8, {})
    tower = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 8))
    return Embedder(tower, SubcenterHead(8, classes, dim=32), spec=spec)


def weights(run):
    """{name: tensor} that a finished run wrote."""
    return load_file(run / 'model.safetensors')


def same(first, second):
    """Whether two {name: tensor} agree bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first | second)


def apart(first, second):
    """The largest difference of two {name: tensor}."""
    return max(float((first[name] - second[name]).abs().max()) for name in first | second)


def contents(folder):
    """{path: bytes} of everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def one_of_two(rank, code, *given):
    """Starts Python code as one of two processes that work alone, as accelerate launch does."""
    environment = os.environ | {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank)}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, given)], env=environment)


def is_one_sentence(error):
    """Whether the message of what pytest.raises caught is one line that ends."""
    return '\n' not in str(error.value) and str(error.value).endswith('.')


def before_step(monkeypatch, act):
    """From now on act(number) is called before each optimiser step, counted from 1."""
    original, count = training.optimiser_step, iter(range(1, 10**6))

    def hooked(*arguments):
        act(next(count))
        return original(*arguments)

    monkeypatch.setattr(training, 'optimiser_step', hooked)


def press_stop_before(step):
    """For before_step: the stop button, pressed once."""
    return lambda number: number == step and os.kill(os.getpid(), signal.SIGINT)


def without_dropout(monkeypatch):
    """Training that depends on no random mask: those of two processes are not those of one."""
    monkeypatch.setattr(torch.nn.functional, 'dropout', lambda features, *_, **__: features)


def wait_for(condition, alive=lambda: True, seconds=120):
    """Waits for a condition, at most so long, and while alive() holds."""
    until = time.time() + seconds
    while not condition():
        assert alive() and time.time() < until, 'what was waited for did not happen'
        time.sleep(.005)


def one_step(train, config, **options):
    """The Embedder after one step of SGD over 16 images, shared by all processes, without dropout."""
    model, accelerator = new_model(), Accelerator(cpu=True)
    run = training.prepare(accelerator, config, model, None, Progress(), 1)
    run.optimiser = torch.optim.SGD(model.parameters(), **options)
    run.wrapped.eval()
    dataset = ImageDataset(train, 32, targets=np.unique(train['label'], return_inverse=True)[1])
    batches = loader(dataset, config.batch_size, train=True, rank=accelerator.process_index,
                     processes=accelerator.num_processes)
    count = 16 // (config.batch_size * accelerator.num_processes)
    assert training.optimiser_step(run, list(batches)[:count], torch.full((12,), .3))[1]
    return model


def watch_half(monkeypatch, scale=2. ** 17):
    """A list that gets a row each optimiser step: loss, whether the weights moved, whether it says so, the scale of fp16."""
    seen, step, scaler = [], training.optimiser_step, torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device, init_scale=scale, enabled=enabled))

    def held(model):
        return [(parameter.to_local() if hasattr(parameter, 'to_local') else parameter).detach().clone()
                for parameter in model.parameters()]

    def watched(run, *rest):
        before = held(run.model)
        loss, says = step(run, *rest)
        moved = any(not torch.equal(old, new) for old, new in zip(before, held(run.model)))
        seen.append({'loss': loss, 'moved': moved, 'says': says, 'scale': run.scaler.get_scale()})
        return loss, says

    monkeypatch.setattr(training, 'optimiser_step', watched)
    return seen


def check_half(seen, run):
    """A gradient too large for fp16 lowers the scale and leaves weights and learning rate, as watch_half saw it."""
    assert seen['moved'].equals(seen['says']) and seen['loss'].notna().all()
    assert 1 <= seen['moved'].argmax() <= 5 and seen['moved'].iloc[-3:].all()  # skipped until the scale fits
    assert seen['scale'].tolist() == (2. ** (17 - (~seen['moved']).cumsum())).tolist()
    lr = pd.read_csv(run / 'log.csv')['lr']
    assert (lr.diff().iloc[1:] != 0).tolist() == seen['moved'].iloc[:-1].tolist()
