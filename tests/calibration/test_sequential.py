"""Sequential calibration against a whole transformers model whose weights are replaced group by group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from anyquant.calibration import CalibrationSettings, MatrixStatistics, Statistics, batches, calibrate
from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.sequential import groups, quantize_in_sequence
from anyquant.calibration.weights import Piece
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import AnyquantError, InputError, UsageError

Floats = NDArray[np.float32]
Known = dict[str, MatrixStatistics | None]
Tiny = Callable[..., Path]
Calibrated = Callable[..., Statistics]
Plain = Callable[[Checkpoint], Any]

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not care: 7 words are enough. He said so! " * 40
MIXTURES: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calibrated(tmp_path: Path) -> Calibrated:
    """Function that calibrates some matrices of a checkpoint on a text: (checkpoint, names, **settings)."""

    def run(checkpoint: Checkpoint, names: list[str], windows: int = 3, window: int = 19, **other: Any) -> Statistics:
        text = tmp_path / "text.txt"
        text.write_text(TEXT)
        settings = CalibrationSettings(str(text), windows=windows, window=window, **other)
        return calibrate(checkpoint, names, settings, tmp_path / f"calibration-{len(list(tmp_path.iterdir()))}")

    return run


def names_of(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.matrices(), *checkpoint.embeddings()]


def coarse(weight: Floats, known: MatrixStatistics | None) -> Floats:
    """A weight rounded to few levels, finer where inputs are large: what the moments are shows in the result."""
    scale = np.ones(weight.shape[1], np.float32) if known is None else np.sqrt(1 + np.abs(known.full()).mean(axis=0))
    step = np.float32(1.2 * np.std(weight)) / scale
    return np.asarray(np.round(weight / step) * step, np.float32)


class WholeModel:
    """The oracle: all weights in memory, and the inputs of all matrices by hooks, in FP64."""

    def __init__(self, model: Any, checkpoint: Checkpoint, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.linear = {
            checkpoint.aliases.get(f"{name}.weight", f"{name}.weight"): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        self.experts = {name: module for name, module in model.named_modules() if name.endswith(".experts")}

    def expert(self, name: str) -> tuple[str, int, str]:
        """Path of the experts, number and role ("gate", "up", "down") of an expert's matrix."""
        match = re.fullmatch(r"(.*layers\.\d+\.).*experts\.(\d+)\.(\w+)\.weight", name)
        assert match is not None, name
        [path] = [path for path in self.experts if path.startswith(match[1])]
        role = {"w1": "gate", "w2": "down", "w3": "up"}.get(match[3], match[3].removesuffix("_proj"))
        return path, int(match[2]), role

    def inputs(self, names: list[str]) -> dict[str, torch.Tensor]:
        """What these matrices see now, float64 [tokens, in]."""
        found: dict[str, torch.Tensor] = {}
        hooks = []
        for name in names:
            if name in self.linear:
                hook = self._keep(found, name)
                hooks.append(self.linear[name].register_forward_pre_hook(hook))
            elif ".experts." in name:
                path, _, _ = self.expert(name)
                hooks.append(self.experts[path].register_forward_pre_hook(self._keep_routed(found, name)))
        with torch.no_grad():
            self.model(input_ids=self.ids, use_cache=False)
        for each in hooks:
            each.remove()
        return found

    @staticmethod
    def _keep(found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = args[0].flatten(0, -2).double()

        return hook

    def _keep_routed(self, found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        _, number, role = self.expert(name)

        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[(args[1] == number).any(dim=-1)]
            if role == "down":
                gate, up = nn.functional.linear(x, module.gate_up_proj[number]).chunk(2, dim=-1)
                x = nn.functional.silu(gate) * up
            found[name] = x.double()

        return hook

    def replace(self, name: str, weight: Floats) -> None:
        """Put another weight [out, in] in."""
        new = torch.tensor(weight)
        with torch.no_grad():
            if name in self.linear:
                module = self.linear[name]
                module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
            elif ".experts." in name:
                path, number, role = self.expert(name)
                module = self.experts[path]
                both = module.gate_up_proj[number]
                place = {
                    "gate": both[: len(both) // 2],
                    "up": both[len(both) // 2 :],
                    "down": module.down_proj[number],
                }[role]
                place.copy_(new)
            else:
                self.model.get_input_embeddings().weight.copy_(new)


def check(found: MatrixStatistics, inputs: torch.Tensor, name: str) -> None:
    """Compare with inputs float64 [tokens, in]."""
    expected = (inputs.T @ inputs / len(inputs)).numpy()
    largest = np.abs(expected).max()
    full = found.full()
    assert found.tokens == len(inputs)
    assert full.dtype == found.diagonal.dtype == np.float32
    np.testing.assert_allclose(full, expected, rtol=0, atol=2e-5 * largest, err_msg=name)
    np.testing.assert_allclose(found.diagonal, np.diag(expected), rtol=1e-4, atol=1e-6 * largest, err_msg=name)


def compare(
    checkpoint: Checkpoint, names: list[str], statistics: Statistics, plain: Any
) -> tuple[list[list[str]], dict[str, int]]:
    """Run with :func:`coarse` beside the whole model; the groups, and how often each kind of matrix was met."""
    oracle = WholeModel(plain, checkpoint, torch.from_numpy(statistics.ids()))
    order: list[list[str]] = []
    met = {"seen": 0, "seen anew": 0, "lonely": 0, "never": 0, "embedding": 0}

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        assert set(known) == set(group)
        order.append(group)
        inputs = oracle.inputs(group)
        weights = {}
        for name in group:
            found, before = known[name], statistics.matrix(name)
            if name not in inputs:
                assert found is not None
                np.testing.assert_array_equal(found.full(), np.eye(found.full().shape[0]))
                met["embedding"] += 1
            elif len(inputs[name]):
                assert found is not None, name
                check(found, inputs[name], name)
                met["seen" if before else "seen anew"] += 1
            elif before is None:
                assert found is None
                met["never"] += 1
            else:
                assert found is not None
                np.testing.assert_array_equal(found.full(), before.full())
                met["lonely"] += 1
            weights[name] = coarse(checkpoint.read(name), found)
        for name, weight in weights.items():
            oracle.replace(name, weight)
        yield from weights.items()

    quantize_in_sequence(checkpoint, names, statistics, quantize)
    assert sorted(name for group in order for name in group) == sorted(names)
    return order, met


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "falcon"])
def test_against_a_whole_model(
    tiny_checkpoint: Tiny,
    calibrated: Calibrated,
    plain_model: Plain,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    tied: bool,
) -> None:
    monkeypatch.setattr(batches, "TOKENS", 40)  # two windows and one
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied)))
    names = names_of(checkpoint)
    statistics = calibrated(checkpoint, names, importance="activation")
    order, met = compare(checkpoint, names, statistics, plain_model(checkpoint))
    assert met["embedding"] == (not tied)
    head = [checkpoint.aliases.get("lm_head.weight", "lm_head.weight")]
    assert order[-1] == head
    assert order[0] != head
    assert (order[0] == [name for name in checkpoint.embeddings() if name not in head]) == (not tied)


