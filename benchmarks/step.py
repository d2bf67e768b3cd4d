"""One training step of accumulated batches of 8, float32: fit's parts against a plain PyTorch loop.

    python benchmarks/step.py [--tower miniature|ViT-B-16]

The plain loop keeps both towers of the CLIP, with open_clip's default blocks. It has one parameter group a tensor, a head
with five dropped-out passes, and an ArcFace that mixes by a one-hot matrix of the whole batch. Head: 512 dimensions,
3 centres a class, 17,642 classes for ViT-B/16 and 360, the demo's, for the miniature. Each kind is a process of its own
that makes one step when asked, in turn; memory is the peak of its RssAnon, libraries included. Checked: without dropout
loss and every gradient are those of the plain loop (the largest difference, relative to the largest entry of all). The
bound is the image tower's own forward and backward pass, without head, loss and optimiser. A step has 4 batches, as in a
run; with ViT-B/16 2: the second comes on top of the gradients of the first (a third adds 3 % to the peak).
"""
import sys
import warnings
from pathlib import Path
from statistics import median

import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import utilities  # noqa: E402
from guie import training  # noqa: E402
from guie.resume import Progress  # noqa: E402

BATCH = 8
TOWERS = {'miniature': ('local-dir:media/miniature', 'miniature', 360, 'miniature', 4),
          'ViT-B-16': ('ViT-B-16', 'random', 17_642, 'ViT-B/16 at 224', 2),
          'quick': ('local-dir:media/miniature', 'miniature', 20, 'miniature', 4)}


def configuration(tower, checkpointed=False):
    model_name, pretrained, *_, batches = TOWERS[tower]
    return utilities.Config(model_name=model_name, pretrained=pretrained, batch_size=BATCH, effective_batch=BATCH * batches,
                            layer_lrs=((12, 1e-5),), checkpoint_activations=checkpointed)


def whole_clip(tower):
    torch.manual_seed(0)
    return open_clip.create_model(TOWERS[tower][0])


def some_batches(size, n_classes, count):
    generator = torch.Generator().manual_seed(1)
    return [{'image': torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8, generator=generator),
             'target': torch.randint(n_classes, (BATCH,), generator=generator)} for _ in range(count)]


class PlainModel(nn.Module):
    """open_clip's whole CLIP, and a head written as it is published."""

    def __init__(self, clip, head, mean, std):
        super().__init__()
        self.clip, self.linear = clip, nn.Linear(head.embedding.in_features, head.embedding.out_features, bias=False)
        self.linear.weight.data.copy_(head.embedding.weight)
        self.centers = nn.Parameter(head.centers.detach().clone())
        self.first, self.others = nn.Dropout(.1), nn.ModuleList(nn.Dropout(p) for p in head.DROPOUTS)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def forward(self, images):
        features = self.first(self.clip.encode_image((images.float() / 255 - self.mean) / self.std))
        embedding = torch.stack([self.linear(dropout(features)) for dropout in self.others]).mean(0)
        cosine = F.linear(F.normalize(embedding), F.normalize(self.centers))
        return cosine.view(len(cosine), -1, 3).max(2).values


def plain_loss(cosine, labels, margins):
    margin = margins[labels][:, None]
    sine = (1 - cosine ** 2).clamp(min=1e-7).sqrt()
    shifted = cosine * margin.cos() - sine * margin.sin()
    shifted = torch.where(cosine > (torch.pi - margin).cos(), shifted, cosine - (torch.pi - margin).sin() * margin)
    one_hot = F.one_hot(labels, cosine.shape[1]).float()
    return F.cross_entropy(30. * (one_hot * shifted + (1 - one_hot) * cosine), labels)


def build(tower, kind):
    """(model, batches, margins, function that makes a step of some batches and returns the loss)."""
    (_, _, n_classes, _, count), config = TOWERS[tower], configuration(tower, kind == 'checkpointed')
    margins = utilities.adaptive_margins(torch.arange(n_classes) % 47 + 4)
    facts = open_clip.get_model_config(config.model_name)
    batches = some_batches(facts['vision_cfg']['image_size'], n_classes, count)
    head = utilities.SubcenterHead(facts['embed_dim'], n_classes, dim=config.embedding_dim)
    if kind == 'plain':
        clip = whole_clip(tower)
        model = PlainModel(clip, head, clip.visual.preprocess_cfg['mean'], clip.visual.preprocess_cfg['std']).train()
        del clip, head
        optimiser = torch.optim.AdamW([{'params': [p], 'lr': 1e-5, 'weight_decay': 1e-3} for p in model.parameters()])

        def step(batches):
            total = 0.
            for batch in batches:
                loss = plain_loss(model(batch['image']), batch['target'], margins) / len(batches)
                loss.backward()
                total += loss.item()
            optimiser.step()
            optimiser.zero_grad()
            return total
        return model, batches, margins, step
    image_tower = utilities.load_image_tower(config.model_name, config.pretrained)
    if kind == 'tower':
        model = image_tower.train()

        def step(batches):
            for batch in batches:
                model(batch['image'] / 255).sum().backward()
            model.zero_grad()
            return 0.
        return model, batches, margins, step
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    run = training.prepare(accelerator, config, utilities.Embedder(image_tower, head), Path(), Progress(), 1000)
    return run.model, batches, margins, lambda batches: training.optimiser_step(run, batches, margins)[0]


