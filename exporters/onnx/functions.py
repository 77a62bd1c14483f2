"""The bodies of CodebookMatMul and CodebookGather in standard operators; docs/onnx-operators.md defines them.

A model carries the functions that its nodes call, so any runtime computes them; one that has a kernel of that name
uses the kernel instead. The text is in ONNX's own syntax. Its heart turns widths, planes and codebooks of some
channels into FP32, and how that is called decides what a runtime that folds constants makes of it:

* fold: on all that is stored. ONNX Runtime then computes the matrix once, at load, and multiplies in FP32.
* stream: in a Scan over blocks of channels. Nothing is folded across a Scan, so the matrix stays packed, and what is
  decoded at a time has a bounded size.

While it folds, ONNX Runtime keeps every intermediate result of all matrices at once. Hence bits are widened to bytes
late, steps that no tensor of the model needs are left out, and Gemm reads either orientation without another copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx.parser

from anyquant import ir

DOMAIN, VERSION = "anyquant", 1
MATMUL, GATHER = "CodebookMatMul", "CodebookGather"
BLOCK = 1 << 20
"""Weights that the streaming body decodes at a time; one channel at least."""

_STORED = "bits, planes, codebook, input_scale, outlier_indptr, outlier_index, outlier_value"


@dataclass(frozen=True)
class Steps:
    """Steps that not every tensor needs.

    Attributes:
        ragged: channels are cut to their length, which is not always a multiple of 8.
        scaled: what was decoded is multiplied by input_scale.
        outliers: outliers replace what was decoded.
    """

    ragged: bool = True
    scaled: bool = True
    outliers: bool = True


def steps_for(specs: Iterable[ir.CodebookSpec]) -> Steps:
    """The steps that at least one of the tensors needs."""
    specs = list(specs)
    return Steps(
        any(spec.shape[1 - spec.axis] % 8 for spec in specs),
        any(spec.input_scale for spec in specs),
        any(spec.outliers for spec in specs),
    )


def matmul_function(opset: int, fallback: str, steps: Steps, block: int = BLOCK) -> onnx.FunctionProto:
    """CodebookMatMul for a model that imports this version of the standard operators, 18 or later."""
    body = _fold(steps) if fallback == "fold" else _stream(steps, block)
    return _parse(opset, f"{MATMUL} <K, N, transB> (A, {_STORED}, bias) => (Y)", _PRODUCT + body + _RESULT)


def gather_function(opset: int, steps: Steps) -> onnx.FunctionProto:
    """CodebookGather for a model that imports this version of the standard operators, 18 or later.

    It decodes the rows that are looked up and no others, so it is the same for both fallbacks.
    """
    return _parse(opset, f"{GATHER} <K> (indices, {_STORED}) => (Y)", _gather(steps))


def _parse(opset: int, signature: str, body: str) -> onnx.FunctionProto:
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
    function = onnx.parser.parse_function(f"{header}\n{signature}\n{{\n{_CONSTANTS}{body}\n}}")
    _prune(function)
    return function


def _prune(function: onnx.FunctionProto) -> None:
    """Remove nodes that nothing reads; runtimes take their time over every node of every call."""
    needed = set(function.output)
    kept = []
    for node in reversed(function.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                needed.update(name for inner in attribute.g.node for name in inner.input)
    del function.node[:]
    function.node.extend(reversed(kept))


_BITS_OF_BYTE = ", ".join(str(byte >> i & 1) for byte in range(256) for i in range(8))

_CONSTANTS = f"""
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  two = Constant <value = int64[1] {{2}}> ()
  eight = Constant <value = int64[1] {{8}}> ()
  minus_one = Constant <value = int64[1] {{-1}}> ()
  axis_0 = Constant <value = int64 {{0}}> ()
  none = Constant <value = int32 {{0}}> ()
  single = Constant <value = int32 {{1}}> ()
  powers = Constant <value = int32[9] {{1, 2, 4, 8, 16, 32, 64, 128, 256}}> ()
  zero_byte = Constant <value = uint8[1] {{0}}> ()
  bits_of_byte = Constant <value = uint8[256, 8] {{{_BITS_OF_BYTE}}}> ()
  K_number = Constant <value_int: int = @K> ()
  k = Reshape (K_number, one)
"""

# K and N are attributes: the size of nothing that is stored depends on A, so everything of it can be folded.
_PRODUCT = """
  N_number = Constant <value_int: int = @N> ()
  n = Reshape (N_number, one)
  transposed_number = Constant <value_int: int = @transB> ()
  t = Reshape (transposed_number, one)
  not_t = Sub (one, t)
  k_and_n = Add (k, n)
  channels = Shape (bits)
  length = Sub (k_and_n, channels)
  to_matrix = Concat <axis = 0> (minus_one, k)
  a = Reshape (A, to_matrix)
