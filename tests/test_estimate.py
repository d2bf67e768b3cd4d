"""The estimate counts a tower's operations and measures the machine."""
import time

import pytest
import torch

from guie import estimate, memory
from guie.config import Config
from guie.estimate import forward_cost, in_words, matmul_rate
from guie.towers import load_image_tower

MINIATURE = Config(model_name='local-dir:media/miniature', pretrained='miniature', image_size=64)


def products(side):
    """Operations of the miniature's matrix products, by hand: six blocks of width 192 in heads of 64, patches of 16."""
    tokens, width = (side // 16) ** 2 + 1, 192
    block = 12 * tokens * width ** 2 + 2 * tokens ** 2 * width
    return 2 * (6 * block + (tokens - 1) * 3 * 16 ** 2 * width + width * 128)


@pytest.mark.parametrize('side', [64, 96])
def test_the_operations_are_those_of_its_matrix_products(side):
    operations, parameters = forward_cost(MINIATURE.override(image_size=side))
    assert operations == pytest.approx(products(side), rel=.01)
    tower = load_image_tower('local-dir:media/miniature', 'miniature', side)
    assert parameters == sum(weight.numel() for weight in tower.parameters())


@pytest.mark.parametrize('name, published', [('regnety_032', 3.2e9), ('efficientnet_lite0', .407e9)])
def test_a_tower_of_timms_is_counted_once_also_where_timm_cannot_build_it_without_values(name, published):
    operations, _ = forward_cost(Config(model_name=f'timm:{name}', pretrained='random', image_size=224))
    assert operations == pytest.approx(2 * published, rel=.07)  # multiplications with additions; ours has no classes


def test_the_operations_of_a_published_tower_are_the_published_ones_and_nothing_is_downloaded():
    operations, parameters = forward_cost(Config())
    assert operations / 2e9 == pytest.approx(167.4, rel=.02) and parameters / 1e6 == pytest.approx(632, rel=.01)


def test_training_is_three_passes_of_each_epoch_one_where_the_tower_stays_four_where_it_is_recomputed():
    one = forward_cost(MINIATURE)[0]

    def training_cost(config, images):
        return estimate.training_cost(config, images, 5)

    assert training_cost(MINIATURE.override(epochs=2), 10) == 2 * 10 * 3 * one
    assert training_cost(MINIATURE.override(trains='head'), 10) == 10 * one
    cached = MINIATURE.override(trains='cached head', epochs=20)
    assert training_cost(cached, 10) == 10 * one
    assert training_cost(cached.override(augmentation='flip'), 10) == 20 * one
    assert training_cost(MINIATURE.override(checkpoint_activations=True), 10) == 10 * 4 * one
    larger = MINIATURE.override(image_size=96)
    staged = MINIATURE.override(stages=({'trains': 'head'}, {'image_size': 96}))
    assert training_cost(staged, 10) == 10 * one + training_cost(larger, 10)


@pytest.mark.parametrize('gigabytes, passes', [(80, 3), (15, 4)])
def test_a_pass_more_is_counted_where_the_gpu_has_to_recompute(monkeypatch, gigabytes, passes):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(memory, 'available_memory', lambda: (gigabytes * 1e9, 'given'))
    monkeypatch.setattr(memory, 'half_here', lambda config: torch.float16)
    assert estimate.training_cost(Config(), 10, 17_642) == 10 * passes * forward_cost(Config())[0]


def test_the_rate_is_that_of_products_on_this_machine():
    rate, matrix = matmul_rate(), torch.ones(1024, 1024)
    best = float('inf')
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    assert .2 < rate * best / (2 * 1024 ** 3) < 5  # others may work on this machine


@pytest.mark.parametrize('seconds, words', [
    (.2, 'about 1 s'), (42, 'about 42 s'), (150, 'about 2.5 min'), (1800, 'about 30 min'), (7200, 'about 2.0 h'),
    (40 * 3600, 'about 40 h')])
def test_times_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words
