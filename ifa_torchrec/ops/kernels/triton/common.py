# Device code is Triton's language, not Python: its types are none that pyright knows.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
"""What the kernels share: rows cut into chunks, sums of chunks, feature maps, how a kernel is started.

Names in capitals are known when a kernel is compiled. A tile has COLUMNS = HEADS * PADDED columns: the
features of HEADS heads, each padded from WIDTH to a power of two. The tokens' D entries are read TILE at
a time.
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
"""All of a head's features are in one program's registers; wider heads are ``wide``'s."""
MAPS = {"elu": 0, "relu": 1, "hedgehog": 2}
_HEDGEHOG = tl.constexpr(MAPS["hedgehog"])
_ELU = tl.constexpr(MAPS["elu"])

# ---------------------------------------------------------------------------------- on the device


@triton.jit
def chunk_rows(offsets, firsts, chunk, requests, rows, CHUNK: tl.constexpr):
    """The request that a chunk belongs to, by bisection, and its first row and its end.

    Rows are cut off at the number of rows: offsets that are wrong read no foreign memory.
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
    """Of a tile's columns the head, the feature in it, and whether it is one; and, [1, COLUMNS], whether
    it would be one of a head that there is."""
    column = tl.arange(0, HEADS * PADDED)
    head, nth = group * HEADS + column // PADDED, column % PADDED
    return head, nth, (nth < WIDTH) & (head < H), (nth < WIDTH)[None, :]


@triton.jit
def head_sums(x, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """[R, HEADS * PADDED] -> [R, HEADS]."""
    return tl.sum(tl.reshape(x, [x.shape[0], HEADS, PADDED]), 2)


@triton.jit
def to_columns(x, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """[R, HEADS] -> [R, HEADS * PADDED], every head's value in all of its columns."""
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
    """phi of projections [R, COLUMNS]: hedgehog's softmax of x and that of -x; others' twice.

    ``inside`` [1, COLUMNS] is false where a head is padded. A NaN stays one.
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
    """exp(-lambda_h t_i) and w_hi of rows start + row [R] and heads [K], zero outside; both [R, K].

    WEIGHTS is 0 without weights, 1 for [N], 2 for [N, H].
    """
    inside = valid[:, None] & (head < H)[None, :]
    decayed = tl.where(inside, 1.0, 0.0)
    if AGES:
        age = tl.load(ages + start + row, mask=valid, other=0.0)
        rate = tl.load(decay + head, mask=head < H, other=0.0)
        # no decay is no decay at any age, an infinite one included
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

    Where D is one tile, that is all of the tokens, which need not be read again.
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
    """[R, TILE] of rows of D entries, zeros outside, in the dtype of the products."""
    mask = valid[:, None] & (dim < D)[None, :]
    return tl.load(tokens + row[:, None] * D + dim[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def store_rows(out, values, row, valid, dim, D: tl.constexpr):
    """[R, TILE] into rows of D entries."""
    mask = valid[:, None] & (dim < D)[None, :]
    tl.store(out + row[:, None] * D + dim[None, :], values, mask=mask)


@triton.jit
def load_state(key_value, key_sum, head, nth, real, feature, WIDTH: tl.constexpr):
    """S of a group of heads as one matrix [COLUMNS, COLUMNS], zeros between heads, and z [COLUMNS]."""
    mask = (head[:, None] == head[None, :]) & real[:, None] & real[None, :]
    state = tl.load(key_value + feature[:, None] * WIDTH + nth[None, :], mask=mask, other=0.0)
    return state, tl.load(key_sum + feature, mask=real, other=0.0)


@triton.jit
def store_state(
    out, state, total, head, nth, real, feature, total_too, FEATURES: tl.constexpr, WIDTH: tl.constexpr
):
    """The blocks of S that are within a head, and behind all of S z, zeros where not ``total_too``."""
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
    """Start a kernel on the device of its tensors; of nothing to do, none.

    Args:
        kernel: the function.
        grid: how many programs.
        arguments: by name; the first tensor of them says the device.
        constants: by name, what it is compiled for.
        warps: how many a program has.
        stages: of loops, how many blocks of rows are in work at once, the next ones being loaded.
    """
    if 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **constants, **options)


BACKWARD_PROGRAMS = 512
"""Of a backward that sums over all requests: the most partial sums of a projection's gradient."""


def backward_programs(chunks: int) -> tuple[int, int]:
    """How many programs share the chunks of a backward, and how many of them each has."""
    each = max(triton.cdiv(chunks, BACKWARD_PROGRAMS), 1)
    return triton.cdiv(chunks, each), each


def launch_backward(
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    work: tuple[int, int, int],
) -> None:
    """Start a backward's kernel, of rows and of sums at once where that is possible.

    Args:
        kernel: with OF_ROWS and OF_SUMS.
        arguments: without count, each and groups.
        constants: without OF_ROWS and OF_SUMS.
        work: the numbers of chunks, of groups of heads and of tiles of D.
    """
    chunks, groups, parts = work
    programs, each = backward_programs(chunks)
    of_sums = arguments | {"count": chunks, "each": each, "groups": 1}
    fused = groups == parts == 1  # a program has all heads and entries: one look at the rows is enough
    sums = constants | {"OF_ROWS": fused, "OF_SUMS": True}
    launch(kernel, (programs, groups, parts), of_sums, sums, warps=8)
    if not fused:
        of_rows = arguments | {"count": chunks, "each": 1, "groups": groups}
        constants = constants | {"OF_ROWS": True, "OF_SUMS": False}
        launch(kernel, (chunks, 1, parts), of_rows, constants, warps=8)