@pytest.mark.parametrize("window", [5, 40])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_against_a_whole_model(
    tiny_checkpoint: Tiny, calibrated: Calibrated, plain_model: Plain, family: str, window: int
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=False, **MIXTURES[family])))
    names = checkpoint.matrices()
    statistics = calibrated(checkpoint, names, windows=1, window=window, importance="activation")
    order, met = compare(checkpoint, names, statistics, plain_model(checkpoint))
    assert met["seen"] > 10
    if window == 5:  # so few tokens that some expert sees none
        assert met["never"]
        assert met["lonely"] + met["seen anew"], "other tokens go to other experts"
    # The experts of a block make two groups, not two for each.
    assert len(order) == 2 * (4 + 2 * (family == "qwen2_moe"))


@pytest.mark.parametrize(
    ("family", "block", "inside"),
    [
        ("llama", "model.layers.{}.", "self_attn.q_proj self_attn.k_proj self_attn.v_proj|self_attn.o_proj|"
         "mlp.gate_proj mlp.up_proj|mlp.down_proj"),
        ("gpt2", "transformer.h.{}.", "attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj"),
        ("phi3", "model.layers.{}.", "self_attn.qkv_proj|self_attn.o_proj|mlp.gate_up_proj|mlp.down_proj"),
        # Attention and MLP read the same.
        ("falcon", "transformer.h.{}.", "self_attention.query_key_value mlp.dense_h_to_4h|self_attention.dense|"
         "mlp.dense_4h_to_h"),
        ("mixtral", "model.layers.{}.", "self_attn.q_proj self_attn.k_proj self_attn.v_proj|self_attn.o_proj|"
         "block_sparse_moe.experts.0.w1 block_sparse_moe.experts.0.w3 block_sparse_moe.experts.1.w1 "
         "block_sparse_moe.experts.1.w3|block_sparse_moe.experts.0.w2 block_sparse_moe.experts.1.w2"),
    ],
)  # fmt: skip
def test_the_order_within_a_block(
    tiny_checkpoint: Tiny, calibrated: Calibrated, family: str, block: str, inside: str
) -> None:
    sizes = {"num_local_experts": 2} if family == "mixtral" else {}
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, **sizes)))
    names = checkpoint.matrices()
    order: list[list[str]] = []

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        order.append(sorted(group))
        return ((name, coarse(checkpoint.read(name), known[name])) for name in group)

    quantize_in_sequence(checkpoint, names, calibrated(checkpoint, names, importance="activation"), quantize)
    assert order == [
        sorted(f"{block.format(number)}{name}.weight" for name in group.split())
        for number in range(2)
        for group in inside.split("|")
    ]


