"""Whether quantizing takes memory for the largest block or for the whole model: random Llamas of 1x and 4x depth.

    python tools/benchmark_memory.py                            every method, on models of 4 and 16 blocks
    python tools/benchmark_memory.py --methods cmpq,skim --hidden 768 --mlp 2048 --depth 2
    python tools/benchmark_memory.py --held             without what malloc keeps of freed memory

`anyquant quantize` runs in a process of its own, and while it runs the anonymous memory of its process tree is read
every few milliseconds. Mapped files are left out: their pages are those of the page cache, which the system takes
back whenever it needs them, so they say how much memory was free, not how much was needed. They are in the last
column, the growth of the proportional set size, as tools/measure.py takes it.

From a peak that of a process is subtracted which imports the very modules that the run had imported by its end, and
does nothing else: what is left is weights, statistics, activations, and what libraries allocate when they are used.

`anyquant quantize` has glibc give freed blocks of a quarter of a megabyte or more back to the system at once; with
--held it gives back those of 128 KiB. What lies between the two tables was free in the process; nothing held it.

A method passes if its peak grows by no more than --share of the bytes, in FP32, by which the model grows. CMPQ needs
no gradients: the last lines say what it takes of what SKIM takes with gradients, of rows and of weights, and, which
decides nothing, of what weights, their gradients and the squares of these take for a whole model: how SqueezeLLM, and
SKIM as published, get at them.

Exit codes: 0 everything passed; 1 something did not, or a run failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import descendants, memory  # the script beside this one

from anyquant.console import table

METHODS: Mapping[str, tuple[str, ...]] = {
    "block": ("--method", "block", "--bits", "4.75"),
    "affine": ("--method", "affine", "--bits", "3.5"),
    "affine --refine": ("--method", "affine", "--bits", "3.5", "--refine"),
    "ggml": ("--method", "ggml", "--bits", "4.25"),
    "skim": ("--method", "skim", "--bits", "3.5"),
    "skim --refine": ("--method", "skim", "--bits", "3.5", "--refine"),
    "skim --sequential": ("--method", "skim", "--bits", "3.5", "--sequential"),
    "skim fisher": ("--method", "skim", "--bits", "3.5", "--importance", "fisher"),
    "claq": ("--method", "claq", "--bits", "3.5"),
    "cmpq": ("--method", "cmpq", "--bits", "3.5"),
}
"""Name in the table -> options of `anyquant quantize`. The bits lie between two widths: errors have to be measured."""
DEPTHS = (1, 4)
SHARE = 0.15  # of the bytes by which the model grows; a run that kept them would have 1 and more
QUARTER = 0.25  # of skim's memory, for cmpq
INTERVAL = 0.004  # seconds between two looks at anonymous memory, which take some 50 microseconds for each process
SLOWLY = 0.5  # seconds between two looks at what processes there are, and at their proportional set size
MIB = 1 << 20
HELD = {"MALLOC_MMAP_THRESHOLD_": str(MIB // 8), "MALLOC_TRIM_THRESHOLD_": str(MIB // 8)}
"""Variables by which glibc gives memory back at once: its own first values, but fixed. Others pass them over."""
WHOLE = 3  # FP32 numbers for each weight of a model: itself, its gradient, the sum of squares

# Runs the command line; writes, at its end, which modules it had imported.
_RUN = """
import atexit, pathlib, sys
from anyquant.cli import main
listed, sys.argv = pathlib.Path(sys.argv[1]), ["anyquant", *sys.argv[2:]]
atexit.register(lambda: listed.write_text("\\n".join(name for name in sys.modules if name != "__main__")))
main()
"""
# Imports these modules again; those that are made by others, and no file's, cannot be.
_IMPORT = """
import contextlib, importlib, pathlib, sys, warnings
warnings.simplefilter("ignore")
for name in pathlib.Path(sys.argv[1]).read_text().split():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""


@dataclass(frozen=True)
class Shape:
    """Of a random Llama: width of the hidden states, width of the MLP, vocabulary."""

    hidden: int = 512
    mlp: int = 1536
    vocabulary: int = 320

    def values(self, depth: int) -> int:
        """Parameters of a model of so many blocks, the norms included."""
        block = 4 * self.hidden**2 + 3 * self.hidden * self.mlp + 2 * self.hidden
        return depth * block + self.hidden * (self.vocabulary + 1)


@dataclass(frozen=True)
class Peak:
    """Most memory of a process tree, in bytes.

    Attributes:
        anonymous: that no file backs.
        proportional: all of it, mapped files included; a page that several processes share counts once.
        seconds: that it ran.
    """

    anonymous: int
    proportional: int
    seconds: float


