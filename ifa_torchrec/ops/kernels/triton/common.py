# Device code is written in Triton's language, whose types pyright does not know.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""Shared by the kernels: chunks of rows and their sums, feature maps, and how a kernel is launched.

Names in capitals are compile-time constants. A tile has COLUMNS = HEADS * PADDED columns: the features
of HEADS heads, each padded from WIDTH to a power of two. The tokens' D entries are read TILE at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ifa_torchrec.ops.checks import check_offsets

WIDEST_HEAD = 64
"""All of a head's features are in one program's registers; ``wide`` handles wider heads."""
MAPS = {"elu": 0, "relu": 1, "hedgehog": 2}
_HEDGEHOG = tl.constexpr(MAPS["hedgehog"])
_ELU = tl.constexpr(MAPS["elu"])

# ---------------------------------------------------------------------------------- on the device


@triton.jit
def chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK: tl.constexpr):
    """The request that a chunk belongs to, found by bisection, and the chunk's first row and end.

    Both are clamped to the number of rows, so that wrong offsets do not read outside the tensors.
    """
    low = chunk * 0
    high = low + requests
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(firsts + middle) <= chunk
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    first = tl.load(offsets + low) + (chunk - tl.load(firsts + low)) * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(offsets + low + 1))
    return low, tl.maximum(first, 0), tl.minimum(end, rows)


