"""The body of CodebookGather: the rows that are looked up are put together as a small tensor, and that is decoded."""

from __future__ import annotations

from anyquant.exporters.onnx.function_steps import Steps, decode, finish, outlier_bounds

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
  chosen_count = Sub (outlier_end, outlier_begin)
  most_outliers_64 = ReduceMax <keepdims = 0> (chosen_count)
  most_outliers = Cast <to = 6> (most_outliers_64)
  slot_32 = Range (none, most_outliers, single)
  slot = Cast <to = 7> (slot_32)
  chosen_count_column = Unsqueeze (chosen_count, one)
  is_used = Less (slot, chosen_count_column)
  used_places = NonZero (is_used)
  used_channel = Gather (used_places, none)
  used_slot = Gather (used_places, single)
  used_begin = Gather (outlier_begin, used_channel)
  used_outlier = Add (used_begin, used_slot)
  used_column = Gather (outlier_index, used_outlier)
  used_position = Cast <to = 7> (used_column)
  used_value = Gather (outlier_value, used_outlier)
  used_value_32 = Cast <to = 1> (used_value)
"""


def gather_body(steps: Steps) -> str:
    """From "indices" and what is stored to "Y"."""
    text = _CHOOSE + decode("chosen_bits", "chosen_planes", "chosen_codebook", "spare_entries", steps)
    if steps.scaled:
        text += "  t = Identity (one)\n  scale = Cast <to = 1> (input_scale)\n"
    if steps.outliers:
        text += "  chosen_and_one = Add (chosen, one)\n" + outlier_bounds("chosen", "chosen_and_one") + _CHOOSE_OUTLIERS
    last_steps, rows = finish(steps, "scale", "used_channel", "used_position", "used_value_32")
    return f"""{text}{last_steps}
  leading = Shape (indices)
  from_matrix = Concat <axis = 0> (leading, k)
  Y = Reshape ({rows}, from_matrix)
"""