"""

_RESULT = """
  leading = Shape <end = -1> (A)
  from_matrix = Concat <axis = 0> (leading, n)
  Y = Reshape (y, from_matrix)
"""


def _decode(bits: str, planes: str, codebook: str, spare_entries: str, steps: Steps) -> str:
    """FP32 "decoded" [channels, length] of uint8 [channels], uint8 [rows, row bytes] and float16 [entries].

    A plane that a channel lacks is read from a row of zeros, appended at the end. Every channel looks its codes up
    among as many entries as the widest has, so ``spare_entries`` of them follow the last codebook.
    """
    return f"""
  width = Cast <to = 6> ({bits})
  widest_or_none = ReduceMax <keepdims = 0> (width)
  widest = Max (widest_or_none, single)
  plane = Range (none, widest, single)
  place_value = Gather (powers, plane)
  place_value_8 = Cast <to = 2> (place_value)
  width_column = Unsqueeze (width, one)
  is_present = Less (plane, width_column)
  first_row = CumSum <exclusive = 1> (width, axis_0)
  first_row_column = Unsqueeze (first_row, one)
  present_row = Add (first_row_column, plane)
  row_count_64 = Shape <end = 1> ({planes})
  row_count = Cast <to = 6> (row_count_64)
  row = Where (is_present, present_row, row_count)

  row_size = Shape <start = 1> ({planes})
  zero_row_shape = Concat <axis = 0> (one, row_size)
  zero_row = Expand (zero_byte, zero_row_shape)
  row_bytes = Concat <axis = 0> ({planes}, zero_row)
  row_byte_indices = Cast <to = 6> (row_bytes)
  eights_of_bits = Gather (bits_of_byte, row_byte_indices)
  row_bit_count = Mul (row_size, eight)
  row_bits_shape = Concat <axis = 0> (minus_one, row_bit_count)
  row_bits = Reshape (eights_of_bits, row_bits_shape)
  plane_bits = Gather (row_bits, row)
  {"padded_code" if steps.ragged else "code"} = MatMulInteger (place_value_8, plane_bits)
  {"code = Slice (padded_code, zero, length, one)" if steps.ragged else ""}

  entry_count = Gather (powers, width)
  first_entry = CumSum <exclusive = 1> (entry_count, axis_0)
  first_entry_column = Unsqueeze (first_entry, one)
  most_entries = Gather (powers, widest)
  entry = Range (none, most_entries, single)
  entry_index = Add (first_entry_column, entry)
  values = Cast <to = 1> ({codebook})
  spare_values = ConstantOfShape <value = float[1] {{0}}> ({spare_entries})
  all_values = Concat <axis = 0> (values, spare_values)
  table = Gather (all_values, entry_index)
  decoded = GatherElements <axis = 1> (table, code)
"""


def _outlier_places(row_starts: str, index: str, value: str, first_column: str) -> str:
    """Where outliers, in CSR, lie in "decoded": "outlier_channel", "outlier_position" int64; and their FP32 values.

    The row of an outlier is the number of later rows that start at or before it.
    """
    return f"""
  outlier_count = Shape ({value})
  outlier_count_and_one = Add (outlier_count, one)
  no_starts = ConstantOfShape <value = int64[1] {{0}}> (outlier_count_and_one)
  start_count = Shape ({row_starts})
  single_starts = ConstantOfShape <value = int64[1] {{1}}> (start_count)
  starts_here = ScatterElements <axis = 0, reduction = "add"> (no_starts, {row_starts}, single_starts)
  starts_so_far = CumSum (starts_here, axis_0)
  outlier_row = Slice (starts_so_far, zero, outlier_count)
  column_of_all = Cast <to = 7> ({index})
  outlier_column = Sub (column_of_all, {first_column})
  row_less_column = Sub (outlier_row, outlier_column)
  row_less_column_if_t = Mul (row_less_column, t)
  outlier_channel = Add (outlier_column, row_less_column_if_t)
  row_and_column = Add (outlier_row, outlier_column)
  outlier_position = Sub (row_and_column, outlier_channel)
  outlier_32 = Cast <to = 1> ({value})
