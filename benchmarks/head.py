"""ArcFace head alone, 20,000 classes × 3 centres, 512 dimensions, batch 32, forward and backward, float32.

    python benchmarks/head.py

Against pytorch-metric-learning's SubCenterArcFaceLoss with the same centres. Checked: loss, gradient of the embedding
and gradient of the centres are the same. The bound is the three matrix products that no implementation avoids.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SubCenterArcFaceLoss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

import utilities  # noqa: E402

MARGIN = .3  # radians; theirs knows one for all classes


def main():
    options = timing.arguments(__doc__, repeats=5)
    n_classes, batch, dim = (50 if options.quick else 20_000), 32, 512
    head = utilities.SubcenterHead(dim, n_classes, dim=dim)
    theirs = SubCenterArcFaceLoss(num_classes=n_classes, embedding_size=dim, margin=math.degrees(MARGIN), scale=30,
                                  sub_centers=3)
    theirs.W.data = head.centers.data.T.clone()
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(batch, dim, generator=generator).requires_grad_()
    labels, margins = torch.randint(n_classes, (batch,), generator=generator), torch.full((n_classes,), MARGIN)

    def by_head():
        embedding.grad = head.centers.grad = None
        loss = utilities.arcface_loss(head.cosine(embedding), labels, margins, 30.)
        loss.backward()
        return loss.item(), embedding.grad, head.centers.grad

    def by_library():
        embedding.grad = theirs.W.grad = None
        loss = theirs(embedding, labels)
        loss.backward()
        return loss.item(), embedding.grad, theirs.W.grad

    @torch.no_grad()
    def products():
        unit = F.normalize(embedding)
        cosine = unit @ head.centers.T
        return cosine @ head.centers, cosine.T @ unit

    works = {'ours': by_head, 'library': by_library, 'products': products}
    seconds, results = timing.interleaved(works, options.repeats)
    (loss, slope, slopes), (loss_2, slope_2, slopes_2) = results['ours'], results['library']
    timing.close(loss, loss_2, 1e-4, 'Loss')
    timing.close(slope, slope_2, 1e-4 * float(slope_2.abs().max()), 'Gradient of the embedding')
    timing.close(slopes, slopes_2.T, 1e-4 * float(slopes_2.abs().max()), 'Gradient of the centres')
    bound = f'three matrix products: {seconds["products"] / seconds["library"]:.2f}'
    timing.print_table(f'ArcFace head, {n_classes:,} classes × 3 centres, batch {batch}, {options.threads} threads, median '
                       f'of {options.repeats} interleaved runs',
                       [timing.Row(f'{n_classes:,} classes, forward and backward, against pytorch-metric-learning',
                                   seconds['ours'], seconds['library'], 's', '≤ 0.70', bound)])


if __name__ == '__main__':
    main()