@triton.jit
def columns(group, H: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """For each column of a tile: its head, its feature in the head, and whether both exist; and,
    [1, COLUMNS], whether the feature exists, whatever the head."""
    column = tl.arange(0, HEADS * PADDED)
    head, nth = group * HEADS + column // PADDED, column % PADDED
    return head, nth, (nth < WIDTH) & (head < H), (nth < WIDTH)[None, :]


@triton.jit
def head_sums(x, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """[R, HEADS * PADDED] -> [R, HEADS]."""
    return tl.sum(tl.reshape(x, [x.shape[0], HEADS, PADDED]), 2)


@triton.jit
def to_columns(x, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """[R, HEADS] -> [R, HEADS * PADDED], each head's value in all of its columns."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], HEADS, PADDED])
    return tl.reshape(wide, [x.shape[0], HEADS * PADDED])


@triton.jit
def _softmax(x, inside, HEADS: tl.constexpr, PADDED: tl.constexpr):
    wide = tl.reshape(tl.where(inside, x, float("-inf")), [x.shape[0], HEADS, PADDED])
    wide = tl.exp(wide - tl.max(wide, 2, keep_dims=True))
    wide = wide / tl.sum(wide, 2, keep_dims=True)
    return tl.where(inside, tl.reshape(wide, [x.shape[0], HEADS * PADDED]), 0.0)


@triton.jit
def features(x, inside, MAP: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """phi of projections [R, COLUMNS]: hedgehog's softmax of x and that of -x; other maps' phi twice.

    ``inside`` [1, COLUMNS] is false where a head is padded. A NaN stays NaN.
    """
    if MAP == _HEDGEHOG:
        return _softmax(x, inside, HEADS, PADDED), _softmax(-x, inside, HEADS, PADDED)
    if MAP == _ELU:
        phi = tl.where(inside, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)
    else:
        phi = tl.where(x < 0, 0.0, x)
    return phi, phi


@triton.jit
def features_backward(
    grad, other_grad, x, phi, other, MAP: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr
):
    """The gradient of projections from those of phi; ``other`` is hedgehog's softmax of -x."""
    if MAP == _HEDGEHOG:
        grad = grad * phi
        other_grad = other_grad * other
        total = to_columns(head_sums(grad, HEADS, PADDED), HEADS, PADDED)
        other_total = to_columns(head_sums(other_grad, HEADS, PADDED), HEADS, PADDED)
        return grad - phi * total - other_grad + other * other_total
    if MAP == _ELU:
        return grad * tl.where(phi > 1, 1.0, phi)
    return grad * tl.where(x > 0, 1.0, 0.0)


@triton.jit
def event_weights(
    weights, ages, decay, start, row, valid, head, H, WEIGHTS: tl.constexpr, AGES: tl.constexpr
):
    """exp(-lambda_h t_i) and w_hi for rows start + row [R] and heads [K], zero outside; both [R, K].

    WEIGHTS is 0 without weights, 1 for [N], 2 for [N, H].
    """
    inside = valid[:, None] & (head < H)[None, :]
    decayed = tl.where(inside, 1.0, 0.0)
    if AGES:
        age = tl.load(ages + start + row, mask=valid, other=0.0)
        rate = tl.load(decay + head, mask=head < H, other=0.0)
        # a rate of 0 means no decay at any age, even an infinite one
        exponent = tl.where((rate > 0)[None, :], rate[None, :] * age[:, None], 0.0)
        decayed = tl.where(inside, tl.exp(-exponent), 0.0)
    if WEIGHTS == 0:
        return decayed, decayed
    if WEIGHTS == 1:
        weight = tl.load(weights + start + row, mask=valid, other=0.0)[:, None]
    else:
        at = weights + start * H + row[:, None] * H + head[None, :]
        weight = tl.load(at, mask=inside, other=0.0)
    return decayed, decayed * weight


@triton.jit
def project(
    tokens, row, valid, weight, weight_row, inside,
    D: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tokens [R, D] times the rows [COLUMNS] of weight, [R, COLUMNS] float32; and the last tile of D.

    If D is one tile, that tile is the whole of the tokens, which need not be read again.
    """
    for part in tl.static_range((D + TILE - 1) // TILE):
        dim = part * TILE + tl.arange(0, TILE)
        x = load_rows(tokens, row, valid, dim, D, DOT)
        w = load_rows(weight, weight_row, inside, dim, D, DOT)
        if part == 0:
            product = tl.dot(x, tl.trans(w), input_precision=PRECISION)
        else:
            product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    return product, x


@triton.jit
def load_rows(tokens, row, valid, dim, D: tl.constexpr, DOT: tl.constexpr):
    """Load [R, TILE] from rows of D entries, zeros outside, in the dtype of the products."""
    mask = valid[:, None] & (dim < D)[None, :]
    return tl.load(tokens + row[:, None] * D + dim[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def store_rows(out, values, row, valid, dim, D: tl.constexpr):
    """Store [R, TILE] into rows of D entries."""
    mask = valid[:, None] & (dim < D)[None, :]
    tl.store(out + row[:, None] * D + dim[None, :], values, mask=mask)


@triton.jit
def load_state(key_value, key_sum, head, nth, real, feature, WIDTH: tl.constexpr):
    """S of a group of heads as one block-diagonal matrix [COLUMNS, COLUMNS], and z [COLUMNS]."""
    mask = (head[:, None] == head[None, :]) & real[:, None] & real[None, :]
    state = tl.load(key_value + feature[:, None] * WIDTH + nth[None, :], mask=mask, other=0.0)
    return state, tl.load(key_sum + feature, mask=real, other=0.0)


@triton.jit
def store_state(
    out, state, total, head, nth, real, feature, total_too, FEATURES: tl.constexpr, WIDTH: tl.constexpr
):
    """Store the diagonal blocks of S and, after all of S, z; zeros for z unless ``total_too``."""
    mask = (head[:, None] == head[None, :]) & real[:, None] & real[None, :]
    tl.store(out + feature[:, None] * WIDTH + nth[None, :], state, mask=mask)
    tl.store(out + FEATURES * WIDTH + feature, tl.where(total_too, total, 0.0), mask=real)


@triton.jit
def _sum_segments_kernel(
    rows, order, bounds, sums, length, STRIDE: tl.constexpr, ORDERED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums[s] = the sum of rows[order[i]] for i in bounds[s]:bounds[s + 1], always in the same order."""
    tiles: tl.constexpr = (STRIDE + TILE - 1) // TILE
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    total = tl.zeros([ROWS, TILE], dtype=tl.float32)
    end = tl.minimum(tl.load(bounds + segment + 1), length)
    for start in range(tl.maximum(tl.load(bounds + segment), 0), end, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < end
        if ORDERED:
            row = tl.load(order + row, mask=valid, other=0)
        mask = valid[:, None] & (column < STRIDE)[None, :]
        total += tl.load(rows + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
    tl.store(sums + segment * STRIDE + column, tl.sum(total, 0), mask=column < STRIDE)


# ------------------------------------------------------------------------------------ on the host


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Launch a kernel on the device of its tensors; does nothing for an empty grid.

    Args:
        kernel: the function.
        grid: number of programs along each axis.
        arguments: by name; the first tensor determines the device.
        constants: by name, the compile-time constants.
        warps: warps per program.
        stages: pipeline stages of loops: how many blocks of rows are loaded or processed at once.
    """
    if 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **constants, **options)


BACKWARD_PROGRAMS = 512
"""Most partial sums of a projection's gradient in a backward that sums over all requests."""


def backward_programs(chunks: int) -> tuple[int, int]:
    """How many programs share the chunks of a backward, and how many chunks each has."""
    each = max(triton.cdiv(chunks, BACKWARD_PROGRAMS), 1)
    return triton.cdiv(chunks, each), each


def launch_backward(
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    work: tuple[int, int, int],
) -> None:
    """Launch a backward's kernel, once for both rows and sums where possible, else once for each.

    Args:
        kernel: with constants OF_ROWS and OF_SUMS.
        arguments: without count, each and groups.
        constants: without OF_ROWS and OF_SUMS.
        work: the numbers of chunks, of groups of heads and of tiles of D.
    """
    chunks, groups, parts = work
    programs, each = backward_programs(chunks)
    of_sums = arguments | {"count": chunks, "each": each, "groups": 1}
    fused = groups == parts == 1  # a program has all heads and entries: one pass over the rows is enough
    sums = constants | {"OF_ROWS": fused, "OF_SUMS": True}
    launch(kernel, (programs, groups, parts), of_sums, sums, warps=8)
    if not fused:
        of_rows = arguments | {"count": chunks, "each": 1, "groups": groups}
        constants = constants | {"OF_ROWS": True, "OF_SUMS": False}
        launch(kernel, (chunks, 1, parts), of_rows, constants, warps=8)


class Chunks(NamedTuple):
    """Jagged rows cut into chunks of at most ``size`` rows, each of one request.

    Request b has floor(offsets[b + 1] / size) - floor(offsets[b] / size) + 1 of them, which is enough
    wherever its rows begin; so their number is known without reading offsets. Some chunks are empty.

    Attributes: firsts [B + 1] int64, each request's first chunk; count, number of chunks; size.
    """

    offsets: Tensor
    firsts: Tensor
    rows: int
    count: int
    size: int

    @property
    def requests(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def of(offsets: Tensor, rows: int, programs: int = 1) -> Chunks:
        """Chunks for offsets [B + 1] int64 on the rows' device; sized by ``chunk_size``."""
        check_offsets("offsets", offsets, rows)
        return Chunks.of_some(offsets.contiguous(), rows, programs)

    @staticmethod
    def of_some(offsets: Tensor, rows: int, programs: int = 1) -> Chunks:
        """The same for offsets that end at ``rows`` or before it, which only the device knows."""
        size = chunk_size(rows, programs)
        numbers = torch.arange(len(offsets), device=offsets.device, dtype=torch.int64)
        firsts = offsets.div(size, rounding_mode="floor") + numbers
        return Chunks(offsets, firsts, rows, rows // size + len(offsets) - 1, size)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of ``chunk_rows``."""
        return {
            "offsets": self.offsets,
            "firsts": self.firsts,
            "requests": self.requests,
            "rows": self.rows,
        }


def chunk_size(rows: int, programs: int = 1) -> int:
    """Rows of a chunk that ``programs`` programs share: enough chunks to fill a GPU, few enough that
    their sums need little memory."""
    return min(max(triton.next_power_of_2(rows * programs // 512), 64), 1024 * programs)


def sum_segments(rows: Tensor, bounds: Tensor, order: Tensor | None = None) -> Tensor:
    """Sum rows [n, K] float32 by segment, deterministically: [S, K].

    Args:
        rows: what is summed.
        bounds: [S + 1] int64, segment s is bounds[s]:bounds[s + 1].
        order: [n] int64, a permutation of the rows; None for the rows as they are.
    """
    segments, (length, stride) = len(bounds) - 1, rows.shape
    sums = rows.new_empty(segments, stride)
    block = min(max(triton.next_power_of_2(length // max(segments, 1)), 4), 32)
    tile = min(triton.next_power_of_2(stride), 2048 // block)
    launch(
        _sum_segments_kernel,
        (segments * triton.cdiv(stride, tile),),  # the first axis: others have at most 65,535 programs
        {"rows": rows, "order": bounds if order is None else order, "bounds": bounds, "sums": sums}
        | {"length": length},
        {"STRIDE": stride, "ORDERED": order is not None, "ROWS": block, "TILE": tile},
    )
    return sums


class Products(NamedTuple):
    """How tokens of a dtype are multiplied: the dtype, and the precision if that is float32."""

    DOT: Any
    PRECISION: str

    @staticmethod
    def of(dtype: torch.dtype) -> Products:
        """bfloat16 as is; float16 in TF32, which represents it exactly and does not overflow; float32 in
        TF32 if torch allows it, else as three TF32 products, which are off by at most 1e-6."""
        if dtype == torch.bfloat16:
            return Products(tl.bfloat16, "ieee")
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        exact = "ieee" if torch.version.hip else "tf32x3"
        return Products(tl.float32, "tf32" if dtype == torch.float16 or allowed else exact)

    @property
    def dtype(self) -> torch.dtype:
        """``DOT`` as a torch.dtype."""
        return torch.bfloat16 if tl.bfloat16 == self.DOT else torch.float32

    @property
    def of_sums(self) -> str:
        """The precision of products with float32 sums and states: TF32 if tokens are bfloat16."""
        return "tf32" if tl.bfloat16 == self.DOT else self.PRECISION


def is_light(feature_map: str, dtype: torch.dtype) -> bool:
    """Whether a program needs few registers: one feature map, and 16-bit products."""
    return feature_map != "hedgehog" and dtype == torch.bfloat16


def multiplies_in_registers(device: torch.device) -> bool:
    """Whether tensor cores read both factors from registers, so that tiles must be smaller. From compute
    capability 9.0 on they read them from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


class Tile(NamedTuple):
    """The shape of a program's work: HEADS heads of PADDED columns, TILE of D, ROWS rows."""

    HEADS: int
    PADDED: int
    TILE: int
    ROWS: int

    @staticmethod
    def of(
        sizes: tuple[int, int, int], columns: int, rows: int, light: bool, device: torch.device
    ) -> Tile:
        """The tile for a projection [H, d, D] with about ``columns`` columns, and ``rows`` rows at a
        time, half as many if not ``light``."""
        heads, width, dim = sizes
        padded = triton.next_power_of_2(width)
        widest = 64
        if multiplies_in_registers(device):
            columns = min(columns, 32)
            widest = min(2048 // max(columns, padded), 64)
        columns = max(16, padded, min(columns, triton.next_power_of_2(heads * padded)))
        tile = min(triton.next_power_of_2(dim), widest)
        return Tile(columns // padded, padded, max(tile, 16), rows if light else rows // 2)

    def groups(self, heads: int) -> int:
        """Number of groups of heads that are processed together."""
        return triton.cdiv(heads, self.HEADS)


def floats(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor as a kernel reads it: contiguous, with this shape and dtype."""
    if x.shape != shape:
        raise ValueError(f"a tensor must be {list(shape)}, got {list(x.shape)}")
    return x.to(dtype).contiguous()


def tokens(x: Tensor, dim: int) -> Tensor:
    """Tokens as a kernel reads them: contiguous, [rows, D]."""
    if x.shape[1:] != (dim,):
        raise ValueError(f"tokens must be [rows, {dim}], got {list(x.shape)}")
    return x.contiguous()


def split_state(state: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Split sums of rows that ``store_state`` wrote into S [B, H, d_phi, d] and z [B, H, d_phi]."""
    requests, features = len(state), state.shape[1] // (width + 1)
    shape = (requests, heads, features // heads)
    key_value, key_sum = state.split([features * width, features], 1)
    # clones: for one request the parts are contiguous views, and outputs must not share memory
    dense = torch.contiguous_format
    key_value = key_value.reshape(*shape, width).clone(memory_format=dense)
    return key_value, key_sum.reshape(shape).clone(memory_format=dense)


def weighting(
    weights: Tensor | None, ages: Tensor | None, decay: Tensor, rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants of ``event_weights``; decay is a placeholder for missing tensors."""
    heads = len(decay)
    kind = 0 if weights is None else weights.ndim
    decay = floats(decay, heads)
    arguments = {
        "weights": decay if weights is None else floats(weights, *(rows, heads)[:kind]),
        "ages": decay if ages is None else floats(ages, rows),
        "decay": decay,
    }
    return arguments, {"WEIGHTS": kind, "AGES": ages is not None}
