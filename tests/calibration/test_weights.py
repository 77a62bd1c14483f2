"""Where a checkpoint's tensors go in transformers' models, and checkpoints that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.weights import pieces
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import CorruptFileError, UnknownArchitecture

Tiny = Callable[..., Path]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "phi3": {}, "gemma2": {}, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
    },
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip


@pytest.fixture
def edited(tiny_checkpoint: Tiny, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Function that opens a tiny llama whose weights or configuration were changed."""

    def make(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], **sizes: Any) -> Checkpoint:
        folder = tmp_path / "edited"
        folder.mkdir()
        for path in tiny_checkpoint(**sizes).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        state = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(state, config)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return open_checkpoint(str(folder))

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SIZES)
def test_every_weight_arrives(
    tiny_checkpoint: Tiny, plain_model: Callable[[Checkpoint], Any], family: str, tied: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied, **SIZES[family])))
    streamed = StreamedModel(checkpoint)
    for section in range(streamed.outside + 1):
        streamed.load(section)
    model, expected = streamed.model, plain_model(checkpoint)
    state = expected.state_dict()
    assert set(model.state_dict()) == set(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    buffers = dict(expected.named_buffers())
    assert buffers or family in ("opt", "gpt2")
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert streamed.embedding == next(n for n in checkpoint.embeddings() if n != "lm_head.weight")
    assert (streamed.head == streamed.embedding) == tied
    for section in range(streamed.outside + 1):
        streamed.free(section)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_missing(edited: Callable[..., Checkpoint]) -> None:
    checkpoint = edited(lambda state, config: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptFileError, match=r"1 missing weights.*first model\.layers\.1\.mlp\.up_proj\.weight"):
        StreamedModel(checkpoint)


def test_a_missing_expert(edited: Callable[..., Checkpoint]) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    checkpoint = edited(
        lambda state, config: state.pop(name), family="qwen3_moe", num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    with pytest.raises(CorruptFileError, match=r"missing weights.*first model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        StreamedModel(checkpoint)


def test_unexpected(edited: Callable[..., Checkpoint]) -> None:
    checkpoint = edited(lambda state, config: state.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(CorruptFileError, match=r"1 unexpected weights.*first model\.layers\.7"):
        StreamedModel(checkpoint)


def test_another_shape(edited: Callable[..., Checkpoint]) -> None:
    checkpoint = edited(lambda state, config: config.update({"intermediate_size": 128}))
    with pytest.raises(CorruptFileError, match=r"gate_proj\.weight is \[96, 64\], but .* takes \[128, 64\] there"):
        StreamedModel(checkpoint)


def test_a_rearrangement_that_is_not_known(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    model = StreamedModel(checkpoint).model
    turned = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [turned])
    with pytest.raises(UnknownArchitecture, match=r"rearranges model\.layers\.0\.mlp\.up_proj.*\(Transpose\)"):
        pieces(model, checkpoint)


def test_an_architecture_without_blocks(edited: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = edited(lambda state, config: config.update({"num_hidden_layers": 0}))
    with pytest.raises(UnknownArchitecture, match="LlamaForCausalLM keeps no list of decoder blocks"):
        StreamedModel(checkpoint)