@dataclass(frozen=True)
class Growth:
    """A method on a model and on a deeper one, in bytes.

    Attributes:
        name: of the method.
        peaks: of the two runs.
        imports: of the processes that import what these runs did.
        models: FP32 bytes of the two models.
    """

    name: str
    peaks: tuple[Peak, Peak]
    imports: tuple[Peak, Peak]
    models: tuple[int, int]

    @property
    def net(self) -> tuple[int, int]:
        """Peaks of anonymous memory without that of the imports."""
        first, second = (run.anonymous - bare.anonymous for run, bare in zip(self.peaks, self.imports, strict=True))
        return first, second

    @property
    def share(self) -> float:
        """Bytes by which the peak grows, for each byte by which the model does."""
        return (self.net[1] - self.net[0]) / (self.models[1] - self.models[0])

    @property
    def share_with_files(self) -> float:
        """The same of the proportional set size."""
        return (self.peaks[1].proportional - self.peaks[0].proportional) / (self.models[1] - self.models[0])


def write_model(folder: Path, shape: Shape, depth: int, *, seed: int = 0, shard: str = "32MB") -> int:
    """Write a random Llama with tied embeddings, in shards, and a tokenizer of bytes; return its FP32 bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    nbytes = sum(4 * parameter.numel() for parameter in model.parameters())

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8"
    )
    return nbytes


def write_text(file: Path, letters: int, *, seed: int = 0) -> None:
    """Write words of random letters; a token of the random models is a letter."""
    drawn = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz     "), letters)
    file.write_text("".join(drawn), encoding="utf-8")


def anonymous(processes: Iterable[int]) -> int:
    """Bytes of the processes that no file backs. Pages shared by a fork would count in each; ours start programs."""
    total = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return total


def watch(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Peak:
    """Run a command to its end, what it says in a file, and watch its memory.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    start = looked = time.monotonic()
    most = proportional = 0
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment))
        tree = [process.pid]
        while process.poll() is None:
            if time.monotonic() - looked > SLOWLY:
                tree, proportional = descendants(process.pid), max(proportional, memory(process.pid) << 10)
                looked = time.monotonic()
            most = max(most, anonymous(tree))
            time.sleep(INTERVAL)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command[3:])} ended with {process.returncode}:\n{said}")
    return Peak(most, proportional, time.monotonic() - start)


