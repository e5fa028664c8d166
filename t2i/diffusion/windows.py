"""Predictions of large samples from overlapping windows, so that a window bounds the memory of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i.diffusion.denoiser import Predict


@dataclass(frozen=True, eq=False)
class Window:
    """Part of a sample, and the weight of its predictions, (height, width): small at the borders of the part."""

    rows: slice
    columns: slice
    weight: Tensor

    def crop(self, x: Tensor) -> Tensor:
        """Return the part of (..., H, W)."""
        return x[..., self.rows, self.columns]


def compute_window_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the sides of the windows of a canvas: squares, or the whole canvas if it is no larger than one.

    A canvas that is narrower than a square has windows of its own width.
    """
    if height * width <= size * size:
        return height, width
    return min(height, size), min(width, size)


def build_canvas_windows(height: int, width: int, size: int) -> list[Window]:
    """Return parts that cover a canvas and overlap by at least half; see `compute_window_shape`. size: of a square.

    Their weight falls from the middle to the borders (Bar-Tal et al. 2023 take the plain average).
    """
    sides = compute_window_shape(height, width, size)

    def build_slices(length: int, side: int) -> list[slice]:
        count = 1 + -(-(length - side) // max(1, side // 2))
        starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
        return [slice(start, start + side) for start in starts]

    # At the pixels' centres, so that no weight is 0 and every pixel has a prediction
    down, across = (1 - ((torch.arange(side) + 0.5) / side * 2 - 1).abs() for side in sides)
    rows, columns = build_slices(height, sides[0]), build_slices(width, sides[1])
    return [Window(part, other, down[:, None] * across) for part in rows for other in columns]


def build_windowed_predict(predicts: Sequence[Predict], windows: Sequence[Window]) -> Predict:
    """Return the mean of the windows' predictions, by their weights. predicts: one a window, for its part of x."""
    if len(windows) == 1:
        return predicts[0]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        total, weights = None, x.new_zeros(x.shape[-2:])
        for predict_window, window in zip(predicts, windows):
            part = predict_window(window.crop(x), t)
            if total is None:  # a learned variance has twice the channels of x
                total = x.new_zeros(len(x), part.shape[1], *x.shape[-2:])
            weight = window.weight.to(x)
            window.crop(total).add_(part * weight)
            window.crop(weights).add_(weight)
        assert total is not None, "there are windows"
        return total / weights

    return predict