"""


def _finish(steps: Steps, scale: str, channel: str, position: str, value: str) -> tuple[str, str]:
    """Scale what was decoded, put the outliers in; and the name of the result."""
    text, name = "", "decoded"
    if steps.scaled:
        # [1, K] or [K, 1], as the channels are outputs or inputs.
        text += f"""
  twice_t = Add (t, t)
  rows_of_scale = Sub (twice_t, one)
  columns_of_scale = Neg (rows_of_scale)
  scale_shape = Concat <axis = 0> (rows_of_scale, columns_of_scale)
  oriented_scale = Reshape ({scale}, scale_shape)
  scaled = Mul (decoded, oriented_scale)
"""
        name = "scaled"
    if steps.outliers:
        text += f"""
  channel_column = Unsqueeze ({channel}, one)
  position_column = Unsqueeze ({position}, one)
  outlier_place = Concat <axis = 1> (channel_column, position_column)
  replaced = ScatterND ({name}, outlier_place, {value})
"""
        name = "replaced"
    return text, name


def _fold(steps: Steps) -> str:
    text = "  spare_entries = Constant <value = int64[1] {256}> ()\n"
    text += _decode("bits", "planes", "codebook", "spare_entries", steps)
    if steps.scaled:
        text += "  scale = Cast <to = 1> (input_scale)\n"
    if steps.outliers:
        text += "  row_starts_32 = Slice (outlier_indptr, one, n)\n  row_starts = Cast <to = 7> (row_starts_32)\n"
        text += _outlier_places("row_starts", "outlier_index", "outlier_value", "zero")
    finish, weight = _finish(steps, "scale", "outlier_channel", "outlier_position", "outlier_32")
    return text + finish + f"  y = Gemm <transB: int = @transB> (a, {weight}, bias)\n"


# Blocks of channels: where each begins and ends in what is stored, all [blocks, 1]. The last block is filled up with
# channels of 0 bits, whose products are cut off (outputs) or meet columns of zeros (inputs).
_BLOCKS = """
  channels_that_fit = Div (block_weights, length)
  block_limit = Max (channels_that_fit, one)
  block_limit_less_one = Sub (block_limit, one)
  channels_up = Add (channels, block_limit_less_one)
  blocks = Div (channels_up, block_limit)
  blocks_less_one = Sub (blocks, one)
  channels_up_again = Add (channels, blocks_less_one)
  block = Div (channels_up_again, blocks)
  filled_channels = Mul (block, blocks)
  missing = Sub (filled_channels, channels)
  spare_count = Constant <value = int64[1] {256}> ()
  spare_entries = Add (missing, spare_count)

  missing_after = Concat <axis = 0> (zero, missing)
  filled_bits = Pad (bits, missing_after)
  grid = Concat <axis = 0> (blocks, block)
  bits_by_block = Reshape (filled_bits, grid)
  width_by_block = Cast <to = 6> (bits_by_block)
  rows_in_block_32 = ReduceSum (width_by_block, one)
  rows_in_block = Cast <to = 7> (rows_in_block_32)
  row_end = CumSum (rows_in_block, axis_0)
  row_begin = Sub (row_end, rows_in_block)
  row_end_shape = Shape (row_end)
  entries_by_block = Gather (powers, width_by_block)
  entries_in_block_32 = ReduceSum (entries_by_block, one)
  entries_in_block = Cast <to = 7> (entries_in_block_32)
  entry_end = CumSum (entries_in_block, axis_0)
  entry_begin = Sub (entry_end, entries_in_block)

  channels_in_block = Expand (block, row_end_shape)
  channel_end = CumSum (channels_in_block, axis_0)
  channel_begin = Sub (channel_end, block)
  input_begin = Mul (channel_begin, not_t)
  k_less_block = Sub (k, block)
  k_less_block_if_t = Mul (k_less_block, t)
  inputs_in_block = Add (block, k_less_block_if_t)
  input_end = Add (input_begin, inputs_in_block)
  missing_inputs = Mul (missing, not_t)
  missing_columns = Concat <axis = 0> (zero, zero, zero, missing_inputs)
  filled_a = Pad (a, missing_columns)
"""

_SCALE_BLOCKS = """
  scale_value = Cast <to = 1> (input_scale)
  scale_of_all = Expand (scale_value, k)
  missing_scales = Concat <axis = 0> (zero, missing_inputs)
  filled_scale = Pad (scale_of_all, missing_scales)
