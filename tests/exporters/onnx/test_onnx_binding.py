"""Which initializers hold which IR tensors, from names and shapes alone."""

from __future__ import annotations

from anyquant.exporters.onnx.binding import Binding, Part, bind, left_out

LAYER = "model.layers.3."


def test_packed_projections_and_their_biases() -> None:
    tensors = {f"{LAYER}self_attn.{p}_proj.weight": (n, 8) for p, n in (("q", 6), ("k", 2), ("v", 2))}
    tensors |= {f"{LAYER}self_attn.{p}_proj.bias": (n,) for p, n in (("q", 6), ("k", 2), ("v", 2))}  # type: ignore[misc]
    graph = {f"{LAYER}attn.qkv_proj.MatMul.weight": (8, 10), f"{LAYER}attn.qkv_proj.Add.bias": (10,)}
    bindings = bind(graph, tensors, {})
    parts = tuple(Part(f"{LAYER}self_attn.{p}_proj.weight", 0, n) for p, n in (("q", 6), ("k", 2), ("v", 2)))
    name = f"{LAYER}attn.qkv_proj.MatMul.weight"
    assert bindings[name] == Binding(name, True, parts)
    assert [p.rows for p in bindings[f"{LAYER}attn.qkv_proj.Add.bias"].parts] == [6, 2, 2]
    assert not bindings[f"{LAYER}attn.qkv_proj.Add.bias"].transposed


def test_cut_matrices() -> None:
    tensors = {f"{LAYER}mlp.gate_up_proj.weight": (20, 8)}
    graph = {f"{LAYER}mlp.gate_proj.MatMul.weight": (8, 10), f"{LAYER}mlp.up_proj.MatMul.weight": (8, 10)}
    bindings = bind(graph, tensors, {})
    assert [b.parts[0].start for b in bindings.values()] == [0, 10]
    assert [b.parts[0].stop for b in bindings.values()] == [10, 20]


def test_other_names_of_the_same_module() -> None:
    tensors = {f"{LAYER}self_attn.dense.weight": (8, 8), "model.final_layernorm.weight": (8,)}
    graph = {f"{LAYER}attn.o_proj.MatMul.weight": (8, 8), "model.layers.4.final_norm_layernorm.weight": (8,)}
    assert {b.parts[0].tensor for b in bind(graph, tensors, {}).values()} == set(tensors)


def test_tied_head_by_alias_and_by_embedding() -> None:
    tensors = {"model.embed_tokens.weight": (11, 8)}
    for aliases in ({"lm_head.weight": "model.embed_tokens.weight"}, {}):
        bindings = bind({"lm_head.MatMul.weight": (8, 11)}, tensors, aliases)
        assert bindings["lm_head.MatMul.weight"].parts == (Part("model.embed_tokens.weight", 0, 11),)


def test_other_layers_shapes_and_duplicates_are_left_alone() -> None:
    tensors = {f"{LAYER}mlp.up_proj.weight": (10, 8), "a.x.weight": (4, 4), "b.x.weight": (4, 4)}
    graph = {
        "model.layers.2.mlp.up_proj.MatMul.weight": (8, 10),  # another layer
        f"{LAYER}mlp.up_proj.MatMul.weight": (8, 11),  # another shape
        "c.x.weight": (4, 4),  # two candidates
        "cos_cache": (64, 4),
    }
    assert bind(graph, tensors, {}) == {}


def test_parts_of_different_columns_do_not_concatenate() -> None:
    tensors = {f"{LAYER}self_attn.{p}_proj.weight": (4, n) for p, n in (("q", 8), ("k", 6), ("v", 8))}
    assert bind({f"{LAYER}attn.qkv_proj.MatMul.weight": (8, 12)}, tensors, {}) == {}


def test_left_out_only_where_nothing_unknown_could_be_it() -> None:
    bias = f"{LAYER}self_attn.q_proj.bias"
    assert left_out(bias, [])
    assert left_out(bias, ["cos_cache", f"{LAYER}attn.strange.weight", "model.layers.2.attn.strange.Add.bias"])
    assert not left_out(bias, [f"{LAYER}attn.strange.Add.bias"])
