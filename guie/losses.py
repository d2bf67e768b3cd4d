"""Losses: a margin for each class, and sub-centre ArcFace."""
import torch
import torch.nn.functional as F

from guie.errors import InputError


def adaptive_margins(counts, *, low=0.05, width=0.45, power=0.25):
    """A margin for each class, wider for rare ones: n^-power, scaled so that it runs from low to low+width.
    counts: images a class (C,), all > 0. Returns float32 (C,), radians. If all counts are equal, all margins are the middle
    (the published code divides 0 by 0 there). Source: arXiv 2210.11141, sec. 3."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if len(counts) == 0 or counts.min() < 1:
        raise InputError('Every class needs at least one image to have a margin; drop the empty classes first.')
    rarity = counts ** -power
    equal = counts.min() == counts.max()  # their powers may still differ in the last bit
    share = torch.full_like(rarity, .5) if equal else (rarity - rarity.min()) / (rarity.max() - rarity.min())
    return (low + width * share).float()


def arcface_loss(cosine, labels, margins, scale=30.0):
    """Additive angular margin (Deng 2019, eq. 3): cross-entropy of scale · cos(θ + m) at the label, scale · cos θ elsewhere.
    cosine: float (n, C); labels: int64 (n,); margins: float (C,), radians in 0…π/2. Where θ + m exceeds π the logit is
    cos θ - m·sin m, so that it keeps falling. Finite gradients at cos θ = ±1. Returns the mean over the batch, a float32
    scalar."""
    margin = margins.to(cosine.device, torch.float32)[labels]
    cosine = cosine.float()
    target = cosine.gather(1, labels[:, None]).squeeze(1)
    sine = (1 - target * target).clamp_min(1e-7).sqrt()  # √0 has an infinite slope; below the clamp the slope is 0
    shifted = target * margin.cos() - sine * margin.sin()
    shifted = torch.where(target > -margin.cos(), shifted, target - margin * margin.sin())
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], shifted[:, None]), labels)
