"""Fixtures that all tests share: the real model and text, and tiny random checkpoints of every family."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from xml.etree import ElementTree

# Before anything imports torch or huggingface_hub: no test may reach the network, and tests run beside each other.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that started the tests in the background has them ignore Ctrl-C, and what they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# The time of an example says something about the machine, not about the code.
settings.register_profile("anyquant", deadline=None)
settings.load_profile("anyquant")


def _load_tool(name: str) -> ModuleType:
    """Import a script of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"anyquant_tools_{name}", REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


fetch = _load_tool("fetch")


def _real(key: str) -> Path:
    """Path of a fetched file; without it the test is skipped, in CI it fails."""
    path: Path | None = fetch.find(key)
    if path is not None:
        return path
    reason = f"{fetch.MATERIALS[key].name} is not in {fetch.folder()}: run python tools/fetch.py"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """SmolLM2-135M-Instruct as a stock GGUF file: Q4_1 matrices, a Q8_0 embedding that is also the head."""
    return _real("gguf")


@pytest.fixture(scope="session")
def real_text() -> Path:
    """Three hundred news articles of 2000 and 2001, one on a line, 360 kB."""
    return _real("text")


@pytest.fixture(scope="session")
def real_wiki() -> Path:
    """Part of a Wikipedia dump, XML packed by bzip2, 1.7 MB."""
    return _real("wiki")


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    """real_file(key) -> any other fetched file, by its key in tools/fetch.py."""
    return _real


@pytest.fixture(scope="session")
def old_onnxruntime() -> Path:
    """The wheel of the oldest ONNX Runtime that we support."""
    if "onnxruntime-1.20" not in fetch.MATERIALS:
        pytest.skip("ONNX Runtime 1.20 is not fetched for this machine and Python")
    return _real("onnxruntime-1.20")


