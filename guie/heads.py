"""Heads: a head trained in seconds on vectors that a frozen tower gave once."""
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from guie.checkpoints import holds, load_run, save_run
from guie.distributed import best_device
from guie.embedding import embed, embed_all
from guie.errors import Diverged, InputError
from guie.files import printable, progress_bar, user_path, write_text
from guie.losses import adaptive_margins, arcface_loss
from guie.model import Embedder, SubcenterHead, new_model, resize
from guie.projection import MAX_DIM, Projection, dims_of, fit_pca
from guie.resume import LOGGED, refuse_other_run, run_lock
from guie.retrieval import codes
from guie.scores import score_table, selection_mp5
from guie.splits import SELECTION, describe


def fit_head(vectors, labels, *, dim=512, subcenters=1, scale=16., margins=(0., 0.), lr=2.5e-4, class_lr=1e-2,
             weight_decay=1e-6, dropout=.2, batch_size=128, epochs=20, norm=False, seed=5, head_seed=5,
             validate=None, report=None, device=None):
    """Trains a head on cached vectors by Adam, at a constant rate -> SubcenterHead (d -> dim) with its classes, in
    evaluation mode on the CPU.
    vectors: float32 (n, d), an array or a memory map, rows of length 1; several towers' may be joined by concatenate, and
    mirrored images be rows of their own. labels: n hashable values; what is equal (==) is one class. The loss is the
    cross-entropy of cosines to the classes, times scale; with margins (radians of the most frequent class, added for the
    rarest one) it is ArcFace, with several subcenters sub-centre ArcFace. class_lr: rate of the classes. validate:
    SubcenterHead -> score, after each epoch; then the best epoch's head is returned, else the last one's. report: called
    with (step, loss, score) after each epoch.
    ValueError: rows and labels that do not fit, missing labels, NaN or infinite rows, fewer than two classes, too small a
    batch. FloatingPointError: the loss is not finite."""
    targets = classes_of(labels)
    counts = np.bincount(targets)
    check_vectors(vectors, targets, len(counts))
    if batch_size < 1 + norm:
        raise InputError(f'batch_size is {batch_size}: give at least {1 + norm}.')
    device, generator = device or best_device(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    head = SubcenterHead(vectors.shape[1], len(counts), dim=dim, subcenters=subcenters, norm=norm, seed=head_seed)
    head.to(device)
    margin = adaptive_margins(counts, low=margins[0], width=margins[1]).to(device)
    optimiser = torch.optim.Adam([{'params': head.embedding.parameters(), 'lr': lr, 'weight_decay': weight_decay},
                                  {'params': [head.centers], 'lr': class_lr}], fused=True)
    targets, batch_size, best = torch.from_numpy(targets), min(batch_size, len(targets)), (-np.inf, state_of(head))
    steps = len(targets) // batch_size
    with progress_bar(total=epochs * steps, desc='head') as bar:
        for epoch in range(epochs):
            order, total = torch.randperm(len(targets), generator=generator), 0.
            for rows in order[:steps * batch_size].split(batch_size):
                total += head_step(head.train(), optimiser, vectors, targets, rows, margin, scale, dropout)
                bar.update()
            loss = float(total) / steps
            if not np.isfinite(loss):
                raise Diverged(f'The loss of the head is {loss} in epoch {epoch + 1}: lower its learning rates.')
            bar.set_postfix(loss=f'{loss:.3f}')
            score = validate(head.eval()) if validate else None
            if score is not None and np.isnan(score):
                raise InputError('The validation of the head is NaN: give it queries whose objects the index shows too.')
            if score is None or score > best[0]:
                best = best[0] if score is None else score, state_of(head)
            if report:
                report((epoch + 1) * steps, loss, score)
    head.load_state_dict(best[1])
    return head.cpu().eval()


def label_codes(labels):
    """(equal integers 0, 1, … for equal labels, the labels so numbered, in the order in which they come). ValueError: a
    label is missing."""
    labels = labels.tolist() if hasattr(labels, 'tolist') else list(labels)
    missing = pd.Series(labels, dtype=object).isna().to_numpy()
    if missing.any():
        raise InputError(f'{missing.sum():,} of {len(labels):,} labels are missing, first that of row {missing.argmax()}: '
                         f'leave these rows out.')
    return codes(labels), [*dict.fromkeys(labels)]


def classes_of(labels):
    """The class of each label, int (n,): classes are numbered as their labels sort or, if these do not, as they come."""
    shown, known = label_codes(labels)
    ranks = np.arange(len(known))
    with suppress(TypeError):  # as of texts and numbers together
        ranks[sorted(ranks, key=known.__getitem__)] = np.arange(len(known))
    return ranks[shown]


def state_of(head):
    """A copy of a head's tensors."""
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def head_step(head, optimiser, vectors, targets, rows, margin, scale, dropout):
    """One step over some rows of vectors -> the loss, a tensor without gradient."""
    batch = torch.from_numpy(np.ascontiguousarray(vectors[rows.numpy()], np.float32)).to(margin.device)
    embedding = head.embedding(F.dropout(head.norm(batch), dropout))  # less than the five masks of the published head
    loss = arcface_loss(head.cosine(embedding), targets[rows].to(margin.device), margin, scale)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


def check_vectors(vectors, targets, classes, part=8192):
    """ValueError unless there is a finite vector for each label, and two classes."""
    if vectors.ndim != 2 or len(vectors) != len(targets):
        raise InputError(f'{vectors.shape} vectors have {len(targets)} labels: give one label a row.')
    if classes < 2:
        raise InputError(f'The vectors are of {classes} classes: a head tells classes apart, so give at least 2.')
    for start in range(0, len(vectors), part):
        finite = np.isfinite(vectors[start:start + part]).all(1)
        if not finite.all():
            raise InputError(f'Vector {start + int(finite.argmin())} holds NaN or infinite values: leave it out or embed it '
                             f'again.')


def head_gains(vectors, splits, counts, dim=64, **options):
    """What a head brings that is trained on few or many classes: DataFrame classes, images (to train on), mp5, low, high (of
    never-seen objects at `dim` numbers, as in score_table). Row 0 is the vectors as they are.
    vectors: {'pca', 'query', 'index'} of embed_all, at the tower's full width; the images of 'pca' are trained on. counts:
    numbers of classes, of one order; those below 2 are left out. options: of fit_head, but for its dim."""
    labels = splits['pca']['label'].reset_index(drop=True)
    (shown, known), rows = label_codes(labels), []
    order = np.random.default_rng(5).permutation(len(known))
    for count in dict.fromkeys([0, *(min(count, len(order)) for count in counts if min(count, len(order)) > 1)]):
        chosen, points = np.isin(shown, order[:count]), vectors
        if count:
            head = fit_head(vectors['pca'][chosen], labels[chosen], **options)
            points = {name: projected(head, vectors[name]) for name in ('pca', 'query', 'index')}
        score = score_table('', '', points, splits, dims=[dim]).iloc[0]
        rows.append({'classes': count, 'images': int(chosen.sum()), **score[['mp5', 'low', 'high']]})
    return pd.DataFrame(rows)


class Mirrored(nn.Module):
    """An Embedder that sees each image in a mirror."""

    def __init__(self, model):
        super().__init__()
        self.model, self.spec = model, model.spec

    def forward(self, images):
        """As the Embedder's."""
        return self.model(images.flip(3))


def train_head(config, splits, run_dir, *, weights=None, keep_classes=False):
    """Trains a run whose tower stays as it is (Config.trains 'cached head'), and saves it -> its Embedder.
    The vectors of the training images are computed once and kept in run_dir/tower, with augmentation 'flip' those of the
    mirrored images too. weights: a checkpoint to take the tower from. With config.validate_every the head of the epoch that
    is best on the selection objects is kept. Writes model.safetensors (without the classes unless keep_classes: only a next
    stage needs them), config.json and log.csv, a row an epoch. ValueError if run_dir holds a run of another configuration or
    other images; other errors as in fit_head and embed_all."""
    run_dir, train, rows = user_path(run_dir), splits['train'], []
    with run_lock(run_dir):
        refuse_other_run(run_dir, config, describe(train))
        model = load_run(weights, dim=None) if weights else new_model(config, train['label'].nunique())
        resize(model, config.image_size, config.overlap)
        tower = Embedder(model.tower)
        names = ['train', *(SELECTION if config.validate_every else ())]
        limits = {'workers': config.workers, 'max_unreadable': max(config.max_unreadable, len(train) // 100)}
        vectors = embed_all(tower, splits, run_dir / 'tower', names, unreadable=(bad := []), **limits)
        seen, labels = vectors['train'], train['label'].to_numpy()
        if config.augmentation == 'flip':
            mirrored = embed(Mirrored(tower), train, cache=run_dir / 'tower/mirrored.npz', desc='mirrored', unreadable=bad,
                             **limits)
            seen, labels = np.concatenate([seen, mirrored]), np.tile(labels, 2)
        if bad:
            print(f'{len(bad)} images could not be read, first {printable(bad[0])}; the head is not trained on them.')
            readable = np.resize(~train['path'].isin(bad).to_numpy(), len(seen))  # twice, with mirrored ones
            seen, labels = seen[readable], labels[readable]
        started = time.time()

        def validate(head):
            return selection_mp5({name: projected(head, vectors[name]) for name in SELECTION}, splits)

        def report(step, loss, score):
            rate = step * config.effective_batch / max(time.time() - started, 1e-9)
            rows.append(dict(zip(LOGGED, (step, loss, config.head_lr, rate, score))))

        model.head = fit_head(
            seen, labels, dim=config.embedding_dim, subcenters=config.subcenters, scale=config.scale,
            margins=(config.margin_min, config.margin_width), lr=config.head_lr,
            class_lr=config.head_lr if config.class_lr is None else config.class_lr,
            weight_decay=config.head_weight_decay, batch_size=config.effective_batch, epochs=config.epochs,
            norm=config.head_norm, seed=config.seed, head_seed=config.head_seed,
            validate=validate if config.validate_every else None, report=report)
        if not keep_classes:
            model.head.centers = nn.Parameter(torch.zeros(0, config.embedding_dim))
        config.save(run_dir / 'config.json')  # before the weights: without it nobody could tell whose they are
        if not holds(run_dir / 'model.safetensors', model.state_dict()):  # with its projection
            save_run(run_dir, model, config, data=describe(train))
        write_text(run_dir / 'log.csv', pd.DataFrame(rows, columns=LOGGED).to_csv(index=False))
    return model.eval()


def projected(head, vectors, part=8192):
    """Unit vectors float32 (n, dim) of a head, from those of the tower (n, d) in any precision."""
    device = head.embedding.weight.device
    with torch.inference_mode():
        return torch.cat([F.normalize(head.embedding(head.norm(torch.from_numpy(np.ascontiguousarray(
            vectors[start:start + part], np.float32)).to(device)))) for start in range(0, max(len(vectors), 1), part)]
        ).cpu().numpy()


def head_projection(head, vectors, dim=MAX_DIM):
    """A head and the PCA of what it makes of `vectors`, float32 (n, d), folded into one Projection (d -> dim).
    With it save_ensemble makes a run of several towers and a head on their joined vectors (concatenate). ValueError: a head
    with batch normalisation, or what fit_pca refuses."""
    if not isinstance(head.norm, nn.Identity):
        raise InputError('A head with batch normalisation (norm=True) does not fold into one map: fit it without.')
    weight, vectors = head.embedding.weight.detach().double().numpy(), np.asarray(vectors, np.float64)
    outputs = vectors @ weight.T
    pca = fit_pca(outputs, dims_of(outputs, dim))
    return Projection(vectors.mean(0), pca.components @ weight, pca.explained_variance_ratio)
