"""Estimate: about how long towers will take on this machine, before they are loaded."""
import os
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from guie.distributed import autocast_dtype, best_device, processes_here
from guie.memory import fitted
from guie.model import Embedder, SubcenterHead
from guie.towers import tower_without_values


def forward_cost(config):
    """(floating point operations, parameters) of a configuration's image tower for one image; a multiplication and an
    addition count as two. Nothing is downloaded or computed: torch's own counter needs shapes alone."""
    tower = tower_without_values(config)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, config.image_size, config.image_size))
    return counter.get_total_flops(), sum(weight.numel() for weight in tower.parameters())


def matmul_rate(precision='auto', side=1024, seconds=.2):
    """Floating point operations a second that this process's device reaches in large matrix products, measured here."""
    device = best_device()
    side, dtype = (4 * side, autocast_dtype(precision)) if device.type == 'cuda' else (side, None)
    matrix = torch.ones(side, side, device=device, dtype=dtype or torch.float32)
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float('inf'):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    if device.type == 'cuda':
        del matrix
        torch.cuda.empty_cache()  # for what the notebook launches
    return 2 * side ** 3 / best


def recomputes(config, classes):
    """Whether training on so many classes recomputes activations on this machine's GPU, as `fitted` decides it."""
    with torch.device('meta'):
        tower = tower_without_values(config)
        head = SubcenterHead(tower.spec.width, classes, dim=config.embedding_dim, subcenters=config.subcenters)
    return fitted(config, Embedder(tower, head), processes_here()).checkpoint_activations


def training_cost(config, images, classes):
    """Floating point operations of all stages of a run: once forward, twice that backward, once more if recomputed; for a
    cached head one pass over the images, or two with mirrored ones."""
    total = 0
    for stage in config.each_stage():
        passes = stage.epochs * (1 if stage.trains == 'head' else 4 if recomputes(stage, classes) else 3)
        if stage.trains == 'cached head':
            passes = 2 if stage.augmentation == 'flip' else 1
        total += images * passes * forward_cost(stage)[0]
    return total


def in_words(seconds):
    """A time as people say it."""
    for unit, length in (('h', 3600), ('min', 60)):
        if seconds >= 1.5 * length:
            return f'about {seconds / length:.{int(seconds < 10 * length)}f} {unit}'
    return f'about {max(seconds, 1):.0f} s'


def device_in_words():
    """'2 × Tesla T4, 15 GB each' or 'CPU, 2 cores, no GPU'."""
    if best_device().type == 'cpu':
        return f'CPU, {os.cpu_count()} cores, no GPU'
    card, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return f'{f"{count} × " * (count > 1)}{card.name}, {card.total_memory / 1e9:.0f} GB{" each" * (count > 1)}'