@pytest.mark.parametrize(
    ("family", "importance"),
    [
        ("llama", "gradient"), ("gemma2", "fisher"), ("phi3", "gradient"), ("gpt2", "fisher"), ("bloom", "activation"),
        *((family, "gradient") for family in MIXTURES),
    ],
)  # fmt: skip
def test_where_nothing_changes_the_moments_are_those_of_the_calibration(
    tiny_checkpoint: Tiny, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, family: str, importance: str
) -> None:
    monkeypatch.setattr(batches, "TOKENS", 40)
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=family != "llama", **MIXTURES.get(family, {}))))
    names = names_of(checkpoint)
    statistics = calibrated(checkpoint, names, importance=importance)
    seen: list[str] = []

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        for name in group:
            seen.append(name)
            found, before = known[name], statistics.matrix(name)
            assert (found is None) == (before is None)
            if found is not None and before is not None:
                assert found.tokens == before.tokens
                np.testing.assert_array_equal(found.full(), before.full())
                np.testing.assert_array_equal(found.diagonal, before.diagonal)
                for now, then in ((found.gradient(), before.gradient()), (found.fisher(), before.fisher())):
                    np.testing.assert_array_equal(now, then)
            yield name, checkpoint.read(name)

    quantize_in_sequence(checkpoint, names, statistics, quantize)
    assert sorted(seen) == sorted(names)


