"""The sentence encoder: its embeddings and moments against the plain way, methods and peers on it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.errors import CorruptFileError, InfeasibleTarget, InputError, UsageError

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A model of language tells how likely the next word is.",
    "The dog does not care.",
    "Numbers are written with digits.",
    "And the dog does not care, and the fox is quick.",
    "The quick brown dog jumps over the lazy fox.",
]


@pytest.fixture(scope="module")
def encoder(accuracy: Callable[[str], Any]) -> Any:
    return accuracy("encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_bert: Callable[[Path, list[str]], None]) -> Path:
    path = tmp_path_factory.mktemp("bert")
    write_bert(path, sorted({word.strip(".,").lower() for sentence in SENTENCES for word in sentence.split()}))
    return path


@pytest.fixture(scope="module")
def model(encoder: Any, folder: Path) -> Any:
    return encoder.Encoder(folder)


def slow_embeddings(folder: Path, sentences: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One sentence at a time through transformers; and the inputs of all linear layers, [tokens, in]."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer, bert = AutoTokenizer.from_pretrained(str(folder)), BertModel.from_pretrained(str(folder)).eval()
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, []).append(inputs[0][0].numpy())

    for name, module in bert.encoder.named_modules(prefix="encoder"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(f"{name}.weight"))
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            mean = bert(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
            rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows), {name: np.concatenate(parts) for name, parts in seen.items()}


def test_embeddings_and_moments(encoder: Any, model: Any, folder: Path, tmp_path: Path) -> None:
    rows, inputs = slow_embeddings(folder, SENTENCES)
    np.testing.assert_allclose(model.embed(SENTENCES), rows, atol=1e-5)
    tokens = model.calibrate(SENTENCES, tmp_path)
    found = encoder.statistics_in(tmp_path, gradients=False)
    assert found.keys() == inputs.keys() == model.weights.keys()
    assert len(found) == 12
    for name, x in inputs.items():
        x = x.astype(np.float64)
        assert found[name].tokens == len(x) == tokens
        np.testing.assert_allclose(found[name].full(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].diagonal, (x**2).mean(axis=0), rtol=1e-4, atol=1e-6)
        assert found[name].gradient() is None


def slow_curvatures(folder: Path, sentences: list[str]) -> dict[str, np.ndarray]:
    """Of each output of each linear layer, the sum over the embedding's coordinates of its squared gradients."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer, bert = AutoTokenizer.from_pretrained(str(folder)), BertModel.from_pretrained(str(folder)).eval()
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    for name, module in bert.encoder.named_modules(prefix="encoder"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(f"{name}.weight"))
    sums: dict[str, Any] = {}
    tokens = 0
    for sentence in sentences:
        mean = bert(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        tokens += next(iter(outputs.values())).shape[1]
        for coordinate in mean / mean.norm():
            found = torch.autograd.grad(coordinate, list(outputs.values()), retain_graph=True)
            for name, gradient in zip(outputs, found, strict=True):
                sums[name] = sums.get(name, 0) + gradient[0].double().square().sum(dim=0).numpy()
    return {name: total / tokens for name, total in sums.items()}


def test_gradients_are_the_curvature_of_the_distance(encoder: Any, model: Any, folder: Path, tmp_path: Path) -> None:
    model.calibrate(SENTENCES * 200, tmp_path)
    found = encoder.statistics_in(tmp_path, gradients=True)
    for name, exact in slow_curvatures(folder, SENTENCES).items():
        np.testing.assert_allclose(found[name].gradient(), exact, rtol=0.3)
        assert found[name].gradient().mean() == pytest.approx(exact.mean(), rel=0.06)


def test_other_weights_are_used_for_a_while(model: Any) -> None:
    before = model.embed(SENTENCES)
    name = next(iter(model.weights))
    with model.using({name: model.weights[name] * 2}):
        assert np.abs(model.embed(SENTENCES) - before).max() > 1e-4
    np.testing.assert_array_equal(model.embed(SENTENCES), before)
    with pytest.raises(InputError, match="the encoder has"), model.using({name: np.zeros((3, 3), np.float32)}):
        pass


def test_distance_is_one_minus_the_cosine(encoder: Any) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 40, 7)).astype(np.float32)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = encoder.distances(a, b)
    np.testing.assert_allclose(found, 1 - cosine, atol=1e-6)
    assert (encoder.distances(a, 3 * a) < 1e-14).all()


def test_methods_and_peers_run_alike(
    accuracy: Callable[[str], Any], encoder: Any, model: Any, tmp_path: Path
) -> None:  # fmt: skip
    matrices = accuracy("encoder_matrices")
    model.calibrate(SENTENCES, tmp_path)
    reference = model.embed(SENTENCES)

    def loss(values: dict[str, np.ndarray]) -> float:
        assert {name: part.shape for name, part in values.items()} == model.shapes
        with model.using(values):
            return float(encoder.distances(reference, model.embed(SENTENCES)).mean())

    moments = encoder.statistics_in(tmp_path, gradients=False)
    rtn = accuracy("interface").Contender.uniform(accuracy("grids").rtn(4, 32))
    fine = loss(matrices.by_peer(model, rtn, moments))
    coarse = accuracy("interface").Contender.uniform(accuracy("grids").rtn(2, 32))
    assert 0 < fine < loss(matrices.by_peer(model, coarse, moments)) / 4

    def job(command: str, bits: float) -> Any:
        return accuracy("embeddings").job_for(["--method", *command.split(), "--bits", f"{bits}"])

    # Bits over the model by gradients; within each matrix, by norms; without statistics.
    for command, scope, gradients in (("skim", "model", True), ("cmpq", "matrix", False), ("block", "model", False)):
        found = []
        for bits in (4.5, 6.5):
            asked = job(command, bits)
            assert (asked.scope, asked.has_gradients) == (scope, gradients)
            values, stored = matrices.by_method(model, asked, encoder.statistics_in(tmp_path, gradients=gradients))
            assert bits - 0.5 < stored <= bits
            found.append(loss(values))
        assert found[1] < found[0]
    with pytest.raises(InfeasibleTarget, match="needs at least"):
        matrices.by_method(model, job("skim", 0.1), encoder.statistics_in(tmp_path, gradients=True))


@pytest.mark.parametrize("words", ["--sequential", "--refine --row-groups 4", "--count index", "--importance fisher"])
def test_what_matrices_alone_cannot_have_is_refused(words: str, accuracy: Callable[[str], Any]) -> None:
    with pytest.raises(UsageError, match=f"^{words.removeprefix('--refine ').split(' 4')[0]}: not for the encoder"):
        accuracy("embeddings").job_for(["--method", "skim", "--bits", "3", *words.split()])


def test_the_archive_is_unpacked_once(encoder: Any, tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("model.safetensors", "weights")
        packed.writestr("1_Pooling/config.json", "{}")
    target = encoder.unpack(archive, tmp_path / "made" / "model")
    assert (target / "1_Pooling" / "config.json").read_text() == "{}"
    archive.write_bytes(b"no archive")
    assert encoder.unpack(archive, target) == target
    with pytest.raises(CorruptFileError, match="damaged"):
        encoder.unpack(archive, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="no usable BERT model"):
        encoder.Encoder(tmp_path / "made")