RunDriver = Callable[[Path, list[Path], list[str]], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_driver(tmp_path: Path) -> RunDriver:
    """run_driver(driver.cpp, [source.cpp, ...], [flag, ...]): what a program does that is compiled of these.

    Skipped where there is no C++ compiler, or where it has no runtime for the sanitizers that the flags ask for.
    """

    def run(driver: Path, sources: list[Path], flags: list[str]) -> subprocess.CompletedProcess[str]:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        command = [compiler, "-std=c++17", "-g", "-O1", "-pthread", *flags]
        probe = tmp_path / "probe.cpp"
        probe.write_text("int main() { return 0; }")
        if subprocess.run([*command, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
            pytest.skip("the compiler has no sanitizer runtime")
        program, core = tmp_path / "compiled", Path(__file__).parents[1] / "kernels" / "core"
        subprocess.run([*command, "-Wall", "-Wextra", "-I", core, driver, *sources, "-o", program], check=True)
        return subprocess.run([program], capture_output=True, text=True)

    return run


def _in_node(script: str, package: str, oldest: int = 0) -> Callable[..., dict[str, Any]]:
    """Return run(*arguments, **environment) -> what a script of tools/clients prints, a JSON object.

    The test is skipped where Node.js is not installed, or older; where only the package is missing, it fails in CI.
    """
    node, modules = shutil.which("node"), fetch.find_clients()
    if node is None:
        pytest.skip("Node.js is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < oldest:
        pytest.skip(f"{package} needs Node.js {oldest}, this is {version}")
    if modules is None:
        reason = f"{package} is not in {fetch.clients_folder()}: run python tools/fetch.py --clients"
        if shutil.which("npm") and os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)

    def run(*arguments: str, **environment: str) -> dict[str, Any]:
        # A plug-in of the user's is none of the test's.
        inherited = {key: value for key, value in os.environ.items() if key != "GGML_BACKEND_PATH"}
        done = subprocess.run(
            [node, str(REPOSITORY / "tools" / "clients" / script), *arguments],
            env={**inherited, "NODE_PATH": str(modules), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


@pytest.fixture(scope="session")
def run_in_node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """run_in_node(model.onnx, {input: array}, [outputs]) -> {output: array}: once, in onnxruntime-node on the CPU.

    Skipped where Node.js is not installed; where only the package is missing, it fails in CI.
    """
    in_node = _in_node("run_onnx.cjs", "onnxruntime-node")

    def run(model: Path, feeds: dict[str, np.ndarray], outputs: list[str]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("node")
        request: dict[str, Any] = {"model": str(model), "threads": 2, "feeds": {}}
        for i, (name, array) in enumerate(feeds.items()):
            file = folder / f"feed-{i}"
            file.write_bytes(np.ascontiguousarray(array).tobytes())
            request["feeds"][name] = {"type": str(array.dtype), "dims": list(array.shape), "file": str(file)}
        request["outputs"] = {name: str(folder / f"output-{i}") for i, name in enumerate(outputs)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        answer = in_node(str(folder / "request.json"))
        assert answer["versions"]["node"] == "1.30.0"
        return {
            name: np.frombuffer(Path(request["outputs"][name]).read_bytes(), form["type"]).reshape(form["dims"])
            for name, form in answer["outputs"].items()
        }

    return run


@pytest.fixture(scope="session")
def run_in_node_llama() -> Callable[..., dict[str, Any]]:
    """run_in_node_llama(model.gguf, prompt, n, plugin=None): n tokens, chosen greedily in node-llama-cpp on the CPU.

    The prompt is token ids, the plug-in a library for GGML_BACKEND_PATH. Returns "tokens", and in "top" for each of
    them the 32 most likely at its place as [id, log probability], the likeliest first.

    Skipped where Node.js is not installed or too old; where only the package is missing, it fails in CI.
    """
    in_node = _in_node("run_gguf.mjs", "node-llama-cpp", oldest=20)

    def run(model: Path, prompt: list[int], n: int, plugin: Path | None = None) -> dict[str, Any]:
        environment = {} if plugin is None else {"GGML_BACKEND_PATH": str(plugin)}
        return in_node(str(model), json.dumps(prompt), str(n), "2", **environment)

    return run


TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "A model of language tells how likely the next word is; a small one is often wrong.",
    "Numbers such as 0, 1, 23, 456 and 7890 are written with digits, names with Capital Letters.",
    "He said: what is the time? She said: the time is now! (And then they went home.)",
    "for i in range(10): print(i * i + 1)  # a line of code, with brackets [x] and {y}",
]
VOCABULARY = 389  # odd, so that nothing relies on a vocabulary that is a multiple of a block

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def _write_tokenizer(folder: Path) -> None:
    """Write a small tokenizer that loses no text: BPE over sentence pieces that falls back to bytes, as Llama 2's.

    llama.cpp's converter takes this kind from any vocabulary; byte-level BPE only from those it has a hash of.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(fixed), show_progress=False, max_token_length=4)
    learner.train_from_iterator((word for text in TRAINING_TEXT for word in text.split()), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {piece: index for index, piece in enumerate([*fixed, *learned["vocab"]])}
    assert len(vocabulary) == VOCABULARY

    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in fixed[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _config(family: str, hidden: int, tied: bool, overrides: dict[str, Any]) -> Any:
    """Return the configuration of a tiny model: 2 layers, 4 heads (2 for keys), an MLP of 1.5 times the width."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
        # Weights of a size at which logits differ by more than rounding.
        "initializer_range": 0.125,
    }
    if family == "gpt2":
        shape = {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_inner": hidden * 3 // 2, "n_positions": 256}
    else:
        shape = {
            "hidden_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": hidden * 3 // 2,
            "max_position_embeddings": 256,
        }
    if family in ("qwen3", "gemma2"):
        shape["head_dim"] = hidden // 4
    if family == "gemma2":
        # A window shorter than the texts of the tests, so that it matters.
        shape |= {"query_pre_attn_scalar": hidden // 4, "sliding_window": 16}
    if family == "phi3":
        common["pad_token_id"] = 0  # its default lies outside this vocabulary
    return AutoConfig.for_model(family, **{**common, **shape, **overrides})


def _write_checkpoint(
    folder: Path, family: str, *, hidden: int, tied: bool, dtype: str, seed: int, overrides: dict[str, Any]
) -> None:
    """Write a random model of a family as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = _config(family, hidden, tied, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=16)
    model.save_pretrained(folder)
    _write_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that gives a tiny random checkpoint folder; equal calls give the same folder, so do not write there.

    tiny_checkpoint(family="llama", *, hidden=64, tied=True, dtype="float32", seed=0, **configuration)

    Families: llama, mistral, qwen2, qwen3, gemma2, phi3, gpt2, and whatever else AutoConfig.for_model knows.
    The MLP of 1.5 times the hidden size (96) is a multiple of 32 but not of 64.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "llama",
        *,
        hidden: int = 64,
        tied: bool = True,
        dtype: str = "float32",
        seed: int = 0,
        **configuration: Any,
    ) -> Path:
        key = json.dumps([family, hidden, tied, dtype, seed, configuration], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            _write_checkpoint(folder, family, hidden=hidden, tied=tied, dtype=dtype, seed=seed, overrides=configuration)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random LlamaForCausalLM folder: hidden 64, MLP 96, 2 layers, vocabulary 389, tied, FP32."""
    return tiny_checkpoint("llama")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, object]:
        loaded: dict[str, object] = json.loads(self.out)
        return loaded


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """invoke(*arguments): run the command line in this process; its exit code, stdout and stderr."""
    from anyquant.cli import main

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["anyquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return call


class _Page(HTMLParser):
    """Collects tags and links of a page; knows when a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="session")
def check_page() -> Callable[[str], None]:
    """check_page(html): whole, its plots are XML, no script, nothing that would be loaded from elsewhere."""

    def check(page: str) -> None:
        parsed = _Page()
        parsed.feed(page)
        assert parsed.open == []
        assert not parsed.tags & {"script", "link", "img", "iframe", "object", "image"}
        assert all(link.startswith("#") for link in parsed.links)
        assert not re.search(r"url\((?!['\"]?#)", page)
        assert "@import" not in page
        drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(drawings) == page.count("<svg")
        for drawing in drawings:
            ElementTree.fromstring(drawing)

    return check


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_ir(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 quantized to BFP4 with blocks of 32: the IR folder of ``anyquant quantize --bits 4.25``."""
    from anyquant.checkpoint import open_checkpoint
    from anyquant.job import Job, Target
    from anyquant.pipeline import run
    from anyquant.planning import plan

    folder = tmp_path_factory.mktemp("real") / "ir"
    run(plan(open_checkpoint(str(real_gguf)), Job("block", Target(bits=4.25), workers=2)), folder)
    return folder


class RealSkim(NamedTuple):
    plan: Any
    folder: Path


@pytest.fixture(scope="session")
def real_skim(real_gguf: Path, real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> RealSkim:
    """SmolLM2 quantized by SKIM to 3.25 bits, a thousandth of the weights as outliers: the plan, and the IR folder."""
    from anyquant.calibration import CalibrationSettings
    from anyquant.checkpoint import open_checkpoint
    from anyquant.job import Job, Target
    from anyquant.pipeline import run
    from anyquant.planning import plan
    from anyquant.workfolder import work_folder

    # Processes that test beside each other make it once.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "real-skim"
    folder.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(str(real_gguf))
    calibration = CalibrationSettings(str(real_text), windows=4, window=128)
    job = Job("skim", Target(bits=3.25), {"outliers": 0.1}, calibration=calibration, workers=2)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with work_folder(folder / "work", job.identity(checkpoint), resume=False, keep=True) as work:
            planned = plan(checkpoint, job, work)
            if not (folder / "ir").exists():
                run(planned, folder / "ir", work)
    return RealSkim(planned, folder / "ir")
