"""States read: the records of some users, and the states that they are at a request's time.

A request sees the events strictly before its time, as in training. The last event may not be before it:
therefore the records u, which take back all events of the last one's time, and so serve every time after
the event before those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ifa_torchrec.data.dataset import MICROSECONDS_PER_DAY
from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.states.layout import BLOCK, has_bit, user_keys
from ifa_torchrec.serving.states.records import Head, RecordCodec
from ifa_torchrec.serving.times import utc


@dataclass
class UserRecords:
    """What was read of a user.

    Args:
        user: external id.
        head: None where the user has no state.
        rows: the identity rows asked for that there are, by key, ascending.
        before: head and rows before the last event's time, where they were read; a row that was not
            there then has no bytes.
    """

    user: int | str
    head: Head | None
    rows: dict[int, bytes]
    before: tuple[Head, dict[int, bytes]] | None = None

    def reaches(self, time: int | None) -> bool:
        """Whether the head serves a time, so that what was before is not needed."""
        return self.head is not None and (time is None or time > self.head.sums.time)

    def go_to(self, time: int | None, now: int, strict: bool) -> int:
        """Make head and rows those of a time; the time that they are as of.

        Args:
            time: microseconds; None for ``now``, or just after the last event.
            now: microseconds.
            strict: refuse a time that is before what was before.

        Raises:
            StateError: it is refused.
        """
        if self.head is None:
            return now if time is None else time
        last = self.head.sums.time
        if time is None:
            return max(now, last + 1)
        if time > last:
            return time
        assert self.before is not None
        self.head, rows = self.before
        rows = {key: rows.get(key, row) for key, row in self.rows.items()}
        self.rows = {key: row for key, row in rows.items() if row}
        earliest = self.head.sums.time + 1
        if not self.head.count or time >= earliest:
            return time
        if strict:
            raise StateError(
                f"user {self.user!r} has events at {utc(earliest - 1)} and {utc(last)}, neither before "
                f"the request's time {utc(time)}; a state can go back behind the last of them alone"
            )
        return earliest


class Lookup:
    """Which records some users' states are made of.

    Args:
        codec: of the version's records.
        users: B external ids.
        wanted: B arrays of identity keys, ascending, each once.
        with_before: whether to read what was before the last events, too.

    Attributes:
        keys: of all these records.
    """

    def __init__(
        self,
        codec: RecordCodec,
        users: Sequence[int | str],
        wanted: Sequence[np.ndarray],
        with_before: bool,
    ) -> None:
        self._codec, self._users = codec, users
        lengths = [len(of_user) for of_user in wanted]
        self._ends = np.cumsum(lengths).tolist()
        self._request = np.repeat(np.arange(len(users)), lengths)
        self._wanted = np.concatenate([np.empty(0, np.int64), *wanted])
        block = self._wanted // BLOCK
        # rows of one block follow each other
        begins = np.ones(len(block), bool)
        begins[1:] = (block[1:] != block[:-1]) | (self._request[1:] != self._request[:-1])
        self._place = np.cumsum(begins) - 1
        self._block, self._block_request = block[begins], self._request[begins]
        user = user_keys(users)
        keys = codec.keys
        self._parts = (
            [keys.head(user) for user in users],
            [keys.before(user) for user in users if with_before],
            keys.members_of(user[self._block_request], self._block),
            keys.rows(user[self._request], self._wanted),
        )
        self.keys = [key for part in self._parts for key in part]

    def records(self, values: Sequence[bytes | None]) -> list[UserRecords]:
        """What the records say.

        Args:
            values: of ``keys``.

        Raises:
            StoreError: one is damaged, or gone.
        """
        codec = self._codec
        opened = codec.open_all(self.keys, values)
        parts: list[list[bytes | None]] = []
        for part in self._parts:
            parts.append(opened[: len(part)])
            opened = opened[len(part) :]
        heads, befores, members, rows = parts
        records: list[UserRecords] = []
        blocks: list[bytes] = []
        first = 0
        for b, (user, end, value) in enumerate(zip(self._users, self._ends, heads, strict=True)):
            head, of_user = (None, codec.no_blocks) if value is None else codec.unpack_head(value)
            blocks.append(of_user)
            before = None
            if befores:
                if (befores[b] is None) != (head is None):
                    raise codec.lost(user)
                before = None if (body := befores[b]) is None else codec.unpack_before(body)
            keys = self._wanted[first:end].tolist()
            found = zip(keys, rows[first:end], strict=True)
            records.append(UserRecords(user, head, {k: r for k, r in found if r is not None}, before))
            first = end
        self._check_whole(blocks, members, rows)
        return records

    def _check_whole(
        self, blocks: Sequence[bytes], members: Sequence[bytes | None], rows: Sequence[bytes | None]
    ) -> None:
        """See that the blocks which the heads name are there, and the rows which the blocks name.

        Raises:
            StoreError: one of them is gone.
        """
        codec = self._codec
        places = zip(self._block_request.tolist(), self._block.tolist(), members, strict=True)
        for b, block, body in places:
            if has_bit(blocks[b], block) != (body is not None):
                raise codec.lost(self._users[b])
        bits = np.frombuffer(b"".join([codec.unpack_members(body) for body in members]), np.uint8)
        number = self._place * BLOCK + self._wanted % BLOCK
        named = bits[number >> 3] >> (number & 7) & 1
        wrong = named != np.array([row is not None for row in rows], bool)
        if wrong.any():
            raise codec.lost(self._users[int(self._request[wrong.argmax()])])


def state_of(codec: RecordCodec, records: Sequence[UserRecords], as_of: np.ndarray) -> UserState:
    """The records' states, float32, at these times [B]."""
    layout = codec.layout
    weight = np.zeros((len(records), layout.num_heads, layout.feature_dim))
    mean = np.zeros((*weight.shape, layout.head_dim))
    count = np.zeros(len(records), np.int64)
    for b, of_user in enumerate(records):
        if of_user.head is not None and of_user.head.count:
            sums = of_user.head.sums
            weight[b], mean[b] = sums.at(int(as_of[b]), codec.decay), sums.mean
            count[b] = of_user.head.count
    dense = (_tensor(mean * weight[..., None]), _tensor(weight), torch.from_numpy(count))
    if not layout.identity_key_range:
        return UserState(*dense)
    lengths = [len(of_user.rows) for of_user in records]
    keys = [key for of_user in records for key in of_user.rows]
    time, weight, mean = codec.unpack_rows([row for of_user in records for row in of_user.rows.values()])
    days = (np.repeat(as_of, lengths) - time) / MICROSECONDS_PER_DAY
    weight *= np.exp(-days[:, None] * codec.identity_decay)
    return UserState(
        *dense,
        torch.from_numpy(np.cumsum([0, *lengths])),
        torch.from_numpy(np.array(keys, np.int64)),
        _tensor(mean * weight[..., None]),
        _tensor(weight),
        layout.identity_key_range,
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