def in_memory(
    checkpoint: Checkpoint, done: dict[str, bytes], stop_after: int | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``quantize`` and ``stored`` over a dict of results; the first raises Interrupted after so many matrices."""

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        for name in group:
            if len(done) == stop_after:
                raise Interrupted
            weight = coarse(checkpoint.read(name), known[name])
            assert done.setdefault(name, weight.tobytes()) == weight.tobytes()
            yield name, weight

    def stored(group: list[str]) -> dict[str, Floats] | None:
        if not all(name in done for name in group):
            return None
        shapes = {name: checkpoint.tensors[name].shape for name in group}
        # Read-only, as a mapped file is.
        return {name: np.frombuffer(done[name], np.float32).reshape(shapes[name]) for name in group}

    return quantize, lambda group: None if (found := stored(group)) is None else found.items()


@pytest.mark.parametrize("tied", [True, False])
def test_interrupted_anywhere_the_bytes_are_the_same(tiny_checkpoint: Tiny, calibrated: Calibrated, tied: bool) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama", tied=tied)))
    names = names_of(checkpoint)
    statistics = calibrated(checkpoint, names)
    whole: dict[str, bytes] = {}
    quantize_in_sequence(checkpoint, names, statistics, in_memory(checkpoint, whole)[0])
    independent = {name: coarse(checkpoint.read(name), statistics.matrix(name)).tobytes() for name in names}
    assert whole != independent, "later matrices see other inputs"
    for count in range(len(names)):
        done: dict[str, bytes] = {}
        quantize, stored = in_memory(checkpoint, done, count)
        with pytest.raises(Interrupted):
            quantize_in_sequence(checkpoint, names, statistics, quantize, stored=stored)
        assert len(done) == count
        torch.set_num_threads(3 - statistics.threads if statistics.threads < 3 else 1)  # as on another machine
        quantize, stored = in_memory(checkpoint, done)
        quantize_in_sequence(checkpoint, names, statistics, quantize, stored=stored)
        assert done == whole


def test_forwards_are_as_few_as_promised(
    tiny_llama: Path, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    names = names_of(checkpoint)
    statistics = calibrated(checkpoint, names)
    entered: dict[str, int] = {}

    def count(kind: Any) -> None:
        forward = kind.forward

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            entered[kind.__name__] = entered.get(kind.__name__, 0) + 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)

    for kind in (modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention, modeling_llama.LlamaMLP):
        count(kind)
    done: dict[str, bytes] = {}
    steps: list[tuple[str, int, int]] = []
    quantize, stored = in_memory(checkpoint, done)
    quantize_in_sequence(checkpoint, names, statistics, quantize, progress=lambda *step: steps.append(step))
    # q, k, v and o do not need what comes after them.
    assert entered == {"LlamaDecoderLayer": 2 * 5, "LlamaAttention": 2 * 5, "LlamaMLP": 2 * 3}
    assert steps == [("blocks", 1, 2), ("blocks", 2, 2)]
    entered.clear()
    del done["model.embed_tokens.weight"]
    quantize_in_sequence(checkpoint, names, statistics, quantize, stored=stored)
    assert entered == {"LlamaDecoderLayer": 2, "LlamaAttention": 2, "LlamaMLP": 2}
    entered.clear()
    inside = checkpoint.matrices()
    quantize_in_sequence(checkpoint, inside, statistics, quantize, stored=stored)
    assert entered["LlamaDecoderLayer"] == 1, "nobody sees the output of the last block"


def test_one_block_in_memory_and_none_after_the_last_matrix(
    tiny_checkpoint: Tiny, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama", num_hidden_layers=4)))
    names = checkpoint.matrices()
    statistics = calibrated(checkpoint, names)
    loaded: list[int] = []
    load = StreamedModel.load

    def watched(self: StreamedModel, section: int, **kwargs: Any) -> Any:
        parts = load(self, section, **kwargs)
        loaded.append(section)
        present = {name for name, tensor in self.model.named_parameters() if tensor.device.type != "meta"}
        blocks = {name.split(".")[2] for name in present if ".layers." in name}
        assert blocks == ({str(section)} if section < 4 else set())
        return parts

    monkeypatch.setattr(StreamedModel, "load", watched)
    quantize = in_memory(checkpoint, {})[0]
    quantize_in_sequence(checkpoint, names, statistics, quantize)
    assert loaded == [4, 0, 1, 2, 3]
    loaded.clear()
    some = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    done: dict[str, bytes] = {}
    quantize_in_sequence(checkpoint, some, statistics, in_memory(checkpoint, done)[0])
    assert list(done) == some
    assert loaded == [4, 0, 1, 2]
    loaded.clear()
    quantize_in_sequence(checkpoint, [], statistics, quantize)
    assert loaded == [4]


def test_what_quantize_finds_around_it(tiny_llama: Path, calibrated: Calibrated) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    torch.set_num_threads(2)
    statistics = calibrated(checkpoint, checkpoint.matrices())
    torch.set_num_threads(1)

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        assert torch.get_num_threads() == 2
        for name in group:
            # A method that learns.
            weight = torch.tensor(checkpoint.read(name), requires_grad=True)
            (gradient,) = torch.autograd.grad(weight.square().sum() / 2, weight)
            yield name, gradient.numpy()

    quantize_in_sequence(checkpoint, checkpoint.matrices(), statistics, quantize)
    assert torch.get_num_threads() == 1


def test_a_matrix_that_the_model_never_calls_comes_last(
    tiny_checkpoint: Tiny, calibrated: Calibrated, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    # transformers leaves out heads for later tokens, as DeepSeek and GLM have them, without a word.
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoint("glm4_moe", n_routed_experts=4, num_experts_per_tok=2, head_dim=16).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    extra = "model.layers.92.mlp.up_proj.weight"
    state[extra] = torch.arange(96.0 * 64).reshape(96, 64)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    names = checkpoint.matrices()
    assert extra in names
    statistics = calibrated(checkpoint, names)
    order: list[str] = []

    def quantize(group: list[str], known: Known) -> Iterator[tuple[str, Floats]]:
        order.extend(group)
        assert (known.get(extra) is None) or extra not in group
        return ((name, coarse(checkpoint.read(name), known[name])) for name in group)

    quantize_in_sequence(checkpoint, names, statistics, quantize)
    assert order[-1] == extra
    assert sorted(order) == sorted(names)


def test_groups_of_experts_in_modules_of_their_own() -> None:
    def part(name: str) -> tuple[Piece, torch.Tensor]:
        return Piece(name, f"model.{name}", 4), torch.zeros(4, 4)

    experts = [f"b.experts.{number}.{role}.weight" for number in range(12) for role in ("up", "down")]
    parts = [part(name) for name in ["b.idle.weight", "b.q.weight", "b.k.weight", *experts, "b.norm.weight"]]
    inputs = [
        ["a.q.weight"],
        ["b.q.weight", "b.k.weight"],
        ["b.experts.7.up.weight"],
        ["b.experts.7.down.weight"],
        ["b.experts.11.up.weight"],
        ["b.experts.11.down.weight"],
    ]
    wanted = {"a.q.weight", "b.k.weight", "b.idle.weight", *experts}
    found = groups(parts, wanted, inputs)
    assert [sorted(group) for group in found] == [
        ["b.k.weight"],
        sorted(name for name in experts if "up" in name),
        sorted(name for name in experts if "down" in name),
        ["b.idle.weight"],
    ]
    assert groups(parts, set(), inputs) == []
    assert groups(parts, {"b.idle.weight"}, []) == [["b.idle.weight"]]


def test_what_is_refused(tiny_llama: Path, tiny_checkpoint: Tiny, calibrated: Calibrated) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    names = names_of(checkpoint)
    statistics = calibrated(checkpoint, names)
    quantize = in_memory(checkpoint, {})[0]
    with pytest.raises(UsageError, match=r"has no tensor 'model\.nothing' to quantize"):
        quantize_in_sequence(checkpoint, ["model.nothing"], statistics, quantize)
    other = open_checkpoint(str(tiny_checkpoint("llama", seed=1)))
    with pytest.raises(UsageError, match="the calibration is not that of"):
        quantize_in_sequence(other, names, statistics, quantize)

    def changed(change: Callable[[str, Floats], list[tuple[str, Floats]]]) -> Callable[..., Any]:
        return lambda group, known: [pair for name in group for pair in change(name, checkpoint.read(name))]

    for change, message in (
        (lambda name, weight: [(name, weight[:, :1])], r"_proj\.weight \[64, 1\] came back .* in the shapes of"),
        (lambda name, weight: [(name, weight)] * 2, "came back from quantization, which was asked for"),
        (lambda name, weight: [("lm_head.weight", weight)], r"lm_head\.weight \[64, 64\] came back"),
        (lambda name, weight: [(name, weight)] if "k_proj" in name else [], r"layers\.0\..* did not come back"),
    ):
        with pytest.raises(AnyquantError, match=message):
            quantize_in_sequence(checkpoint, names, statistics, changed(change))
    with pytest.raises(InputError, match=r"output of block 0 holds 3,648 values of 3,648 .* choose more bits"):
        quantize_in_sequence(checkpoint, names, statistics, changed(lambda name, weight: [(name, weight * np.inf)]))


@pytest.mark.slow
def test_two_blocks_of_a_real_model(real_gguf: Path, real_text: Path, tmp_path: Path, plain_model: Plain) -> None:
    checkpoint = open_checkpoint(str(real_gguf))
    names = [name for name in checkpoint.matrices() if re.match(r"(blk|model\.layers)\.[01]\.", name)]
    assert len(names) == 14
    settings = CalibrationSettings(str(real_text), windows=2, window=64, importance="activation")
    statistics = calibrate(checkpoint, names, settings, tmp_path / "c")
    plain = plain_model(checkpoint)
    plain.model.layers = plain.model.layers[:2]
    order, met = compare(checkpoint, names, statistics, plain)
    assert [len(group) for group in order] == [3, 1, 2, 1] * 2
    assert met["seen"] == 14
