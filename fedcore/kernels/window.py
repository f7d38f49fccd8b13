"""What a convolution looks at, and the pooling behind it."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class ConvolutionWindow:
    """What a convolution looks at, each as (height, width), and the pooling that follows it."""

    kernel: Pair
    stride: Pair
    padding: Pair
    pool: Pair = (1, 1)
    """Of each such block of results only the largest is kept; what no whole block covers is not
    computed."""

    def cells(self, height: int, width: int) -> Pair:
        """How many blocks there are, down and across, over an image of that size."""
        sizes = []
        for place, length in enumerate((height, width)):
            room = length + 2 * self.padding[place] - self.kernel[place]
            sizes.append((room // self.stride[place] + 1) // self.pool[place])
        return sizes[0], sizes[1]

    def check(self, height: int, width: int) -> None:
        """Refuses empty images, and those of which nothing would be left, as torch's layers do.

        Padding would leave something of an empty one, and a loop over its pixels fills nothing.

        Raises:
            ValueError: they are too small.
        """
        if min(height, width, *self.cells(height, width)) < 1:
            raise ValueError(
                f"images of {height} x {width} are too small for a kernel of {self.kernel} and "
                f"pooling of {self.pool}"
            )
