"""Encodes rows of a table: numbers, missing values and categories; exported with the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TableColumn:
    """One column of a table, which is one number of an input."""

    name: str
    categories: tuple[str, ...] = ()
    """Names of the categories: the input's number is the place among them, NaN for none."""
    missing: bool = False
    """Whether a number may be missing, which NaN stands for."""

    @property
    def note(self) -> str:
        """How the column is encoded, as a sentence."""
        if self.categories:
            shown = ", ".join(f"{n} {one}" for n, one in enumerate(self.categories[:6]))
            more = ", ..." if len(self.categories) > 6 else ""
            return (
                f"{self.name}: category ({shown}{more}), encoded as one column each; NaN or an "
                "unknown number is none of them"
            )
        if self.missing:
            return f"{self.name}: number; missing ones are 0, and a further column marks them"
        return f"{self.name}: number"


class EncodeTable(nn.Module):
    """Encodes inputs ``(B, columns)``: numbers as they are, missing ones marked, categories apart.

    Numbers come first, then marks of missing ones, then one column for each category.
    """

    def __init__(self, columns: tuple[TableColumn, ...]) -> None:
        super().__init__()
        places = range(len(columns))
        self._whole = [n for n in places if not columns[n].categories and not columns[n].missing]
        self._holes = [n for n in places if columns[n].missing]
        self._categories = [
            (n, len(columns[n].categories)) for n in places if columns[n].categories
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, columns)`` to ``(B, encoded columns)``."""
        parts = [x[:, self._whole]] if self._whole else []
        if self._holes:
            numbers = x[:, self._holes]
            missing = torch.isnan(numbers)
            parts += [torch.where(missing, 0.0, numbers), missing.to(x.dtype)]
        for place, count in self._categories:
            codes = torch.arange(count, dtype=x.dtype, device=x.device)
            parts.append((x[:, place : place + 1] == codes).to(x.dtype))
        return torch.cat(parts, dim=1)