class Bench:
    """Models, a text, and the runs on them, in a folder.

    Attributes:
        models: depth -> FP32 bytes of its model.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        depths: Sequence[int],
        *,
        windows: int,
        window: int,
        workers: int = 1,
        held: bool = False,
    ) -> None:
        """Write models of these depths, and the text; see the options of the same names."""
        self._folder, self._depths = folder, depths
        self.models = {depth: write_model(folder / f"llama-{depth}", shape, depth) for depth in depths}
        self._text = folder / "text.txt"
        write_text(self._text, 2 * windows * window)
        self._common = ["--workers", str(workers), "--quiet"]
        self._windows = ["--calib-windows", str(windows), "--calib-window", str(window)]
        # Threads of their own are another matter: each has its buffers.
        threads = {"OMP_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._environment = {**os.environ, **threads, **(HELD if held else {})}

    def quantize(self, options: Sequence[str], depth: int, *, source: str | None = None) -> tuple[Peak, list[str]]:
        """Quantize the model of a depth.

        Args:
            options: of the method.
            depth: of the model.
            source: of the calibration; the text unless given.

        Returns:
            The peak, and the names of the modules that it had imported.

        Raises:
            RuntimeError: it failed.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            place = Path(temporary)
            listed = place / "modules.txt"
            command = ["quantize", str(self._folder / f"llama-{depth}"), "-o", str(place / "ir"), *self._common]
            if "block" not in options:  # the method that needs no text
                command += ["--calib", source or str(self._text), *self._windows]
            run = [sys.executable, "-c", _RUN, str(listed), *command, *options]
            peak = watch(run, place / "log.txt", {**self._environment, "TMPDIR": temporary})
            return peak, listed.read_text(encoding="utf-8").split()

    def imports(self, modules: Sequence[str]) -> Peak:
        """The peak of a process that imports these modules and does nothing else.

        Raises:
            RuntimeError: it failed.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            listed = Path(temporary) / "modules.txt"
            listed.write_text("\n".join(modules), encoding="utf-8")
            return watch([sys.executable, "-c", _IMPORT, str(listed)], listed.with_name("log.txt"), self._environment)

    def growth(self, name: str, options: Sequence[str]) -> Growth:
        """Quantize the models of the first and the last depth.

        Raises:
            RuntimeError: a run failed.
        """
        small, large = self._depths[0], self._depths[-1]
        (first, modules), (last, more) = self.quantize(options, small), self.quantize(options, large)
        models = (self.models[small], self.models[large])
        return Growth(name, (first, last), (self.imports(modules), self.imports(more)), models)


def lines(found: Sequence[Growth], share: float) -> list[tuple[str, ...]]:
    """The table of growths."""
    return [
        (
            each.name,
            *(f"{net / MIB:.0f}" for net in each.net),
            f"{(each.net[1] - each.net[0]) / MIB:+.1f}",
            f"{100 * each.share:+.1f}",
            "PASS" if each.share <= share else "FAIL",
            f"{each.imports[1].anonymous / MIB:.0f}",
            f"{100 * each.share_with_files:+.1f}",
            f"{each.peaks[0].seconds:.0f}, {each.peaks[1].seconds:.0f}",
        )
        for each in found
    ]


def ratios(found: Sequence[Growth]) -> dict[str, tuple[float, float]]:
    """What cmpq takes of what skim takes with gradients of rows, and of weights, at both depths, imports left out."""
    by_name = {each.name: each for each in found}
    if "cmpq" not in by_name:
        return {}
    own = by_name["cmpq"].net
    others = {"skim, gradients of rows": "skim", "skim, gradients of weights": "skim fisher"}
    return {
        words: (own[0] / by_name[name].net[0], own[1] / by_name[name].net[1])
        for words, name in others.items()
        if name in by_name
    }


def report(found: Sequence[Growth], share: float, say: Callable[[str], Any] = print) -> bool:
    """Print the table and the ratios; return whether all passed."""
    heads = ("", "1x MiB", "4x MiB", "growth", "% of model's", "", "imports MiB", "with files %", "seconds")
    say(table(heads, lines(found, share)))
    passed = all(each.share <= share for each in found)
    for words, pair in ratios(found).items():
        good = pair[1] <= QUARTER
        say(f"cmpq takes {pair[0]:.2f} (1x) and {pair[1]:.2f} (4x) of {words}: {'PASS' if good else 'FAIL'}")
        passed = passed and good
    for each in found:
        if each.name == "cmpq":
            part = [net / (WHOLE * model) for net, model in zip(each.net, each.models, strict=True)]
            say(f"cmpq takes {part[0]:.2f} (1x) and {part[1]:.2f} (4x) of gradients of a whole model at once")
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the models, run everything, print, and say by the exit code whether it passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names of the table, with commas between")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1536)
    parser.add_argument("--depth", type=int, default=4, help="blocks of the model of depth 1x")
    parser.add_argument("--windows", type=int, default=32, help="of the calibration")
    parser.add_argument("--window", type=int, default=256, help="tokens in each")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--held", action="store_true", help="let glibc give freed memory back at once")
    parser.add_argument("--share", type=float, default=SHARE, help="of the model's growth that a peak may grow by")
    options = parser.parse_args(arguments)
    names = options.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    shape = Shape(options.hidden, options.mlp)
    found: list[Growth] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="anyquant-memory-") as folder:
        depths = [options.depth * times for times in DEPTHS]
        bench = Bench(
            Path(folder),
            shape,
            depths,
            windows=options.windows,
            window=options.window,
            workers=options.workers,
            held=options.held,
        )
        small, large = (bench.models[depth] / MIB for depth in depths)
        print(
            f"Random Llamas, hidden {shape.hidden}, MLP {shape.mlp}: {depths[0]} blocks, {small:.0f} MiB in FP32, and "
            f"{depths[1]} blocks, {large:.0f} MiB; {options.windows} windows of {options.window} tokens, "
            f"{options.workers} worker{'s' if options.workers > 1 else ''}"
            f"{', freed memory given back at once' if options.held else ''}.\nPeaks of anonymous memory, that of the "
            f"imports subtracted; growth may be {100 * options.share:.0f} % of the model's.\n",
            flush=True,
        )
        for name in names:
            try:
                found.append(bench.growth(name, METHODS[name]))
            except RuntimeError as error:
                failed = True
                print(f"{name}: {error}", file=sys.stderr)
            else:
                print(f"  {name}: {found[-1].net[0] / MIB:.0f}, {found[-1].net[1] / MIB:.0f} MiB", flush=True)
    print()
    return 0 if report(found, options.share) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
