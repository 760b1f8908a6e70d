"""The Numba kernel of paged attention: scores and sums of values as small matrix products in vector registers.

A block of keys is transposed once for all rows that share it; then every score is one chain of fused multiply-adds over the
head size, and every output element one chain over the positions, in ascending order. How many rows share a block, and where
blocks end, changes how often memory is read, never the order of a row's sums: its bits stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8  # float32 values of one vector
VECTORS = 4  # of one tile: enough independent sums to hide the latency of one
POSITIONS = VECTORS * LANES  # of one block of keys or values
ROWS = 4  # query heads of one tile
TOKENS_AT_ONCE = 64  # their scores stay in the second-level cache between the passes
SIZE_MULTIPLE = 16  # head sizes are read in whole vectors

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(FLOAT, LANES)
FMA = f"llvm.fma.v{LANES}f32"
# Numba knows no bfloat16 and computes nothing in float16: their bits come as integers of 16 bits.
BFLOAT16_BITS, FLOAT16_BITS = types.uint16, types.int16


class _Pointer:
    """Elements of a contiguous Numba array, in LLVM's terms."""

    def __init__(self, context: Any, builder: Any, array: types.Array, value: Any) -> None:
        self.builder, self.dtype = builder, array.dtype
        self.data = context.make_array(array)(context, builder, value).data

    def scalar(self, at: Any) -> Any:
        return self.builder.load(self.builder.gep(self.data, [at]))

    def splat(self, at: Any) -> Any:
        """One element in all lanes."""
        one = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), self.scalar(at), INT32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))

    def load(self, at: Any) -> Any:
        """LANES elements from `at` on, as float32."""
        if self.dtype == BFLOAT16_BITS:
            wide = ir.VectorType(INT32, LANES)
            bits = self.builder.zext(self._load(at, ir.IntType(16)), wide)
            return self.builder.bitcast(self.builder.shl(bits, ir.Constant(wide, [16] * LANES)), FLOATS)
        if self.dtype == FLOAT16_BITS:
            return self.builder.fpext(self._load(at, ir.HalfType()), FLOATS)
        return self._load(at, FLOAT)

    def _load(self, at: Any, element: ir.Type) -> Any:
        loaded = self.builder.load(self._vector(at, element))
        loaded.align = self.dtype.bitwidth // 8
        return loaded

    def store(self, value: Any, at: Any) -> None:
        self.builder.store(value, self._vector(at, FLOAT)).align = 4

    def _vector(self, at: Any, element: ir.Type) -> Any:
        pointer = self.builder.gep(self.data, [at])
        return self.builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer())


def _product(num_vectors: int, *, adds: bool) -> Callable[..., None]:
    """A kernel `c[i, j] (+)= sum over k of a[i, k] * b[k, j]`, k ascending, for as many rows i as `a_at` has entries."""

    @intrinsic
    def product(
        typing_context: Any,
        a: types.Array,  # float32; row i begins at a_at[i]
        a_at: types.UniTuple,
        b: types.Array,  # float32, or bits of bfloat16 or float16; row k begins at b_at[k]
        b_at: types.Array,
        c: types.Array,  # float32, written; row i begins at c_at[i]
        c_at: types.UniTuple,
        column: types.Integer,  # the first j
        depth: types.Integer,  # how many k
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b, b_at, c = (_Pointer(context, builder, signature.args[at], args[at]) for at in (0, 2, 3, 4))
            a_rows, c_rows = (cgutils.unpack_tuple(builder, args[at]) for at in (1, 5))
            columns = [builder.add(args[6], INT64(at * LANES)) for at in range(num_vectors)]
            ends = [[builder.add(row, column) for column in columns] for row in c_rows]
            start = c.load if adds else lambda end: ir.Constant(FLOATS, None)
            sums = [[cgutils.alloca_once_value(builder, start(end)) for end in row] for row in ends]
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), FMA)
            with cgutils.for_range(builder, args[7], intp=INT64) as loop:
                at = b_at.scalar(loop.index)
                right = [b.load(builder.add(at, column)) for column in columns]
                for a_row, row_sums in zip(a_rows, sums, strict=True):
                    left = a.splat(builder.add(a_row, loop.index))
                    for vector, total in zip(right, row_sums, strict=True):
                        builder.store(builder.call(fma, [left, vector, builder.load(total)]), total)
            for row_ends, row_sums in zip(ends, sums, strict=True):
                for end, total in zip(row_ends, row_sums, strict=True):
                    c.store(builder.load(total), end)
            return context.get_dummy_value()

        return types.void(a, a_at, b, b_at, c, c_at, types.int64, types.int64), generate

    return product  # type: ignore[no-any-return]


