"""Margins and ArcFace against slow references, and where the published code went wrong."""
import math

import numpy as np
import pytest
import torch

from guie.losses import adaptive_margins, arcface_loss
from guie.model import SubcenterHead


def slow_arcface(cosine, labels, margins, scale):
    """Row by row in float64, from the angle itself."""
    losses = []
    for row, label in zip(cosine.double().tolist(), labels.tolist()):
        margin, logits = float(margins[label]), [scale * value for value in row]
        angle = math.acos(max(-1, min(1, row[label])))
        shifted = math.cos(angle + margin) if angle + margin < math.pi else row[label] - margin * math.sin(margin)
        logits[label] = scale * shifted
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(value - top) for value in logits)) - logits[label])
    return sum(losses) / len(losses)


@pytest.mark.parametrize('seed, scale', enumerate([30., 30., 30., 16., 64.]))
def test_arcface_equals_a_row_by_row_reference(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(16, 7, generator=generator) * 1.98 - .99
    labels, margins = torch.randint(7, (16,), generator=generator), torch.rand(7, generator=generator) * .5
    loss = arcface_loss(cosine, labels, margins, scale=scale)
    assert loss.item() == pytest.approx(slow_arcface(cosine, labels, margins, scale), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_arcface_computes_in_float32_whatever_the_cosines_are(dtype):
    cosine = (torch.rand(16, 7, generator=torch.Generator().manual_seed(0)) * 1.98 - .99).to(dtype)
    labels, margins = torch.arange(16) % 7, torch.linspace(.05, .5, 7)
    loss = arcface_loss(cosine, labels, margins)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(slow_arcface(cosine, labels, margins, 30.), rel=1e-5)


def test_arcface_gradient_equals_finite_differences():
    cosine = (torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.8 - .9)
    labels, margins, step = torch.tensor([0, 1, 2, 3]), torch.full((5,), .4), 1e-6
    leaf = cosine.float().requires_grad_()
    arcface_loss(leaf, labels, margins).backward()
    for row, column in [(0, 0), (1, 4), (2, 2)]:
        up, down = cosine.clone(), cosine.clone()
        up[row, column] += step
        down[row, column] -= step
        slope = (slow_arcface(up, labels, margins, 30.) - slow_arcface(down, labels, margins, 30.)) / (2 * step)
        assert leaf.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('subcenters', [1, 3])
def test_arcface_equals_pytorch_metric_learning_at_a_constant_margin(subcenters):
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    torch.manual_seed(0)
    head = SubcenterHead(16, 6, dim=16, subcenters=subcenters)
    embedding, labels = torch.randn(12, 16), torch.arange(12) % 6
    settings = {'num_classes': 6, 'embedding_size': 16, 'margin': math.degrees(.3), 'scale': 30}
    theirs = losses.ArcFaceLoss(**settings) if subcenters == 1 else losses.SubCenterArcFaceLoss(
        **settings, sub_centers=subcenters)
    theirs.W.data = head.centers.data.T.clone()
    loss = arcface_loss(head.cosine(embedding), labels, torch.full((6,), .3))
    assert loss.item() == pytest.approx(theirs(embedding, labels).item(), rel=1e-4)


@pytest.mark.parametrize('value', [1.0, -1.0])
def test_the_gradient_is_finite_where_the_cosine_is_one(value):
    cosine = torch.full((2, 3), value, requires_grad=True)
    arcface_loss(cosine, torch.tensor([0, 1]), torch.tensor([.05, .3, .5])).backward()
    assert cosine.grad.isfinite().all()


def test_past_pi_the_target_logit_keeps_falling():
    near, past = torch.tensor([[-.99, 0.]]), torch.tensor([[-.9999, 0.]])
    margins, label = torch.tensor([.5, .5]), torch.tensor([0])
    assert arcface_loss(past, label, margins) > arcface_loss(near, label, margins)


def test_margins_run_from_the_most_frequent_class_to_the_rarest():
    counts = np.array([4, 10, 50])
    share = (counts ** -.25 - 50 ** -.25) / (4 ** -.25 - 50 ** -.25)
    assert adaptive_margins(counts).numpy() == pytest.approx(.05 + .45 * share, abs=1e-6)
    assert adaptive_margins(counts, low=.1, width=.2).numpy() == pytest.approx(.1 + .2 * share, abs=1e-6)


@pytest.mark.parametrize('classes', [1, 3, 100, 363])  # of many the last few are computed by another instruction
@pytest.mark.parametrize('count', [1, 3, 4, 7, 50])
def test_equal_counts_give_the_middle_margin_and_no_nan(classes, count):
    assert adaptive_margins([count] * classes).tolist() == pytest.approx([.275] * classes)


@pytest.mark.parametrize('counts', [[3, 0], []])
def test_a_class_without_images_is_an_error(counts):
    with pytest.raises(ValueError, match='at least one image'):
        adaptive_margins(counts)