def gradients(tower, kind):
    """Loss and gradients by name of two images, without dropout."""
    model, batches, margins, _ = build(tower, kind)
    model.eval()
    if kind == 'ours':  # random weights are those of the plain loop too
        model.tower.load_state_dict(whole_clip(tower).visual.state_dict())
    batch = {name: values[:2] for name, values in batches[0].items()}
    if kind == 'plain':
        loss = plain_loss(model(batch['image']), batch['target'], margins)
    else:
        loss = utilities.arcface_loss(model(batch['image'], classify=True), batch['target'], margins)
    loss.backward()
    names = {'linear.weight': 'head.embedding.weight', 'centers': 'head.centers'}
    return loss.item(), {names.get(name, name.replace('clip.visual.', 'tower.')): parameter.grad
                         for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(tower):
    """Largest relative difference of a gradient; ends the benchmark if gradients or loss differ too much."""
    (ours, own), (theirs, plain) = gradients(tower, 'ours'), gradients(tower, 'plain')
    timing.close(ours, theirs, 1e-4, f'{tower}, loss')
    if own.keys() != plain.keys():
        raise SystemExit(f'{tower}: other parameters have gradients: {sorted(own.keys() ^ plain.keys())[:3]}')
    whole = max(float(gradient.abs().max()) for gradient in plain.values())
    worst = max(float((own[name] - plain[name]).abs().max()) for name in own) / whole
    timing.close(worst, 0, 1e-4, f'{tower}, gradients')
    return worst


def work(tower, kind):
    """In a child process: a step of all batches at each question; at 'first' of one image, for what a first step makes."""
    warnings.simplefilter('ignore')
    _, batches, _, step = build(tower, kind)
    image = {name: values[:1] for name, values in batches[0].items()}

    def one(question):
        result, loss = timing.measured(lambda: step([image] if question == 'first' else batches))
        return result | {'loss': loss}
    timing.answer(one)


def rows_for(tower, options):
    small = tower != 'ViT-B-16'
    runs = {kind: [] for kind in ('ours', 'plain', 'tower' if small else 'checkpointed')}
    children = {kind: timing.Child(options, f'{tower},{kind}') for kind in runs}
    repeats = options.repeats * (15 if small and not options.quick else 1)  # short steps scatter more
    for turn in range(repeats + 1):
        for kind, child in children.items():  # the first turn makes the optimiser's state
            runs[kind].append(child.ask('' if turn else 'first'))
    for child in children.values():
        child.close()
    seconds = {kind: median(run['seconds'] for run in of_kind[1:]) for kind, of_kind in runs.items()}
    size = {kind: max(run['bytes'] for run in of_kind) / 1e9 for kind, of_kind in runs.items()}
    *_, name, count = TOWERS[tower]
    step = timing.Row(f'{name}, {count} × {BATCH} images', seconds['ours'], seconds['plain'], 's',
                      '≤ 0.90' if small else '≤ 1.0',
                      f'the tower alone: {seconds["tower"] / seconds["plain"]:.2f}' if small else '')
    return [step] if small else [
        step, timing.Row(f'{name}, peak memory', size['ours'], size['plain'], 'GB', '≤ 0.95'),
        timing.Row(f'{name}, activations recomputed, peak memory', size['checkpointed'], size['plain'], 'GB', '≤ 0.75')]


def main():
    options = timing.arguments(__doc__, repeats=1, tower=(str, 'miniature,ViT-B-16', 'one or several, with commas'))
    if options.work:
        return work(*options.work.split(','))
    rows, worst = [], 0
    for tower in ['quick'] if options.quick else options.tower.split(','):
        if tower not in TOWERS:
            raise SystemExit(f'There is no tower {tower}: choose {", ".join(TOWERS)}.')
        worst = max(worst, compare(tower))
        rows += rows_for(tower, options)
    timing.print_table(f'Training step, float32, {options.threads} threads, median of {options.repeats} interleaved steps '
                       f'(miniature: {15 * options.repeats}); gradients equal to {worst:.0e}', rows)


if __name__ == '__main__':
    main()