class Chunks(NamedTuple):
    """Jagged rows cut into chunks of at most ``size`` rows, each of one request.

    Request b has floor(offsets[b + 1] / size) - floor(offsets[b] / size) + 1 of them, which is enough
    wherever its rows begin; so their number is known without a look at offsets. Some are empty.

    Fields: firsts [B + 1] int64, each request's first chunk; count, of all; size.
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
        """Of offsets [B + 1] int64, on the device of the rows, as ``chunk_size``."""
        check_offsets("offsets", offsets, rows)
        return Chunks.of_some(offsets.contiguous(), rows, programs)

    @staticmethod
    def of_some(offsets: Tensor, rows: int, programs: int = 1) -> Chunks:
        """Of offsets that end at ``rows`` or before, where only the device knows."""
        size = chunk_size(rows, programs)
        numbers = torch.arange(len(offsets), device=offsets.device, dtype=torch.int64)
        firsts = offsets.div(size, rounding_mode="floor") + numbers
        return Chunks(offsets, firsts, rows, rows // size + len(offsets) - 1, size)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``chunk_rows``."""
        return {
            "offsets": self.offsets,
            "firsts": self.firsts,
            "requests": self.requests,
            "rows": self.rows,
        }


def chunk_size(rows: int, programs: int = 1) -> int:
    """Rows of a chunk that so many programs share: enough chunks to fill a card, few enough that their
    sums are little memory."""
    return min(max(triton.next_power_of_2(rows * programs // 512), 64), 1024 * programs)


def sum_segments(rows: Tensor, bounds: Tensor, order: Tensor | None = None) -> Tensor:
    """Sums of rows [n, K] float32 by segment, deterministic: [S, K].

    Args:
        rows: what is summed.
        bounds: [S + 1] int64, segment s is bounds[s]:bounds[s + 1].
        order: [n] int64, the row at each place; None for the rows as they stand.
    """
    segments, (length, stride) = len(bounds) - 1, rows.shape
    sums = rows.new_empty(segments, stride)
    block = min(max(triton.next_power_of_2(length // max(segments, 1)), 4), 32)
    tile = min(triton.next_power_of_2(stride), 2048 // block)
    launch(
        _sum_segments_kernel,
        (segments * triton.cdiv(stride, tile),),  # one axis: others have 65,535 programs at most
        {"rows": rows, "order": bounds if order is None else order, "bounds": bounds, "sums": sums}
        | {"length": length},
        {"STRIDE": stride, "ORDERED": order is not None, "ROWS": block, "TILE": tile},
    )
    return sums


class Products(NamedTuple):
    """How tokens of a dtype are multiplied: in which dtype, and how exactly where that is float32."""

    DOT: Any
    PRECISION: str

    @staticmethod
    def of(dtype: torch.dtype) -> Products:
        """bfloat16 as it is; float16 in TF32, which holds it and does not overflow; float32 in TF32
        where torch allows it, else as three products of TF32, which are off by 1e-6 at most."""
        if dtype == torch.bfloat16:
            return Products(tl.bfloat16, "ieee")
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        exact = "ieee" if torch.version.hip else "tf32x3"
        return Products(tl.float32, "tf32" if dtype == torch.float16 or allowed else exact)

    @property
    def dtype(self) -> torch.dtype:
        """The same as ``DOT``."""
        return torch.bfloat16 if tl.bfloat16 == self.DOT else torch.float32

    @property
    def of_sums(self) -> str:
        """How exactly float32 sums and states are multiplied: in TF32, where tokens are no better."""
        return "tf32" if tl.bfloat16 == self.DOT else self.PRECISION


def is_light(feature_map: str, dtype: torch.dtype) -> bool:
    """Is there little in a program's registers: one map, in products of 16 bits?"""
    return feature_map != "hedgehog" and dtype == torch.bfloat16


def multiplies_in_registers(device: torch.device) -> bool:
    """Do tensor cores read both factors from registers, of which a tile must leave more? Those of 9.0
    and later read them from shared memory."""
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
        """For a projection [H, d, D]: about as many columns; rows at a time, half if not light."""
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
        """Of heads that work together."""
        return triton.cdiv(heads, self.HEADS)


def floats(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As a kernel reads it: contiguous, of this shape and dtype."""
    if x.shape != shape:
        raise ValueError(f"a tensor must be {list(shape)}, got {list(x.shape)}")
    return x.to(dtype).contiguous()


def tokens(x: Tensor, dim: int) -> Tensor:
    """As a kernel reads them: contiguous, [rows, D]."""
    if x.shape[1:] != (dim,):
        raise ValueError(f"tokens must be [rows, {dim}], got {list(x.shape)}")
    return x.contiguous()


def split_state(state: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """S [B, H, d_phi, d] and z [B, H, d_phi] of sums of rows that ``store_state`` wrote."""
    requests, features = len(state), state.shape[1] // (width + 1)
    shape = (requests, heads, features // heads)
    key_value, key_sum = state.split([features * width, features], 1)
    # clones: of one request the parts are contiguous as they are, and outputs must not share memory
    dense = torch.contiguous_format
    key_value = key_value.reshape(*shape, width).clone(memory_format=dense)
    return key_value, key_sum.reshape(shape).clone(memory_format=dense)


def weighting(
    weights: Tensor | None, ages: Tensor | None, decay: Tensor, rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants of ``event_weights``; what is not there is stood in for by decay."""
    heads = len(decay)
    kind = 0 if weights is None else weights.ndim
    decay = floats(decay, heads)
    arguments = {
        "weights": decay if weights is None else floats(weights, *(rows, heads)[:kind]),
        "ages": decay if ages is None else floats(ages, rows),
        "decay": decay,
    }
    return arguments, {"WEIGHTS": kind, "AGES": ages is not None}
