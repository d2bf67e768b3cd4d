"""Training: the loop, readable from top to bottom; `accelerate launch -m guie.training RUN_DIR` runs it on several GPUs."""
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object

from guie.checkpoints import holds, load_run, open_checkpoint, save_run
from guie.config import Config
from guie.distributed import any_process, autocast_dtype, best_device, report_error, stop_requested, stop_signal
from guie.embedding import readable_loading, selection_score
from guie.errors import Diverged, InputError, MemoryFull, Stopped
from guie.files import ATTACHED, printable, progress_bar, state_hash, user_path, write_text
from guie.images import ImageDataset, loader
from guie.losses import adaptive_margins, arcface_loss
from guie.memory import fitted
from guie.model import freeze, new_model, param_groups, resize
from guie.resume import BEST, Progress, Run, RunLog, copy_attached_state, restore_state, run_lock, save_checkpoint
from guie.sharding import full_state, load_sharded, save_sharded, shard
from guie.splits import Splits, describe
from guie.towers import checkpoint_activations
from guie.trackers import chosen_trackers, track, trackers


def fit(config, model, train, run_dir, validate=None, *, search=ATTACHED, epoch=0, started=None):
    """Fine-tunes the Embedder on the labelled images by ArcFace and saves the run.
    model: Embedder with a SubcenterHead of as many classes as `train` (DataFrame path, label) has; trained in place.
    run_dir: resumed from the state in it, or from one that a run of the same name and configuration left below a folder of
    `search`. validate: model -> mP@5 on selection data, called every config.validate_every steps and at the end; the run
    then keeps the best weights, else the last ones. epoch: number of the first. started: from when config.max_hours count;
    None is now. Writes model.safetensors, config.json, log.csv, state/, and if needed unreadable.txt, not_finite.txt, guie/
    (TensorBoard's). Stopped: config.max_hours are over, or it was interrupted. ValueError: data and head disagree, or an
    unknown tracker. FloatingPointError: the loss stays NaN. OSError: too many unreadable images, or a disk that refuses."""
    started = started or time.time()
    labels, targets, counts = np.unique(train['label'], return_inverse=True, return_counts=True)
    if model.head is None or len(model.head.centers) != len(labels) * model.head.subcenters:
        raise InputError(f'The head must have {len(labels)} classes, as many as the images have labels.')
    accelerator = Accelerator(mixed_precision='no', cpu=best_device().type == 'cpu', step_scheduler_with_optimizer=False,
                              log_with=chosen_trackers(config.tracker), project_dir=user_path(run_dir),
                              kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    config = fitted(config, model, accelerator.num_processes)
    batch, accumulate, images = step_of(config, len(train), accelerator.num_processes)
    steps = config.epochs * (len(train) // images)
    if images != config.effective_batch:
        accelerator.print(short_step(config, len(train), batch, images))
    dataset = ImageDataset(train, model.spec.image_size, config.augmentation, seed=config.seed, targets=targets,
                           replace=True, max_unreadable=config.max_unreadable)
    progress = Progress(epoch=epoch, data=describe(train))
    run = prepare(accelerator, config, model, user_path(run_dir), progress, steps)
    margins = adaptive_margins(counts, low=config.margin_min, width=config.margin_width).to(accelerator.device)
    with run_lock(run.folder) if run.main else nullcontext(), stop_signal() as pressed, readable_errors(run, dataset):
        if run.main:
            copy_attached_state(run.folder, config, progress.data, search)
        accelerator.wait_for_everyone()
        restored = restore_state(run, steps)
        if run.main:
            log = RunLog(run, restored)
            config.save(run.folder / 'config.json')
        with trackers(run, steps), progress_bar(total=steps, initial=progress.step, desc=run.folder.name,
                                                disable=not run.main) as bar:
            while progress.step < steps:
                if len(train) - progress.used < images:  # resumed with larger steps
                    progress.epoch, progress.used = progress.epoch + 1, 0
                batches = loader(dataset, batch, train=True, epoch=progress.epoch, start=progress.used,
                                 rank=accelerator.process_index, processes=accelerator.num_processes, workers=config.workers)
                for batches_of_step in zip(*[iter(batches)] * accumulate):  # so many batches at a time
                    rate = run.schedule.get_last_lr()[-1]
                    loss, moved = optimiser_step(run, batches_of_step, widened(margins, progress.epoch, config))
                    if moved:
                        run.schedule.step()
                    elif math.isnan(loss):
                        note_skipped(run, batches_of_step, dataset)
                    progress.step, progress.used = progress.step + 1, progress.used + images
                    if len(train) - progress.used < images:
                        progress.epoch, progress.used = progress.epoch + 1, 0
                    bar.update()
                    bar.set_postfix(loss=f'{loss:.3f}')
                    score = score_when_due(run, validate, steps)
                    if run.main:
                        track(run, log.add(progress.step, loss, rate, images, score))
                    save_when_due(run, dataset, steps, started, bool(pressed))
        finish(run, validate, write_unreadable(run, gather_object(dataset.unreadable)))
        if run.saved[0] < progress.step:
            save_checkpoint(run)


def step_of(config, images, processes):
    """(images of a batch on each device, batches of a step, images of a step on all devices): as in config, or fewer if
    there are too few images, or if the devices do not make a whole step of it."""
    if images < processes:
        raise InputError(f'{images} images cannot be shared by {processes} processes: take more images or fewer GPUs.')
    batch = min(config.batch_size, images // processes, max(1, config.effective_batch // processes))
    accumulate = max(1, min(config.effective_batch, images) // (batch * processes))
    return batch, accumulate, batch * processes * accumulate


def widened(margins, epoch, config):
    """The margins of an epoch, which grow by config.margin_growth in each, to at most a right angle."""
    return (margins + config.margin_growth * epoch).clamp_max(math.pi / 2)


def short_step(config, images, batch, taken):
    """A sentence: why a step takes other than config.effective_batch images."""
    if images < config.effective_batch:
        return f'{images} images do not fill a step of {config.effective_batch} (effective_batch): it takes {taken} of them.'
    return (f'A step takes {taken} images, not {config.effective_batch} (effective_batch), since each process takes {batch} '
            f'at a time: set effective_batch to a multiple of that by the number of GPUs.')


def prepare(accelerator, config, model, run_dir, progress, steps):
    """The Run: optimiser, schedule and precision, a copy of the model on each GPU or, with config.shard, a part of it."""
    torch.manual_seed(config.seed + accelerator.process_index)  # for dropout; the initial weights are made before
    if config.checkpoint_activations:
        checkpoint_activations(model.tower)
    freeze(model, config.trains)
    if config.shard:
        shard(model.to(accelerator.device))
    groups = [{name: group[name] for name in ('params', 'lr', 'weight_decay')} for group in param_groups(model, config)]
    optimiser = torch.optim.AdamW(groups, fused=True)  # three times as fast on a CPU
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, partial(learning_rate_share, steps=steps, warmup=min(config.warmup_steps, steps // 2)))
    half = autocast_dtype(config.precision)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=half == torch.float16)
    model.train()
    wrapped = model
    if config.shard:
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: save_sharded(model, optimiser, folder))
        accelerator.register_load_state_pre_hook(lambda models, folder: load_sharded(model, optimiser, folder))
    else:
        wrapped, optimiser = accelerator.prepare(model, optimiser)
    return Run(run_dir, config, accelerator, model, wrapped, optimiser, schedule, scaler, half, progress, (-1, time.time()))


def learning_rate_share(step, steps, warmup):
    """Share of the learning rate at an optimiser step: linear from 0 over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return .5 + .5 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))


def optimiser_step(run, batches, margins):
    """One optimiser step over several batches: (mean loss, whether the weights moved).
    If loss or gradient is not finite, the weights stay and the loss is NaN. If only fp16's scale was too large for the
    gradient, the weights stay too, but the scaler halves its scale and the loss keeps its value."""
    total, device, scaler = 0.0, run.accelerator.device, run.scaler
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else run.accelerator.no_sync(run.wrapped):
            with torch.autocast(device.type, dtype=run.half, enabled=run.half is not None):
                cosine = run.wrapped(batch['image'].to(device, non_blocking=True), classify=True)
            loss = arcface_loss(cosine, batch['target'].to(device), margins, run.config.scale) / len(batches)
            scaler.scale(loss).backward()
        total += loss.detach()
    total = run.accelerator.reduce(total, 'mean').item()
    moved = rescaled = False
    if math.isfinite(total):
        scaler.unscale_(run.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
        moved = math.isfinite(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm)  # a sharded model has the former
        rescaled = not moved and scaler.is_enabled() and scaler.get_scale() > 1
        if moved or scaler.is_enabled():  # it skips such a gradient, and lowers its scale
            scaler.step(run.optimiser)
            scaler.update()
    run.optimiser.zero_grad()
    return total if moved or rescaled else math.nan, moved


def note_skipped(run, batches, dataset):
    """Notes the images of a skipped step, and stops the run after more than config.max_skipped of them."""
    progress, config, file = run.progress, run.config, run.folder / 'not_finite.txt'
    progress.skipped += 1
    indices = run.accelerator.gather(torch.cat([batch['index'] for batch in batches]).to(run.accelerator.device)).tolist()
    if run.main:
        with file.open('a', encoding='utf-8', errors='surrogateescape') as lines:
            lines.writelines(f'step {progress.step + 1}\t{dataset.paths[index]}\n' for index in indices)
    if progress.skipped > config.max_skipped:
        raise Diverged(
            f'The loss or its gradient was not finite in {progress.skipped} steps (max_skipped is {config.max_skipped}): '
            f'look at the images named in {file}, lower head_lr or layer_lrs, or set precision="no"; the last saved state '
            f'is untouched.')
    run.accelerator.print(f'step {progress.step + 1}: loss or gradient not finite, left out; its images are in {file}')


def save_when_due(run, dataset, steps, started, pressed):
    """Saves a checkpoint at the end of an epoch, every config.save_minutes, and before it raises Stopped."""
    config = run.config
    late = config.max_hours is not None and time.time() - started > config.max_hours * 3600
    stop, due = any_process(run.accelerator, late or pressed or stop_requested(run.folder),
                            time.time() - run.saved[1] > config.save_minutes * 60)
    if stop or due or not run.progress.used:
        write_unreadable(run, gather_object(dataset.unreadable))
        save_checkpoint(run, required=stop)
        run.saved = run.saved[0], time.time()
    if stop:
        reason = f'{config.max_hours} hours are over' if late else 'it was interrupted'
        raise Stopped(f'{run.folder.name}: {reason} after {run.progress.step} of {steps} steps; everything is saved, run it '
                      f'again to resume.')


def score_when_due(run, validate, steps):
    """validate_and_save_best every config.validate_every steps and after the last; else None."""
    every, step = run.config.validate_every, run.progress.step
    return validate_and_save_best(run, validate) if validate and every and (step % every == 0 or step == steps) else None


def validate_and_save_best(run, validate):
    """Scores the model on selection data, all processes together; saves it if it is the best so far -> the score."""
    run.model.eval()
    score = torch.tensor(float(validate(run.model)), device=run.accelerator.device)
    run.model.train()
    score = float(run.accelerator.reduce(score, 'mean'))
    if score > run.progress.best:
        save_weights(run, BEST, score=score, step=run.progress.step)
    run.accelerator.print(f'step {run.progress.step}: selection mP@5 {score:.3f}')
    run.progress.best = max(run.progress.best, score)
    return score


def save_weights(run, file='model.safetensors', **facts):
    """Saves the run's weights, by one process. A file that has them already, and perhaps a projection, stays."""
    state = full_state(run.model)
    if run.main and not holds(run.folder / file, state):
        save_run(run.folder, run.model, run.config, state=state, file=file, data=run.progress.data, **facts)
    run.accelerator.wait_for_everyone()


def finish(run, validate, unreadable):
    """Ends a run: saves its weights if no better ones are kept, prints their hash and which images could not be read."""
    best, final, scored = run.folder / BEST, run.folder / 'model.safetensors', validate and run.config.validate_every
    if scored and not run.progress.step:
        validate_and_save_best(run, validate)
    if scored and run.main and best.exists():
        best.replace(final)
    run.accelerator.wait_for_everyone()
    if not scored or not final.exists():
        save_weights(run, step=run.progress.step)
    if run.main:
        print(f'{run.folder.name}: hash of the weights {state_hash(open_checkpoint(run.folder))}')
        if unreadable:
            print(f'{len(unreadable)} images could not be read and were replaced by others of their class: '
                  f'{run.folder / "unreadable.txt"}, first {printable(unreadable[0])}')
    run.model.eval()


@contextmanager
def readable_errors(run, dataset):
    """Turns errors of data loading and of a full GPU into one sentence, and lists the unreadable images where they end it.
    A killed process is noticed at any moment, also in the middle of a step, so no state is saved then."""
    name = run.folder.name
    try:
        with readable_loading(name, Stopped, 'set workers lower (0 loads in the notebook itself) and run it again; it '
                              'resumes from its last state'):
            yield
    except torch.OutOfMemoryError as error:
        raise MemoryFull(
            f'{name}: the GPU ran out of memory at batch_size {run.config.batch_size}: halve it (the step stays the same, '
            f'more batches are accumulated) and run it again; it resumes from its last state.') from error
    except OSError:
        write_unreadable(run, dataset.unreadable)
        raise


def write_unreadable(run, found):
    """Adds paths to unreadable.txt, which also holds those of earlier sessions; returns all of them. Each path is a line, a
    newline in it \\n."""
    file = run.folder / 'unreadable.txt'
    before = os.fsdecode(file.read_bytes()).split('\n')[:-1] if file.exists() else []
    paths = sorted({*before, *(path.replace('\n', '\\n') for path in found)})
    try:
        if run.main and paths != before:
            write_text(file, '\n'.join(paths) + '\n')
    except OSError as error:  # they are kept in memory for the next time
        print(error)
    return paths


def write_job(config, splits, run_dir, **options):
    """Writes what `accelerate launch -m guie.training RUN_DIR` reads, on this machine or on several: RUN_DIR/job/."""
    job = user_path(run_dir) / 'job'
    config.save(job / 'config.json')
    splits.save(job / 'splits.csv')
    write_text(job / 'options.json', json.dumps(options))


def run_job(config, splits, run_dir, *, weights=None, **options):
    """fit from the pretrained tower and a new head, or from the checkpoint `weights`; options are fit's. ValueError for a
    configuration of several stages or of a cached head, which utilities.train trains."""
    if config.stages or config.trains == 'cached head':
        raise InputError('This configuration has stages, or a head on cached vectors: train it by utilities.train, which '
                         'starts the processes itself.')
    model = load_run(weights, dim=None) if weights else new_model(config, splits['train']['label'].nunique())
    resize(model, config.image_size, config.overlap)
    validate = partial(selection_score, splits=splits, pixels={}, workers=config.workers)
    fit(config, model, splits['train'], run_dir, validate if config.validate_every else None, **options)


def main(run_dir):
    """In a launched process: runs what write_job wrote."""
    job = Path(run_dir) / 'job'
    run_job(Config.load(job / 'config.json'), Splits.load(job / 'splits.csv'), run_dir,
            **json.loads((job / 'options.json').read_text()))


if __name__ == '__main__':
    report_error(sys.argv[1], lambda: main(sys.argv[1]))
