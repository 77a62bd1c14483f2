"""The streaming body of CodebookMatMul: a Scan over blocks of channels, each decoded and multiplied by itself.

Where channels are outputs, the products of the blocks lie side by side; where they are inputs, they are summed. Which
of the two it is, ``t`` says: 1 or 0. Nothing in here depends on it but sizes and offsets.
"""

from __future__ import annotations

from anyquant.exporters.onnx.function_steps import Steps, decode, finish, outlier_bounds, outlier_places

BLOCK = 1 << 20
"""Weights that are decoded at a time; one channel at least."""

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


def stream_body(steps: Steps, block: int) -> str:
    """From "a", the activations as a matrix, and what is stored to "y"."""
    bounds = {"row_begin": "row_0", "row_end": "row_1", "entry_begin": "entry_0", "entry_end": "entry_1"}
    bounds |= {"input_begin": "input_0", "input_end": "input_1"}
    before, inside = f"  block_weights = Constant <value = int64[1] {{{block}}}> ()\n{_BLOCKS}", ""
    if steps.scaled:
        before += _SCALE_BLOCKS
        inside += "  block_scale = Slice (filled_scale, input_0, input_1)\n"
    if steps.outliers:
        before += _OUTLIER_BLOCKS + outlier_bounds("output_begin", "output_end")
        bounds |= {"second_output": "second_output_of_block", "output_end": "output_end_of_block"}
        bounds |= {"outlier_begin": "outlier_begin_of_block", "outlier_end": "outlier_end_of_block"}
        inside += _OUTLIERS_OF_BLOCK
        inside += outlier_places("block_starts", "block_index", "block_value", "input_0") + _OUTLIERS_INSIDE
    last_steps, weight = finish(steps, "block_scale", "channel_inside", "position_inside", "outlier_inside")
    given = ", ".join(f"int64[1] {name}" for name in bounds.values())
    return f"""{before}
  parts = Scan <num_scan_inputs = {len(bounds) + 1}, body = multiply_block
    (uint8[block_channels] block_bits, {given}) => (float[rows_of_a, outputs] part) {{
  block_planes = Slice (planes, row_0, row_1, zero)
  block_codebook = Slice (codebook, entry_0, entry_1)
  block_a = Slice (filled_a, input_0, input_1, one)
{decode("block_bits", "block_planes", "block_codebook", "spare_entries", steps)}{inside}{last_steps}
  part = Gemm <transB: int = @transB> (block_a, {weight})
  }}> (bits_by_block, {", ".join(bounds)})
{_JOIN}"""
