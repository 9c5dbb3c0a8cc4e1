"""A history of generated images, so that the discriminator does not forget what it has learned to reject."""

from __future__ import annotations

import torch
from torch import Tensor


class ImagePool:
    """Keeps up to ``size`` generated images, and swaps old against new ones (Shrivastava et al., 2017).

    Args:
        size: how many images are kept; with 0 every image passes through.

    Attributes:
        images: the images kept, [N, C, H, W] with N <= size; ``None`` before the first.
    """

    def __init__(self, size: int = 50) -> None:
        self.size = size
        self.images: Tensor | None = None

    def swap(self, images: Tensor) -> Tensor:
        """Take in new images and give as many.

        While the pool is being filled an image is kept and given. Afterwards, with a probability of one half each, it
        is given, or takes the place of a random image of the pool, which is given in its stead.

        Args:
            images: [B, C, H, W], without a graph.

        Returns:
            [B, C, H, W].
        """
        if self.images is not None:
            self.images = self.images.to(images.device)  # a checkpoint gives them back on the CPU
        return torch.stack([self._swap_one(image) for image in images])

    def _swap_one(self, image: Tensor) -> Tensor:
        kept = 0 if self.images is None else len(self.images)
        if kept < self.size:
            self.images = image[None].clone() if self.images is None else torch.cat([self.images, image[None]])
            return image
        if self.images is None or torch.rand(()) < 0.5:
            return image
        place = int(torch.randint(kept, ()))
        old = self.images[place].clone()
        self.images[place] = image
        return old
