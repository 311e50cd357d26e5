"""Draws fractals: images full of structure that show no object, for PixMix to mix into training images.

Each is the attractor of a random iterated function system, rendered by the chaos game. Sources: Hendrycks et al. 2021
(PixMix), https://arxiv.org/abs/2112.05135; Barnsley 1988, Fractals Everywhere; colours mix along a point's path as in
Draves 2003, https://flam3.com/flame_draves.pdf
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAPS = 4  # affine maps of a system
_POINTS = 256  # that play the chaos game together
_WARM_UP = 16  # moves until a point has reached the attractor
_MOVES = 96
_CHUNK = 128  # fractals drawn together: 100 MB of points


def draw_fractals(count: int, side: int, seed: int, device: torch.device) -> Tensor:
    """Return `count` colour fractals on `device`, (count, 3, side, side) uint8; the same ones for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [_draw(min(_CHUNK, count - start), side, generator, device) for start in range(0, count, _CHUNK)]
    return torch.cat(chunks)


def _draw(count: int, side: int, generator: torch.Generator, device: torch.device) -> Tensor:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    matrices = _contractions(uniform(0, 2 * math.pi, _MAPS, 2), uniform(0.3, 0.9, _MAPS, 2))
    offsets, colours = uniform(-1, 1, _MAPS, 2), uniform(0, 1, _MAPS, 3)
    chance = torch.linalg.det(matrices).abs().cpu()
    systems = torch.arange(count, device=device)[:, None]
    points, colour = uniform(-1, 1, _POINTS, 2), uniform(0, 1, _POINTS, 3)
    path, shades = [], []
    for move in range(_WARM_UP + _MOVES):
        chosen = torch.multinomial(chance, _POINTS, replacement=True, generator=generator).to(device)
        points = (matrices[systems, chosen] @ points[..., None])[..., 0] + offsets[systems, chosen]
        colour = (colour + colours[systems, chosen]) / 2
        if move >= _WARM_UP:
            path.append(points)
            shades.append(colour)
    return _render(torch.cat(path, dim=1), torch.cat(shades, dim=1), uniform(0, 1, 3), side)


def _contractions(angles: Tensor, scales: Tensor) -> Tensor:
    """Return matrices (…, 2, 2) that turn, scale each axis, and turn again."""
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (…, 2 turns, 2, 2)
    return turns[..., 0, :, :] @ torch.diag_embed(scales) @ turns[..., 1, :, :]


def _render(points: Tensor, colours: Tensor, background: Tensor, side: int) -> Tensor:
    """Return images of `points` (N, P, 2) in `colours` (N, P, 3): the denser, the more opaque before `background`."""
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    cells = ((points - low) / (high - low).clamp_min(1e-6) * (side - 1)).round().long()
    places = cells[..., 0] * side + cells[..., 1]
    density = points.new_zeros(len(points), side * side).scatter_add_(1, places, torch.ones_like(points[..., 0]))
    sums = points.new_zeros(len(points), side * side, 3).scatter_add_(1, places[..., None].expand(-1, -1, 3), colours)
    colour = sums / density.clamp_min(1)[..., None]
    opacity = (density.log1p() / density.amax(dim=1, keepdim=True).log1p()).sqrt()[..., None]
    image = opacity * colour + (1 - opacity) * background[:, None, :]
    return (255 * image).round().to(torch.uint8).reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
