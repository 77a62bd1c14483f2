"""Steps that the bodies of CodebookMatMul and CodebookGather share, in ONNX's own syntax."""

from __future__ import annotations

from dataclasses import dataclass


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


_BITS_OF_BYTE = ", ".join(str(byte >> i & 1) for byte in range(256) for i in range(8))

CONSTANTS = f"""
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


def decode(bits: str, planes: str, codebook: str, spare_entries: str, steps: Steps) -> str:
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


def outlier_bounds(first_row: str, row_after: str) -> str:
    """Where the outliers of rows begin and end, "outlier_begin" and "outlier_end"; also where there are none at all."""
    return f"""
  pointer_count = Shape (outlier_indptr)
  last_pointer = Sub (pointer_count, one)
  pointer_of_begin = Min ({first_row}, last_pointer)
  pointer_of_end = Min ({row_after}, last_pointer)
  outlier_begin_32 = Gather (outlier_indptr, pointer_of_begin)
  outlier_begin = Cast <to = 7> (outlier_begin_32)
  outlier_end_32 = Gather (outlier_indptr, pointer_of_end)
  outlier_end = Cast <to = 7> (outlier_end_32)
"""


def outlier_places(row_starts: str, index: str, value: str, first_column: str) -> str:
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


def finish(steps: Steps, scale: str, channel: str, position: str, value: str) -> tuple[str, str]:
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
