"""Write-ahead journal of a deployment: cohorts, accepted replies and committed rounds.

Each entry is on disk before the server acts on it. A process that dies at any moment therefore
leaves a run that can be resumed: a committed round stays committed, and an accepted update is
neither requested again nor counted twice.

`create` starts a journal, `reopen` opens and repairs an existing one, and `Journal` has the
operations of a round: `record_cohort`, `accept`, `commit`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType

from fedcore.errors import DataError
from fedcore.updates.pieces import PathArray
from fedcore.updates.seal import signature_of
from server.live.journal.blobs import Blobs, NewBlobs
from server.live.journal.entries import Entries, JournalEntry, new_entry
from server.live.journal.head import (
    COHORT,
    COMMIT,
    END,
    JOURNAL,
    PURPOSES,
    RECORD,
    REPLY,
    RUN,
    SIGNATURE,
    SIGNATURES,
    add_to_head,
    is_begun,
    open_repaired,
    settle_restored,
    shorten_head,
    write_head,
)
from server.live.journal.packing import (
    FORMAT,
    Packing,
    cohort_entry,
    cohort_from,
    content_doc,
    content_from,
    digests_of,
    progress_doc,
    progress_from,
    read_run,
    record_from,
    signature_entry,
)
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress, Start
from server.rounds.cohort import Cohort

SELECTING, SELECTED = "selecting", "selected"
ACCEPTING, ACCEPTED = "accepting", "accepted"
COMMITTING, COMMITTED, COPIED = "committing", "committed", "copied"
POINTS = (SELECTING, SELECTED, ACCEPTING, ACCEPTED, COMMITTING, COMMITTED, COPIED)
"""Names of the moments just before a change is written and just after it is durable."""
OnPoint = Callable[[str], None]
"""Callback with the name of each of `POINTS` as execution reaches it."""

VALUES = "values"
"""Subfolder for values that are too large for the database."""
_FIRST, _LAST = 0, 2**62
_OF_ROUND = tuple(kind + purpose for kind in (COHORT, REPLY) for purpose in PURPOSES)
"""Kinds of entries that are dropped when their round is committed."""


def ignore_point(point: str) -> None:
    """Ignores a point: the default `OnPoint` callback."""


class Journal:
    """The journal of one run, in a folder that one process at a time owns.

    Keeps at most one value in memory at a time. Values of more than 64 KiB are files next to the
    database, named by their digests, so equal values, such as the latest weights and the best
    ones, share a file.
    """

    def __init__(
        self, folder: Path, entries: Entries, repairs: str, *, on_point: OnPoint = ignore_point
    ) -> None:
        """Wraps an opened database; call `create` or `reopen` instead of this."""
        self._folder = folder
        self._entries = entries
        self._on_point = on_point
        self._blobs = Blobs(folder / VALUES)
        self._run_values = read_run(entries)
        self.repairs = repairs
        """Description of the damage that was repaired, in a sentence; empty if there was none."""
        self.start = start = self._last_intact()
        """The state from which this process resumes; None if no commit was made before."""
        self._begun = start is not None
        self.round = start.progress.round if start else 0
        """The last committed round; 0 before the first."""
        self._over = start.progress.over if start else False
        self._replies: set[tuple[str, int]] = set()
        """(kind, node) of replies that this process accepted or returned in the current round."""
        self.sweep()

    def close(self) -> None:
        """Closes the database, and waits until files that are not needed any more are deleted."""
        self._entries.close()
        self._blobs.close()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a resumed run must share, see `server.rounds.checkpointing.run_identity`."""
        identity: Mapping[str, Any] = self._run_values["identity"]
        return identity

    @property
    def instance(self) -> str:
        """Random identifier of the run, constant across restarts."""
        return str(self._run_values["instance"])

    @property
    def ended(self) -> bool:
        """Whether all rounds have ended and the model has been written."""
        return self._entries.one(END, 0, 0) is not None

    def end(self) -> None:
        """Records that the rounds have ended and the model has been written."""
        self._entries.write([new_entry(END, 0, 0, {})])
        add_to_head(self._folder, self._entries, ())

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Makes a round's outcome durable and drops its cohort and replies. Idempotent.

        Keeps the signatures of the replies that the round used, and all files until `sweep`.

        Args:
            progress: State after the round, or before the first one.
            record: The round's record; None before the first round.

        Raises:
            DiskFull: the disk is full. The previous commit and the replies accepted since stay.
        """
        if self._begun and (progress.round, progress.over) == (self.round, self._over):
            return
        with self._blobs.adding() as blobs:
            packed = Packing(blobs)
            doc = progress_doc(progress, packed)
        commit = new_entry(COMMIT, progress.round, 0, doc, bytes(packed.data))
        history = [] if record is None else self._history(record)
        # Keep the previous commit: the run resumes from it if this one's values are damaged.
        stale = [(COMMIT, _FIRST, progress.round - 2)]
        stale += [(kind, _FIRST, progress.round) for kind in _OF_ROUND]
        if record is not None:  # signatures of replies that the round did not use
            stale += [(kind, record.round, record.round) for kind in SIGNATURES]
        self._on_point(COMMITTING)
        self._entries.write([commit, *history], drop=stale)
        self._on_point(COMMITTED)
        add_to_head(self._folder, self._entries, history)
        self._on_point(COPIED)
        self._begun, self.round, self._over = True, progress.round, progress.over
        self._replies.clear()

    def _history(self, record: RoundRecord) -> list[JournalEntry]:
        """Returns the entries that stay of a round: its record, and the signatures of its replies.

        The round may hold other replies, of nodes that it selected before it was restarted.
        """
        used = [
            entry
            for purpose in PURPOSES
            for entry in self._entries.of(SIGNATURE + purpose, record.round)
            if self.holds(purpose, entry.node)
        ]
        return [new_entry(RECORD, record.round, 0, asdict(record)), *used]

    def selected_cohort(self, kind: str) -> Cohort | None:
        """Cohort of the current round for messages of ``kind``; None if none was drawn yet."""
        entry = self._entries.one(COHORT + kind, self.round + 1, 0)
        return None if entry is None else cohort_from(entry)

    def record_cohort(self, kind: str, cohort: Cohort) -> None:
        """Records the current round's cohort for ``kind``, before any node is sent a message.

        Fixes the weights of its replies, too: one rule holds for the whole round, even if the
        member list changes meanwhile.
        """
        self._on_point(SELECTING)
        self._entries.write([cohort_entry(kind, self.round + 1, cohort)])
        self._on_point(SELECTED)

    def drop_cohorts(self) -> None:
        """Drops the current round's cohorts, so that it selects new ones; keeps its replies."""
        number = self.round + 1
        self._entries.write(drop=[(COHORT + purpose, number, number) for purpose in PURPOSES])

    def accept(self, *replies: Message) -> Sequence[Message]:
        """Makes verified replies of the current round durable, with their signatures. Idempotent.

        The disk waits once for their files and once for a transaction with all of them, as each
        wait takes some milliseconds. A reply is stored unchanged, so that it can be checked against
        the signature later.

        Returns:
            ``replies``, whose large arrays now refer to the journal's files: the caller may delete
            the files in which they arrived.

        Raises:
            SignatureInvalid: a reply has no verified signature. No reply was recorded.
            DiskFull: the disk is full. No reply was recorded.
        """
        with self._blobs.adding() as blobs:
            new = [
                (reply, *self._reply_entries(reply, blobs))
                for reply in replies
                if not self.holds(reply.metadata.message_type, reply.metadata.src_node_id)
            ]
        for _ in new:
            self._on_point(ACCEPTING)
        if new:
            stale = self._evaluations([reply.metadata.message_type for reply, _, _ in new])
            self._entries.write([entry for _, entries, _ in new for entry in entries], drop=stale)
        for reply, _, doc in new:
            self._on_point(ACCEPTED)
            self._replies.add((reply.metadata.message_type, reply.metadata.src_node_id))
            for name, key, dtype, shape, stype, (first, _) in doc["arrays"]:
                record = reply.content[name]
                if isinstance(first, str) and isinstance(record, ArrayRecord):
                    path = self._blobs.path(first)
                    record[key] = PathArray(dtype, tuple(shape), stype, path)
        return replies

    def _reply_entries(
        self, reply: Message, blobs: NewBlobs
    ) -> tuple[list[JournalEntry], dict[str, Any]]:
        """Returns the entries of a reply and of its signature, and the reply's document.

        Its large arrays are added to ``blobs``.
        """
        purpose, node = reply.metadata.message_type, reply.metadata.src_node_id
        number, packed = self.round + 1, Packing(blobs)
        signature = signature_of(reply.content, where=f"round {number}: reply from node {node}")
        doc = content_doc(reply.content, packed)
        kept = new_entry(REPLY + purpose, number, node, doc, bytes(packed.data))
        return [kept, signature_entry(purpose, number, node, signature)], doc

    def holds(self, kind: str, node: int) -> bool:
        """Whether this process accepted or returned ``node``'s reply to ``kind`` in this round."""
        return (kind, node) in self._replies

    def discard(self, kind: str, node: int) -> bool:
        """Drops a reply, so that its node is asked again; returns False where `holds` is False."""
        if not self.holds(kind, node):
            return False
        self._replies.discard((kind, node))
        if stale := self._evaluations([kind]):
            self._entries.write(drop=stale)
        self._entries.remove([(one + kind, self.round + 1, node) for one in (REPLY, SIGNATURE)])
        return True

    def _evaluations(self, changed: Sequence[str]) -> Sequence[tuple[str, int, int]]:
        """Returns the current round's evaluations to drop if replies of these types change.

        After a restart a round may get an update that it ended without before. Its model is then
        another than the one that devices have evaluated.
        """
        if MessageType.TRAIN not in changed:
            return ()
        number = self.round + 1
        return [(kind + MessageType.EVALUATE, number, number) for kind in (REPLY, SIGNATURE)]

    def reply(self, message: Message) -> Message | None:
        """Returns the accepted reply to ``message`` of the current round.

        None if there is none, or it or its signature is damaged; the node must then be asked again.
        """
        purpose, node = message.metadata.message_type, message.metadata.dst_node_id
        entry, signature = (
            self._entries.one(kind + purpose, self.round + 1, node) for kind in (REPLY, SIGNATURE)
        )
        if entry is None or signature is None or not (entry.is_intact and signature.is_intact):
            return None
        try:
            content = content_from(entry, self._blobs, where=str(self._folder / JOURNAL))
        except DataError:
            return None
        self._replies.add((purpose, node))
        return Message(content, reply_to=message)

    def _last_intact(self) -> Start | None:
        """Returns the state of the last commit whose values are intact; drops later commits."""
        commits = self._entries.of(COMMIT)
        records = [record_from(entry) for entry in self._entries.of(RECORD)]
        for entry in reversed(commits):
            try:
                progress = progress_from(entry, self._blobs)
            except DataError as error:
                self.repairs = " ".join(filter(None, (self.repairs, str(error))))
                continue
            if entry is not commits[-1]:
                self._return_to(entry.round)
            whole = tuple(record for record in records if record.round <= entry.round)
            return Start(progress, whole, cohort=self._cohort(entry.round, whole))
        if commits:
            raise DataError(
                f"{self.repairs} No round's weights are intact. Nothing was run; restore the "
                "folder from a backup and continue with --resume, or start the run over with "
                "--fresh."
            )
        return None

    def rounds_kept(self) -> list[int]:
        """Rounds whose models are kept, in ascending order; 0 is the initial model.

        There are at most two: the last round and the one before it.
        """
        return [entry.round for entry in self._entries.of(COMMIT)]

    def roll_back(self, number: int) -> None:
        """Restores the state after round ``number``, one of `rounds_kept`.

        This object is stale afterwards; `reopen` the journal.

        Guarantee:
            If the process dies meanwhile, the journal is either unchanged, including the replies of
            the current round, or rolled back.

        Raises:
            DataError: that round's weights are damaged. Nothing was changed.
        """
        (commit,) = (entry for entry in self._entries.of(COMMIT) if entry.round == number)
        progress_from(commit, self._blobs)
        self._drop_after(number)

    def _return_to(self, number: int) -> None:
        """Drops everything after a round. Devices send again the updates that they still have."""
        self._drop_after(number)
        self.repairs += f" The run continues after round {number}, whose weights are intact."

    def _drop_after(self, number: int) -> None:
        after = (number + 1, _LAST)
        shorten_head(self._folder, self._entries, number)
        kinds = (COMMIT, RECORD, *_OF_ROUND, *SIGNATURES)
        self._entries.write(drop=[(kind, *after) for kind in kinds])
        write_head(self._folder, self._entries)

    def _cohort(self, number: int, records: Sequence[RoundRecord]) -> int | None:
        entry = self._entries.one(COHORT + MessageType.TRAIN, number + 1, 0)
        if entry is not None:
            return len(cohort_from(entry).nodes)
        return records[-1].cohort if records else None

    def sweep(self) -> None:
        """Begins to delete the files of values that no entry refers to, as after a commit."""
        self._blobs.keep_only(values_of(self._entries))


