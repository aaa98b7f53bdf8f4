"""Cuts jagged rows into tiles of about the same size, for the `torch` backend.

On a CPU reading the lengths costs nothing, and the chunks of a tile have about one length. Elsewhere
reading would wait for the device, so tiles depend only on sizes and may have up to three times the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ifa_torchrec.ops.checks import check_offsets
from ifa_torchrec.ops.jagged import on_cpu

TILE = 4096
"""Rows processed at a time: with D = 64 and 4 heads of 16, a tile's temporaries are about 4 MB."""
GPU_TILE = 1 << 18
"""The same on a GPU, which finishes 4096 rows before the next tile is launched: the forward of 10^6
events took an H200 86 ms with tiles of 4096 rows and 5.6 ms with these."""
LONGEST_CHUNK = 1024
"""The most rows of a request in one chunk, which is one row of a tile."""


def tiles(offsets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut the requests' rows into chunks, and the chunks into tiles.

    Args:
        offsets: [B + 1] int64; only read on a CPU. Elsewhere wrong offsets never yield a row beyond
            ``rows``.
        rows: number of rows of all requests.

    Yields:
        request [b]: the request of each chunk; row [b, L]: its rows, with some other row as padding;
        valid [b, L] bool: False where padded.

    Raises:
        ValueError: on a CPU, if offsets do not rise from 0 to the number of rows.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.tiling import tiles
        >>> [[x.tolist() for x in tile] for tile in tiles(torch.tensor([0, 2, 2, 3]), 3)]
        [[[0, 2], [[0, 1], [2, 2]], [[True, True], [True, False]]]]
    """
    return _of_lengths(offsets, rows) if on_cpu(offsets) else _of_sizes(offsets, rows)


def tile_rows(x: Tensor, row: Tensor, valid: Tensor) -> Tensor:
    """The rows [b, L, ...] of x. Padding is zero, except on a CPU: there it is a row of the chunk's own
    request, so that a NaN in it does not reach other requests.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.tiling import tile_rows
        >>> row, valid = torch.tensor([[0, 0]]), torch.tensor([[True, False]])
        >>> tile_rows(torch.ones(1, 2), row, valid).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    found = x[row]
    if on_cpu(x):
        return found
    return found.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 1)), 0)


def room_for_rows(like: Tensor, rows: int, *shape: int) -> Tensor:
    """Zeros [rows + 1, ...] to put rows into; the last row is for padding, to be dropped.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.tiling import room_for_rows
        >>> room_for_rows(torch.zeros(1), 3, 2).shape
        torch.Size([4, 2])
    """
    return like.new_zeros(rows + 1, *shape)


def put_rows(room: Tensor, row: Tensor, valid: Tensor, values: Tensor) -> None:
    """Write the values [b, L, ...] of a tile to their rows.

    Example:
        >>> import torch
        >>> from ifa_torchrec.ops.kernels.tiling import put_rows, room_for_rows
        >>> room = room_for_rows(torch.zeros(1), 2)
        >>> put_rows(room, torch.tensor([[1, 1]]), torch.tensor([[True, False]]), torch.ones(1, 2))
        >>> room[:2].tolist()
        [0.0, 1.0]
    """
    if on_cpu(room):
        room[row[valid]] = values[valid].to(room.dtype)
        return
    place = torch.where(valid, row, len(room) - 1).flatten()
    room.index_copy_(0, place, values.flatten(0, 1).to(room.dtype))


def _of_lengths(offsets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tiles of chunks sorted by length, longest first, so that there is little padding."""
    device = offsets.device
    check_offsets("offsets", offsets, rows)
    starts, lengths = offsets[:-1], offsets.diff()
    chunks = (lengths + LONGEST_CHUNK - 1) // LONGEST_CHUNK
    request = torch.repeat_interleave(torch.arange(len(lengths), device=device), chunks)
    before = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    nth = torch.arange(len(request), device=device) - before
    start = starts[request] + nth * LONGEST_CHUNK
    length = (lengths[request] - nth * LONGEST_CHUNK).clamp(max=LONGEST_CHUNK)
    length, order = length.sort(descending=True, stable=True)
    request, start = request[order], start[order]
    longest = length.tolist()
    first = 0
    while first < len(longest):
        last = first + max(TILE // longest[first], 1)
        step = torch.arange(longest[first], device=device)
        valid = step < length[first:last, None]
        row = start[first:last, None] + torch.minimum(step, length[first:last, None] - 1)
        yield request[first:last], row, valid
        first = last


def _of_sizes(offsets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tiles of chunks of about the mean length. Request b has floor(offsets[b + 1] / size) -
    floor(offsets[b] / size) + 1 chunks, enough wherever its rows begin, so that the total is known
    without reading offsets. Some chunks are empty."""
    requests = offsets.shape[0] - 1
    if rows == 0 or requests == 0:
        return
    device, size = offsets.device, min(1 << (-(-rows // requests) - 1).bit_length(), LONGEST_CHUNK)
    firsts = offsets.div(size, rounding_mode="floor") + torch.arange(requests + 1, device=device)
    chunk, step = torch.arange(rows // size + requests, device=device), torch.arange(size, device=device)
    request = (torch.searchsorted(firsts, chunk, right=True) - 1).clamp(0, requests - 1)
    start = offsets[request] + (chunk - firsts[request]) * size
    length = (offsets[request + 1] - start).clamp(max=size)
    each = max(GPU_TILE // size, 1)
    for first in range(0, len(chunk), each):
        part = slice(first, first + each)
        row = start[part, None] + step
        yield (
            request[part],
            row.clamp(0, rows - 1),
            (step < length[part, None]) & (row >= 0) & (row < rows),
        )