"""

# Where channels are outputs, a block has the outliers of its rows; where they are inputs, it looks through all of them.
_OUTLIER_BLOCKS = """
  output_begin = Mul (channel_begin, t)
  channel_end_or_n = Min (channel_end, n)
  end_less_n = Sub (channel_end_or_n, n)
  end_less_n_if_t = Mul (end_less_n, t)
  output_end = Add (n, end_less_n_if_t)
  second_output = Add (output_begin, one)
  pointer_count = Shape (outlier_indptr)
  last_pointer = Sub (pointer_count, one)
  pointer_of_begin = Min (output_begin, last_pointer)
  pointer_of_end = Min (output_end, last_pointer)
  outlier_begin_32 = Gather (outlier_indptr, pointer_of_begin)
  outlier_begin = Cast <to = 7> (outlier_begin_32)
  outlier_end_32 = Gather (outlier_indptr, pointer_of_end)
  outlier_end = Cast <to = 7> (outlier_end_32)
"""

_OUTLIERS_OF_BLOCK = """
  block_starts_32 = Slice (outlier_indptr, second_output_of_block, output_end_of_block)
  block_starts_from_first = Cast <to = 7> (block_starts_32)
  block_starts = Sub (block_starts_from_first, outlier_begin_of_block)
  block_index = Slice (outlier_index, outlier_begin_of_block, outlier_end_of_block)
  block_value = Slice (outlier_value, outlier_begin_of_block, outlier_end_of_block)
"""

_OUTLIERS_INSIDE = """
  is_after_begin = GreaterOrEqual (outlier_channel, zero)
  is_before_end = Less (outlier_channel, block)
  is_inside = And (is_after_begin, is_before_end)
  inside_row = NonZero (is_inside)
  inside = Squeeze (inside_row, zero)
  channel_inside = Gather (outlier_channel, inside)
  position_inside = Gather (outlier_position, inside)
  outlier_inside = Gather (outlier_32, inside)
"""

# Outputs lie side by side, [rows of A, blocks * block]; inputs are summed, [rows of A, N].
_JOIN = """
  by_row_of_a = Transpose <perm = [1, 0, 2]> (parts)
  one_less_blocks = Sub (one, blocks)
  one_less_blocks_if_t = Mul (one_less_blocks, t)
  summed = Add (blocks, one_less_blocks_if_t)
  filled_less_n = Sub (filled_channels, n)
  filled_less_n_if_t = Mul (filled_less_n, t)
  joined_size = Add (n, filled_less_n_if_t)
  joined_shape = Concat <axis = 0> (minus_one, summed, joined_size)
  joined = Reshape (by_row_of_a, joined_shape)
  filled_product = ReduceSum <keepdims = 0> (joined, one)
  product = Slice (filled_product, zero, n, one)
  y = Add (product, bias)
