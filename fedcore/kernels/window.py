"""The geometry of a convolution and the pooling that follows it."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class ConvolutionWindow:
    """A convolution's kernel, stride and padding, each (height, width), and its pooling."""

    kernel: Pair
    stride: Pair
    padding: Pair
    pool: Pair = (1, 1)
    """Pooling block, whose maximum is kept. Results outside whole blocks are not computed."""

    def cells(self, height: int, width: int) -> Pair:
        """Returns the number of pooling blocks, down and across, for an image of this size."""
        sizes = []
        for place, length in enumerate((height, width)):
            room = length + 2 * self.padding[place] - self.kernel[place]
            sizes.append((room // self.stride[place] + 1) // self.pool[place])
        return sizes[0], sizes[1]

    def check(self, height: int, width: int) -> None:
        """Rejects images that are empty or too small for any result, as torch's layers do.

        Padding would give even an empty image results, and loops over its pixels would not fill
        them.

        Raises:
            ValueError: The images are too small.
        """
        if min(height, width, *self.cells(height, width)) < 1:
            raise ValueError(
                f"images of {height} x {width} are too small for a kernel of {self.kernel} and "
                f"pooling of {self.pool}"
            )
