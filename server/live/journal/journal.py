"""The truth of a run over devices: who was asked, what came back, and each round's outcome.

Every line of it is with the disk before anything follows from it, so a process that dies at any
moment leaves a run that goes on: a round that is over stays over, and an update that was accepted
is neither asked for again nor counted twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message

from fedcore.errors import DataError
from fedcore.observability.foreign import foreign
from fedcore.updates.pieces import KeptArray
from server.live.journal.blobs import Blobs
from server.live.journal.entries import Entries, JournalEntry, as_written, new_entry
from server.live.journal.head import (
    ASKED,
    COMMIT,
    END,
    JOURNAL,
    RECORD,
    REPLY,
    RUN,
    add_to_head,
    is_begun,
    open_repaired,
    settle_restored,
    shorten_head,
    write_head,
)
from server.live.journal.packing import (
    Packing,
    content_doc,
    content_from,
    digests_of,
    progress_doc,
    progress_from,
)
from server.records import RoundRecord
from server.rounds.checkpointing import Progress, Start

SELECTING, SELECTED = "selecting", "selected"
ACCEPTING, ACCEPTED = "accepting", "accepted"
COMMITTING, COMMITTED, COPIED = "committing", "committed", "copied"
POINTS = (SELECTING, SELECTED, ACCEPTING, ACCEPTED, COMMITTING, COMMITTED, COPIED)
"""Moments at which a change has not begun or has just become durable; see `Reached`."""
Reached = Callable[[str], None]
"""Hears of each of `POINTS` as it is reached."""

VALUES = "values"
"""Folder of what is too large for the database."""
_FORMAT = 1
_FIRST, _LAST = 0, 2**62
_TRAIN, _EVALUATE = "train", "evaluate"


def nothing(point: str) -> None:
    """What most who hear of a point do."""


class Journal:
    """The journal of one run, in a folder that one process at a time owns.

    Memory is that of one value at a time. Values of more than 64 KiB are files beside the journal,
    named by their digests: weights that are the best ones too are written once.
    """

    def __init__(
        self, folder: Path, entries: Entries, mended: str, *, reached: Reached = nothing
    ) -> None:
        """Use `create` or `reopen`."""
        self._folder = folder
        self._entries = entries
        self._reached = reached
        self._blobs = Blobs(folder / VALUES)
        self._told = _read_run(entries)
        self.mended = mended
        """What was damaged and is mended, in a sentence; empty where nothing was."""
        self.start = start = self._last_whole()
        """Where rounds went on, or go on, in this process; None where they had not begun."""
        self._begun = start is not None
        self.round = start.progress.round if start else 0
        """The last round that is over."""
        self._over = start.progress.over if start else False
        self._replies: set[tuple[str, int]] = set()
        """Kinds and nodes of what this process accepted, or handed out, in the round."""
        self._sweep()

    def close(self) -> None:
        """Closes it."""
        self._entries.close()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What fixes the run, see `server.rounds.run_identity`."""
        identity: Mapping[str, Any] = self._told["identity"]
        return identity

    @property
    def instance(self) -> str:
        """The same from the beginning of the run to its end, whatever dies meanwhile."""
        return str(self._told["instance"])

    @property
    def ended(self) -> bool:
        """Whether the run came to its end and left its results."""
        return self._entries.one(END, 0, 0) is not None

    def end(self) -> None:
        """Notes that the run's results are written."""
        self._entries.write([new_entry(END, 0, 0, {})])
        add_to_head(self._folder, self._entries, None)

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Makes a round's outcome durable, and drops what led to it. Once, however often called.

        Args:
            progress: After the round; or before the first one.
            record: Of the round; None where there was none.

        Raises:
            DiskFull: there was no room; the round before stands, and what was accepted since.
        """
        if self._begun and (progress.round, progress.over) == (self.round, self._over):
            return
        packed = Packing(self._blobs)
        doc = progress_doc(progress, packed)
        commit = new_entry(COMMIT, progress.round, 0, doc, bytes(packed.data))
        told = None if record is None else new_entry(RECORD, record.round, 0, asdict(record))
        # The round before stays: it is what is gone back to where this one's values are damaged.
        stale = [(COMMIT, _FIRST, progress.round - 2)]
        stale += [(kind, _FIRST, progress.round) for kind in self._kinds()]
        self._reached(COMMITTING)
        self._entries.write([commit] if told is None else [commit, told], drop=stale)
        self._reached(COMMITTED)
        add_to_head(self._folder, self._entries, told)
        self._reached(COPIED)
        self._begun, self.round, self._over = True, progress.round, progress.over
        self._replies.clear()
        self._sweep()

    def asked(self, kind: str) -> list[int] | None:
        """Whom the round that goes on asks for ``kind``; None where nobody was asked yet."""
        entry = self._entries.one(ASKED + kind, self.round + 1, 0)
        if entry is None:
            return None
        with as_written(entry):
            return _numbers(entry.values["nodes"])

    def weights(self, kind: str) -> dict[int, int] | None:
        """What the replies of those asked for ``kind`` weigh, in examples, by node.

        None where that was not noted, as before there was a field for it.
        """
        entry = self._entries.one(ASKED + kind, self.round + 1, 0)
        if entry is None or "weights" not in entry.values:
            return None
        with as_written(entry):
            nodes, weights = (_numbers(entry.values[name]) for name in ("nodes", "weights"))
            return dict(zip(nodes, weights, strict=True))

    def ask(self, kind: str, nodes: Sequence[int], weights: Sequence[int]) -> None:
        """Notes whom the round asks, before any of them is sent anything.

        ``weights`` are what their replies weigh, in examples: one rule for all of a round,
        whatever becomes of the list of members meanwhile.
        """
        values = {"nodes": list(nodes), "weights": list(weights)}
        self._reached(SELECTING)
        self._entries.write([new_entry(ASKED + kind, self.round + 1, 0, values)])
        self._reached(SELECTED)

    def drop(self) -> None:
        """Forgets whom the round that goes on asks, so that it asks others; replies stay."""
        number = self.round + 1
        kinds = [kind for kind in self._kinds() if kind.startswith(ASKED)]
        self._entries.write(drop=[(kind, number, number) for kind in kinds])

    def accept(self, reply: Message) -> Message:
        """Makes a reply of the round that goes on durable; it was checked, and holds no error.

        Returns the same reply, with large arrays where the journal keeps them: what they came in
        can be let go. It is written once, however often it is accepted.

        Raises:
            DiskFull: there was no room; it was not kept.
        """
        metadata, packed = reply.metadata, Packing(self._blobs)
        if self.holds(metadata.message_type, metadata.src_node_id):
            return reply
        doc = content_doc(reply.content, packed)
        self._reached(ACCEPTING)
        kind = REPLY + metadata.message_type
        self._entries.write(
            [new_entry(kind, self.round + 1, metadata.src_node_id, doc, bytes(packed.data))]
        )
        self._reached(ACCEPTED)
        self._replies.add((metadata.message_type, metadata.src_node_id))
        for name, key, dtype, shape, stype, (first, _) in doc["arrays"]:
            record = reply.content[name]
            if isinstance(first, str) and isinstance(record, ArrayRecord):
                path = self._blobs.path(first)
                record[key] = KeptArray(dtype, tuple(shape), stype, path)
        return reply

    def holds(self, kind: str, node: int) -> bool:
        """Whether a reply of ``node`` to ``kind`` stands that this process accepted or gave out."""
        return (kind, node) in self._replies

    def discard(self, kind: str, node: int) -> bool:
        """Forgets an accepted reply, whose node is to be asked again; False where there is none."""
        if not self.holds(kind, node):
            return False
        self._replies.discard((kind, node))
        self._entries.remove(REPLY + kind, self.round + 1, node)
        return True

    def reply(self, message: Message) -> Message | None:
        """The reply that was accepted to ``message`` of the round that goes on.

        None where there was none, or it is damaged: then its node is to be asked again.
        """
        metadata = message.metadata
        kind = REPLY + metadata.message_type
        entry = self._entries.one(kind, self.round + 1, metadata.dst_node_id)
        if entry is None or not entry.is_intact:
            return None
        try:
            content = content_from(entry, self._blobs, where=str(self._folder / JOURNAL))
        except DataError:
            return None
        self._replies.add((metadata.message_type, metadata.dst_node_id))
        return Message(content, reply_to=message)

    def _kinds(self) -> list[str]:
        return [start + kind for start in (ASKED, REPLY) for kind in (_TRAIN, _EVALUATE)]

    def _last_whole(self) -> Start | None:
        """Where the run goes on: after the last commit whose values are what was written."""
        commits = self._entries.of(COMMIT)
        records = [_record_of(entry) for entry in self._entries.of(RECORD)]
        for entry in reversed(commits):
            try:
                progress = progress_from(entry, self._blobs)
            except DataError as error:
                self.mended = " ".join(filter(None, (self.mended, str(error))))
                continue
            if entry is not commits[-1]:
                self._go_back(entry.round)
            whole = tuple(record for record in records if record.round <= entry.round)
            return Start(progress, whole, cohort=self._cohort(entry.round, whole))
        if commits:
            raise DataError(
                f"{self.mended} No round's weights are whole. Nothing was run; restore the folder "
                "from a backup and go on with --resume, or begin the run again with --fresh."
            )
        return None

    def rounds_kept(self) -> list[int]:
        """The rounds whose models are kept, the latest last; 0 is the model from before the first.

        Two at most: the last round's, and the one before, which it goes back to.
        """
        return [entry.round for entry in self._entries.of(COMMIT)]

    def roll_back(self, number: int) -> None:
        """Goes back to after a round of `rounds_kept`; this journal must be reopened then.

        Guarantee:
            Whenever this process dies, the journal is found as it was, to the replies of the round
            that goes on, or as it is to be.

        Raises:
            DataError: that round's weights are damaged; nothing was changed.
        """
        (commit,) = (entry for entry in self._entries.of(COMMIT) if entry.round == number)
        progress_from(commit, self._blobs)
        self._drop_after(number)

    def _go_back(self, number: int) -> None:
        """Drops what came after a round. Devices answer again with what they have kept."""
        self._drop_after(number)
        self.mended += f" The run goes on after round {number}, whose weights are whole."

    def _drop_after(self, number: int) -> None:
        after = (number + 1, _LAST)
        shorten_head(self._folder, self._entries, number)
        self._entries.write(drop=[(kind, *after) for kind in (COMMIT, RECORD, *self._kinds())])
        write_head(self._folder, self._entries)

    def _cohort(self, number: int, records: Sequence[RoundRecord]) -> int | None:
        entry = self._entries.one(ASKED + _TRAIN, number + 1, 0)
        if entry is not None:
            with as_written(entry):
                return len(_numbers(entry.values["nodes"]))
        return records[-1].cohort if records else None

    def _sweep(self) -> None:
        """Removes values that nothing refers to."""
        self._blobs.keep_only(values_of(self._entries))


def _read_run(entries: Entries) -> dict[str, Any]:
    """What was noted of the run when it was begun."""
    entry = entries.one(RUN, 0, 0)
    assert entry is not None
    values = entry.values
    with as_written(entry):
        found = values["format"]
        if found != _FORMAT:
            raise DataError(
                f"{entries.path}: format {foreign(found, 40)}, expected {_FORMAT}: another version "
                "of fedcore wrote this journal. Nothing was run; go on with that version."
            )
        if not isinstance(values["identity"], dict) or not isinstance(values["instance"], str):
            raise TypeError("it does not tell which run it is of")
    return values


def _record_of(entry: JournalEntry) -> RoundRecord:
    with as_written(entry):
        record = RoundRecord(**entry.values)
        if type(record.round) is not int or record.round != entry.round:
            raise ValueError(f"it is of round {record.round!r}")
        return record


def _numbers(values: Sequence[object]) -> list[int]:
    if not isinstance(values, list) or not all(type(one) is int for one in values):
        raise TypeError("expected a list of whole numbers")
    return values


def values_of(entries: Entries) -> set[str]:
    """The names of the values that entries refer to."""
    kinds = [COMMIT, *(REPLY + kind for kind in (_TRAIN, _EVALUATE))]
    return {digest for kind in kinds for one in entries.of(kind) for digest in digests_of(one)}


def create(folder: Path, identity: Mapping[str, Any], *, reached: Reached = nothing) -> Journal:
    """Begins the journal of a run in ``folder``, which must hold none."""
    entries = Entries(folder / JOURNAL)
    values = {"format": _FORMAT, "identity": identity, "instance": secrets.token_hex(8)}
    entries.write([new_entry(RUN, 0, 0, values)])
    write_head(folder, entries)
    return Journal(folder, entries, "", reached=reached)


def reopen(folder: Path, *, reached: Reached = nothing) -> Journal | None:
    """The journal in ``folder``, mended where it was damaged; None where no run was begun.

    Raises:
        DataError: it is damaged, and nothing is left to mend it from.
    """
    if not is_begun(folder):
        return None
    settle_restored(folder)
    entries, mended = open_repaired(folder)
    run = entries.one(RUN, 0, 0)
    if run is None:  # it died before anything was begun
        entries.close()
        return None
    try:
        return Journal(folder, entries, mended, reached=reached)
    except BaseException:
        entries.close()
        raise
