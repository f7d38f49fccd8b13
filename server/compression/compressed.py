"""The result of compression: all candidates, the choice, and what a release needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.artifacts.golden import Golden
from fedcore.artifacts.manifest import MissingAllowed, Parity
from server.records import CandidateRecord
from server.report.choice import why_chosen
from server.report.notebook import Plot


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The result of compression: all candidates, the choice, and what a release needs of it.

    Example::

        compressed = fedcore.compress(task, "run.toml", result.model)
        for each in compressed.records:
            print(each.name, each.bytes, each.p50_us, each.reason)
        print(compressed.why)
        Path("model.onnx").write_bytes(compressed.files[compressed.chosen])
    """

    records: tuple[CandidateRecord, ...]
    """All configured candidates; one that couldn't be built is rejected and has NaN figures."""
    chosen: str
    files: Mapping[str, bytes] = field(repr=False)
    """The ONNX file of every candidate that was built, by name."""
    primary: str
    """Name of the metric that judged the candidates."""
    torch_p50_us: float
    """Median time in microseconds of one inference of the uncompressed model in torch, on one
    thread."""
    parity: Parity
    """Parity of the chosen candidate."""
    golden: Golden
    """Synthetic inputs, and the chosen file's outputs for them, computed one input at a time (see
    `server.compression.golden`), with the reference that devices compare what they serve with."""
    golden_tolerance: float
    """Largest absolute difference from the golden outputs allowed on a device."""
    calibration: str
    """Data that quantisation and pruning of the chosen candidate used, or ``none``."""
    missing: MissingAllowed | None = None
    """Positions of an input that may be NaN, see `server.compression.missing`."""
    notes: tuple[str, ...]
    """Notes for readers of the report, one sentence each."""
    source_sha256: str
    """SHA-256 of the compressed model's checkpoint."""

    @property
    def why(self) -> str:
        """Why the chosen candidate was chosen, in one sentence."""
        return why_chosen(self.records, self.chosen, primary=self.primary) or ""

    def plot(self) -> Plot | None:
        """Plots the candidates' bytes against their times, as SVG text that a notebook renders.

        Returns:
            The plot, the same as in the report; None without held-out data, which judge candidates.
        """
        from server.report.candidates_plot import candidates_plot  # imports matplotlib

        drawn = candidates_plot(self.records, primary=self.primary, chosen=self.chosen)
        return None if drawn is None else Plot(drawn)