"""


def _stream(steps: Steps, block: int) -> str:
    bounds = {"row_begin": "row_0", "row_end": "row_1", "entry_begin": "entry_0", "entry_end": "entry_1"}
    bounds |= {"input_begin": "input_0", "input_end": "input_1"}
    before, inside = f"  block_weights = Constant <value = int64[1] {{{block}}}> ()\n{_BLOCKS}", ""
    if steps.scaled:
        before += _SCALE_BLOCKS
        inside += "  block_scale = Slice (filled_scale, input_0, input_1)\n"
    if steps.outliers:
        before += _OUTLIER_BLOCKS
        bounds |= {"second_output": "second_output_of_block", "output_end": "output_end_of_block"}
        bounds |= {"outlier_begin": "outlier_begin_of_block", "outlier_end": "outlier_end_of_block"}
        inside += _OUTLIERS_OF_BLOCK
        inside += _outlier_places("block_starts", "block_index", "block_value", "input_0") + _OUTLIERS_INSIDE
    finish, weight = _finish(steps, "block_scale", "channel_inside", "position_inside", "outlier_inside")
    given = ", ".join(f"int64[1] {name}" for name in bounds.values())
    return f"""{before}
  parts = Scan <num_scan_inputs = {len(bounds) + 1}, body = multiply_block
    (uint8[block_channels] block_bits, {given}) => (float[rows_of_a, outputs] part) {{
  block_planes = Slice (planes, row_0, row_1, zero)
  block_codebook = Slice (codebook, entry_0, entry_1)
  block_a = Slice (filled_a, input_0, input_1, one)
{_decode("block_bits", "block_planes", "block_codebook", "spare_entries", steps)}{inside}{finish}
  part = Gemm <transB: int = @transB> (block_a, {weight})
  }}> (bits_by_block, {", ".join(bounds)})
{_JOIN}"""


# The chosen rows as channels of equal width, the widest of them, with rows of zeros for planes that one lacks.
_CHOOSE = """
  index_of_any_sign = Reshape (indices, minus_one)
  index_64 = Cast <to = 7> (index_of_any_sign)
  all_rows = Shape (bits)
  index_from_end = Add (index_64, all_rows)
  is_negative = Less (index_64, zero)
  chosen = Where (is_negative, index_from_end, index_64)
  chosen_shape = Shape (chosen)
  width_of_all = Cast <to = 6> (bits)
  row_of_all = CumSum <exclusive = 1> (width_of_all, axis_0)
  entries_of_all = Gather (powers, width_of_all)
  entry_of_all = CumSum <exclusive = 1> (entries_of_all, axis_0)

  chosen_width = Gather (width_of_all, chosen)
  chosen_widest_or_none = ReduceMax <keepdims = 0> (chosen_width)
  chosen_widest = Max (chosen_widest_or_none, single)
  chosen_widest_8 = Cast <to = 2> (chosen_widest)
  chosen_bits = Expand (chosen_widest_8, chosen_shape)
  chosen_plane = Range (none, chosen_widest, single)
  chosen_width_column = Unsqueeze (chosen_width, one)
  is_owned = Less (chosen_plane, chosen_width_column)
  owned_row = Gather (row_of_all, chosen)
  owned_row_column = Unsqueeze (owned_row, one)
  owned_rows = Add (owned_row_column, chosen_plane)
  chosen_row = Where (is_owned, owned_rows, none)
  bytes_or_foreign = Gather (planes, chosen_row)
  is_owned_byte = Unsqueeze (is_owned, two)
  bytes_or_zero = Where (is_owned_byte, bytes_or_foreign, zero_byte)
  stored_row_size = Shape <start = 1> (planes)
  chosen_planes_shape = Concat <axis = 0> (minus_one, stored_row_size)
  chosen_planes = Reshape (bytes_or_zero, chosen_planes_shape)

  chosen_entry_count = Gather (powers, chosen_widest)
  chosen_entry = Range (none, chosen_entry_count, single)
  owned_entry = Gather (entry_of_all, chosen)
  owned_entry_column = Unsqueeze (owned_entry, one)
  owned_entries = Add (owned_entry_column, chosen_entry)
  stored_entries_64 = Shape (codebook)
  stored_entries = Cast <to = 6> (stored_entries_64)
  last_entry = Sub (stored_entries, single)
  existing_entries = Min (owned_entries, last_entry)
  chosen_entries = Gather (codebook, existing_entries)
  chosen_codebook = Reshape (chosen_entries, minus_one)

  length = Identity (k)
  spare_entries = Identity (one)
"""

_CHOOSE_OUTLIERS = """
  pointer_count = Shape (outlier_indptr)
  last_pointer = Sub (pointer_count, one)
  chosen_and_one = Add (chosen, one)
  pointer_of_begin = Min (chosen, last_pointer)
  pointer_of_end = Min (chosen_and_one, last_pointer)
  chosen_begin_32 = Gather (outlier_indptr, pointer_of_begin)
  chosen_begin = Cast <to = 7> (chosen_begin_32)
  chosen_end_32 = Gather (outlier_indptr, pointer_of_end)
  chosen_end = Cast <to = 7> (chosen_end_32)
  chosen_count = Sub (chosen_end, chosen_begin)
  most_outliers_64 = ReduceMax <keepdims = 0> (chosen_count)
  most_outliers = Cast <to = 6> (most_outliers_64)
  slot_32 = Range (none, most_outliers, single)
  slot = Cast <to = 7> (slot_32)
  chosen_count_column = Unsqueeze (chosen_count, one)
  is_used = Less (slot, chosen_count_column)
  used_places = NonZero (is_used)
  used_channel = Gather (used_places, none)
  used_slot = Gather (used_places, single)
  used_begin = Gather (chosen_begin, used_channel)
  used_outlier = Add (used_begin, used_slot)
  used_column = Gather (outlier_index, used_outlier)
  used_position = Cast <to = 7> (used_column)
  used_value = Gather (outlier_value, used_outlier)
  used_value_32 = Cast <to = 1> (used_value)
"""


def _gather(steps: Steps) -> str:
    text = _CHOOSE + _decode("chosen_bits", "chosen_planes", "chosen_codebook", "spare_entries", steps)
    if steps.scaled:
        text += "  t = Identity (one)\n  scale = Cast <to = 1> (input_scale)\n"
    if steps.outliers:
        text += _CHOOSE_OUTLIERS
    finish, rows = _finish(steps, "scale", "used_channel", "used_position", "used_value_32")
    return f"""{text}{finish}
  leading = Shape (indices)
  from_matrix = Concat <axis = 0> (leading, k)
  Y = Reshape ({rows}, from_matrix)
"""
