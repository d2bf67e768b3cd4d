"""python -m tests.launched FOLDER: what tests let two launched processes do, by the name in FOLDER/task."""
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from guie import training
from guie.distributed import rank_and_world_size, report_error
from guie.embedding import selection_score
from guie.errors import InputError, Stopped
from guie.sharding import is_sharded
from guie.splits import Splits
from tests.runs import CONFIG, HALF, SAVING, new_model, one_step, wait_for, watch_half, without_dropout

ALIKE = CONFIG.override(augmentation='cutout', validate_every=4)  # 12 steps of 16 images, on any number of processes


def train_without_dropout(folder):
    """What guie.training does, on as many processes with the same result."""
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch)
        training.main(folder)


def runs(folder):
    """The runs and the step that test_distributed.py and test_sharding.py look at."""
    splits, rank = Splits.load(folder / 'splits.csv'), rank_and_world_size()[0]
    train, validate = splits['train'], partial(selection_score, splits=splits)
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch)
        config = ALIKE.override(batch_size=4, tracker='tensorboard' if find_spec('tensorboard') else '')
        training.fit(config, new_model(config), train, folder / 'two', validate)
        model = new_model(config)
        training.fit(config.override(shard=True, checkpoint_activations=True), model, train, folder / 'sharded', validate)
        (folder / f'held{rank}.json').write_text(json.dumps(held_by(model)))
    model = one_step(train, CONFIG.override(batch_size=4, max_grad_norm=1e9), lr=.1)
    torch.save(model.state_dict(), folder / f'step{rank}.pt')
    for name, hours in (('whole', None), ('parts', 1e-9), ('parts', None)):
        config = SAVING.override(shard=True, trains='last 2', max_hours=hours, batch_size=4)
        try:
            training.fit(config, new_model(config), train, folder / name)
        except Stopped as stopped:
            (folder / 'stopped').write_text(str(stopped))
    for name, shard in (('half', False), ('half-sharded', True)):
        with pytest.MonkeyPatch.context() as patch:
            seen, config = watch_half(patch), HALF.override(batch_size=4, shard=shard)
            training.fit(config, new_model(config), train, folder / name)
        pd.DataFrame(seen).to_csv(folder / name / f'seen{rank}.csv', index=False)


def held_by(model):
    """(kinds of parameters, how many numbers of them this process holds)."""
    held = sum((parameter.to_local() if is_sharded(model) else parameter).numel() for parameter in model.parameters())
    return sorted({type(parameter).__name__ for parameter in model.parameters()}), held


def refuse(folder):
    """Prints and raises, in each process."""
    rank, processes = rank_and_world_size()
    for place in ('process', 'printed'):  # both print at the same time, and neither ends before the other has
        if place == 'printed':
            for _ in range(300):
                print(f'process {rank} of {processes} prints ü')
        (folder / f'{place} {os.getpid()}').touch()
        wait_for(lambda place=place: len(list(folder.glob(f'{place} *'))) >= processes)
    raise InputError(f'The words of process {rank}.')


def main(folder):
    task = folder / 'task'
    globals()[task.read_text() if task.exists() else 'train_without_dropout'](folder)


if __name__ == '__main__':
    report_error(sys.argv[1], lambda: main(Path(sys.argv[1])))