_score_block, _score_vector = (_product(num, adds=False) for num in (VECTORS, 1))
_add_block, _add_vector = (_product(num, adds=True) for num in (VECTORS, 1))


@intrinsic
def _transpose(
    typing_context: Any,
    source: types.Array,  # float32, or bits of bfloat16 or float16
    at: types.Array,  # int64, where LANES rows begin, from entry `first` on
    first: types.Integer,
    column: types.Integer,
    out: types.Array,  # float32[sizes, POSITIONS], written from row `column` and column `first` on
) -> Any:
    """LANES columns of LANES rows, turned over."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, rows, out = (_Pointer(context, builder, signature.args[at], args[at]) for at in (0, 1, 4))
        first, column = args[2], args[3]
        vectors = [
            source.load(builder.add(rows.scalar(builder.add(first, INT64(row))), column)) for row in range(LANES)
        ]
        masks = [ir.Constant(ir.VectorType(INT32, LANES), list(range(odd, 2 * LANES, 2))) for odd in (0, 1)]
        for _ in range(LANES.bit_length() - 1):  # each round moves one bit of a column's number into the row's
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [builder.shuffle_vector(one, other, mask) for mask in masks for one, other in pairs]
        for row, vector in enumerate(vectors):
            start = builder.mul(builder.add(column, INT64(row)), INT64(POSITIONS))
            out.store(vector, builder.add(start, first))
        return context.get_dummy_value()

    return types.void(source, at, types.int64, types.int64, out), generate


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend(
    query: NDArray[np.float32],  # [tokens, heads, head_size], scaled
    output: NDArray[np.float32],  # [tokens, heads, value_size], written
    k_cache: NDArray[Any],  # [pool, kv_heads, head_size]: float32, or bits of bfloat16 (uint16) or float16 (int16)
    v_cache: NDArray[Any],  # [pool, kv_heads, value_size]
    slots: NDArray[np.int32],  # [requests, context]
    tokens: NDArray[np.int64],  # [places], the tokens in the order in which segments speak of them
    rows: NDArray[np.int64],  # [places], row of `slots` of each token's sequence
    visible: NDArray[np.int64],  # [places], how many positions of it the token sees
    segments: NDArray[np.int64],  # [segments, 4]: positions start to end of places first to last; ascending for each
) -> None:
    """Attention of tokens over the pages of their sequences. A token's segments cover what it sees, each position once.

    Tokens of one segment have the same slots there, and they are read from the first place's row. Floats are contiguous.
    Only outputs of `tokens` are written.
    """
    group = query.shape[1] // k_cache.shape[1]
    scores = np.empty((min(TOKENS_AT_ONCE, len(tokens)) * group, _stride(segments)), dtype=np.float32)
    keys = np.empty((query.shape[2], POSITIONS), dtype=np.float32)
    for begin in range(0, len(tokens), TOKENS_AT_ONCE):
        end = min(begin + TOKENS_AT_ONCE, len(tokens))
        part = tokens[begin:end], rows[begin:end], visible[begin:end], _within(segments, begin, end)
        for kv_head in range(k_cache.shape[1]):
            _attend_group(query, output, k_cache, v_cache, slots, *part, kv_head, group, scores, keys)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _attend_group(
    query: NDArray[np.float32],
    output: NDArray[np.float32],
    k_cache: NDArray[Any],
    v_cache: NDArray[Any],
    slots: NDArray[np.int32],
    tokens: NDArray[np.int64],
    rows: NDArray[np.int64],
    visible: NDArray[np.int64],
    segments: NDArray[np.int64],
    kv_head: int,
    group: int,  # query heads that share a key head
    scores: NDArray[np.float32],  # [tokens * group or more, stride], written
    keys: NDArray[np.float32],  # [head_size, POSITIONS], written
) -> None:
    """The heads of one key head, for tokens whose scores `scores` has room for."""
    heads, stride = kv_head * group, scores.shape[1]
    at = np.empty(POSITIONS, dtype=np.int64)
    keys_at = np.arange(keys.shape[0]) * POSITIONS
    for segment in segments:
        part = tokens[segment[2] : segment[3]]
        for start in range(segment[0], segment[1], POSITIONS):
            num_positions = min(POSITIONS, segment[1] - start)
            _find(slots[rows[segment[2]]], start, num_positions, k_cache.shape, kv_head, at)
            scores_at = segment[2] * group * stride + start
            _score(query, k_cache, at, num_positions, keys, keys_at, scores, scores_at, part, heads, group)
    _begin(output, scores, tokens, visible, heads, group)
    for segment in segments:
        part = tokens[segment[2] : segment[3]]
        for start in range(segment[0], segment[1], POSITIONS):
            num_positions = min(POSITIONS, segment[1] - start)
            _find(slots[rows[segment[2]]], start, num_positions, v_cache.shape, kv_head, at)
            weights_at = segment[2] * group * stride + start
            _add_values(output, v_cache, at, num_positions, scores, weights_at, part, heads, group)
    _normalise(output, scores, tokens, visible, heads, group)


# ---- what does not depend on the dtype of the pools: functions of their own, which are compiled once ----


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _stride(segments: NDArray[np.int64]) -> int:
    """Of rows of scores: room for the last position, in whole LANES and one more."""
    last = 0
    for segment in segments:
        last = max(last, segment[1])
    return (last // LANES + 2) * LANES


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _within(segments: NDArray[np.int64], begin: int, end: int) -> NDArray[np.int64]:
    """The parts of segments in the places from begin to end, which are counted from begin on."""
    kept = np.empty_like(segments)
    num = 0
    for segment in segments:
        if segment[2] < end and segment[3] > begin:
            kept[num, 0], kept[num, 1] = segment[0], segment[1]
            kept[num, 2], kept[num, 3] = max(segment[2], begin) - begin, min(segment[3], end) - begin
            num += 1
    return kept[:num]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _begin(
    output: NDArray[np.float32],
    scores: NDArray[np.float32],
    tokens: NDArray[np.int64],
    visible: NDArray[np.int64],
    heads: int,
    group: int,
) -> None:
    """Scores become weights, whose sum is not 1 yet; nothing is added up."""
    for row in range(len(tokens) * group):
        seen = scores[row, : visible[row // group]]
        _exponentials(seen, _largest(seen))
        vector = output[tokens[row // group], heads + row % group]
        for place in range(vector.shape[0]):
            vector[place] = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _normalise(
    output: NDArray[np.float32],
    weights: NDArray[np.float32],
    tokens: NDArray[np.int64],
    visible: NDArray[np.int64],
    heads: int,
    group: int,
) -> None:
    """Each sum over its weights' sum."""
    for row in range(len(tokens) * group):
        vector, total = output[tokens[row // group], heads + row % group], _sum(weights[row, : visible[row // group]])
        for place in range(vector.shape[0]):
            vector[place] /= total


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _find(
    page: NDArray[np.int32],
    start: int,
    num_positions: int,
    shape: tuple[int, int, int],
    head: int,
    at: NDArray[np.int64],
) -> None:
    """Where the vectors of positions from `start` on begin in a pool; the last one again up to whole LANES."""
    for place in range((num_positions + LANES - 1) // LANES * LANES):
        slot = np.uint32(page[start + min(place, num_positions - 1)])
        at[place] = (np.int64(slot) * shape[1] + head) * shape[2]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _score(
    query: NDArray[np.float32],
    k_cache: NDArray[Any],
    at: NDArray[np.int64],  # where the keys of the block begin
    num_positions: int,  # of the block
    keys: NDArray[np.float32],  # [head_size, POSITIONS], written
    keys_at: NDArray[np.int64],  # [head_size], where its rows begin
    scores: NDArray[np.float32],  # [tokens of this pass * group, stride], written up to whole LANES
    scores_at: int,  # of the first row and position
    tokens: NDArray[np.int64],  # that score the block
    heads: int,  # the first of `group` heads
    group: int,
) -> None:
    for first in range(0, num_positions, LANES):
        for column in range(0, query.shape[2], LANES):
            _transpose(k_cache, at, first, column, keys)
    num_rows = len(tokens) * group
    fours = num_rows // ROWS * ROWS
    for row in range(0, fours, ROWS):
        a_at = _four_heads(tokens, row, heads, group, query.shape)
        c_at = _four_rows(scores_at, row, scores.shape[1])
        _score_rows(query, a_at, keys, keys_at, scores, c_at, num_positions)
    for row in range(fours, num_rows):
        a_at = (_head(tokens, row, heads, group, query.shape),)
        _score_rows(query, a_at, keys, keys_at, scores, (scores_at + row * scores.shape[1],), num_positions)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _score_rows(
    query: NDArray[np.float32],
    a_at: tuple[int, ...],
    keys: NDArray[np.float32],
    keys_at: NDArray[np.int64],
    scores: NDArray[np.float32],
    c_at: tuple[int, ...],
    num_positions: int,
) -> None:
    if num_positions > POSITIONS - LANES:
        _score_block(query, a_at, keys, keys_at, scores, c_at, 0, query.shape[2])
    else:
        for column in range(0, num_positions, LANES):
            _score_vector(query, a_at, keys, keys_at, scores, c_at, column, query.shape[2])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_values(
    output: NDArray[np.float32],  # added to
    v_cache: NDArray[Any],
    at: NDArray[np.int64],  # where the values of the block begin
    num_positions: int,  # of the block
    weights: NDArray[np.float32],  # [tokens of this pass * group, stride]
    weights_at: int,  # of the first row and position
    tokens: NDArray[np.int64],
    heads: int,
    group: int,
) -> None:
    num_rows = len(tokens) * group
    fours = num_rows // ROWS * ROWS
    for row in range(0, fours, ROWS):
        c_at = _four_heads(tokens, row, heads, group, output.shape)
        _add_rows(weights, _four_rows(weights_at, row, weights.shape[1]), v_cache, at, output, c_at, num_positions)
    for row in range(fours, num_rows):
        c_at = (_head(tokens, row, heads, group, output.shape),)
        _add_rows(weights, (weights_at + row * weights.shape[1],), v_cache, at, output, c_at, num_positions)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_rows(
    weights: NDArray[np.float32],
    a_at: tuple[int, ...],
    v_cache: NDArray[Any],
    at: NDArray[np.int64],
    output: NDArray[np.float32],
    c_at: tuple[int, ...],
    num_positions: int,
) -> None:
    blocks = output.shape[2] // POSITIONS * POSITIONS
    for column in range(0, blocks, POSITIONS):
        _add_block(weights, a_at, v_cache, at, output, c_at, column, num_positions)
    for column in range(blocks, output.shape[2], LANES):
        _add_vector(weights, a_at, v_cache, at, output, c_at, column, num_positions)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _head(tokens: NDArray[np.int64], row: int, heads: int, group: int, shape: tuple[int, int, int]) -> int:
    """Where the vector of a row begins: rows are the heads of one group, token by token."""
    start: int = (tokens[row // group] * shape[1] + heads + row % group) * shape[2]
    return start


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _four_heads(
    tokens: NDArray[np.int64], row: int, heads: int, group: int, shape: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    return (
        _head(tokens, row, heads, group, shape),
        _head(tokens, row + 1, heads, group, shape),
        _head(tokens, row + 2, heads, group, shape),
        _head(tokens, row + 3, heads, group, shape),
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _four_rows(first: int, row: int, stride: int) -> tuple[int, int, int, int]:
    at = first + row * stride
    return at, at + stride, at + 2 * stride, at + 3 * stride


LOWEST = np.float32(-87)  # below, exp is no normal number
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDS = np.float32(3 << 22)  # a small number plus this one is rounded to an integer
EXPONENT_BIAS, EXPONENT_BIT = np.int32(127), np.int32(23)


@numba.njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _exponentials(scores: NDArray[np.float32], largest: np.float32) -> None:
    """exp(score - largest), in place: 2^n * p(r) with r within ln 2 / 2, and the polynomial of the Cephes library."""
    for at in range(scores.shape[0]):
        x = scores[at] - largest
        x = LOWEST if x < LOWEST else x
        n = x * LOG2_E + ROUNDS - ROUNDS
        r = x - n * LN2_HIGH - n * LN2_LOW
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1)
        scores[at] = p * np.int32((np.int32(n) + EXPONENT_BIAS) << EXPONENT_BIT).view(np.float32)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"}, error_model="numpy")
def _largest(scores: NDArray[np.float32]) -> np.float32:
    largest: np.float32 = scores[0]
    for at in range(scores.shape[0]):
        largest = max(largest, scores[at])
    return largest


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"}, error_model="numpy")
def _sum(scores: NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for at in range(scores.shape[0]):
        total += scores[at]
    return total