def values_of(entries: Entries) -> set[str]:
    """Returns the file names of all values that entries refer to."""
    kinds = [COMMIT, *(REPLY + purpose for purpose in PURPOSES)]
    return {digest for kind in kinds for one in entries.of(kind) for digest in digests_of(one)}


def create(
    folder: Path, identity: Mapping[str, Any], *, on_point: OnPoint = ignore_point
) -> Journal:
    """Creates the journal of a new run in ``folder``, which must not contain one."""
    entries = Entries(folder / JOURNAL)
    values = {"format": FORMAT, "identity": identity, "instance": secrets.token_hex(8)}
    entries.write([new_entry(RUN, 0, 0, values)])
    write_head(folder, entries)
    return Journal(folder, entries, "", on_point=on_point)


def reopen(folder: Path, *, on_point: OnPoint = ignore_point) -> Journal | None:
    """Opens the journal in ``folder`` and repairs it if damaged; returns None if no run began.

    Raises:
        DataError: the journal is damaged, and no copy is left to repair it from.
    """
    if not is_begun(folder):
        return None
    settle_restored(folder)
    entries, repairs = open_repaired(folder)
    run = entries.one(RUN, 0, 0)
    if run is None:  # the process died before it had written the run's entry
        entries.close()
        return None
    try:
        return Journal(folder, entries, repairs, on_point=on_point)
    except BaseException:
        entries.close()
        raise
