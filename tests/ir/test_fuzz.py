"""Random damage to a small folder: a clear refusal, or values whose digest tells; never anything else."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anyquant import ir
from anyquant.errors import AnyquantError

ROUNDS = 200


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, double or insert bytes; mostly in the first part, where the structure is."""
    data = bytearray(raw)
    if rng.random() < 0.5:  # a single bit near the end, where the values are
        data[-rng.randrange(1, len(data) // 3)] ^= 1 << rng.randrange(8)
        return bytes(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 1500))
        action = rng.randrange(6)
        if action == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at] = rng.choice(b'0123456789{}[]",:-.eE\\u\x00\xff')
        elif action == 2:
            data[at : at + rng.choice([1, 8, 100])] = bytes([rng.randrange(256)]) * rng.choice([1, 8])
        elif action == 3 and len(data) > 1:
            del data[at:]
        elif action == 4:
            data[at:at] = data[max(0, at - rng.choice([1, 30])) : at]
        else:
            data[at : at + 1] = b"9" * rng.choice([1, 20])
        if not data:
            break
    return bytes(data)


def read(folder: Path) -> AnyquantError | tuple[list[str], list[str]]:
    """Digests of all values, and those that the folder promises; or the refusal."""
    try:
        model = ir.open_ir(folder)
        return [ir.digest(model.dequantize(n)) for n in model.entries], [e.sha256 for e in model.entries.values()]
    except AnyquantError as error:
        return error


@pytest.mark.parametrize("shard_bytes", [300, 4 << 30])
def test_damaged_folders(
    shard_bytes: int, zoo: dict[str, ir.Tensor], write_zoo: Callable[..., ir.Model], tmp_path: Path
) -> None:
    good = tmp_path / "good"
    write_zoo(good, shard_bytes=shard_bytes)
    files = {path.name: path.read_bytes() for path in sorted(good.iterdir())}
    truth = sorted(ir.tensor_digest(tensor) for tensor in zoo.values())
    rng = random.Random(shard_bytes)
    refused = noticed = unchanged = 0
    for round_ in range(ROUNDS):
        folder = tmp_path / "damaged"
        shutil.copytree(good, folder)
        name = rng.choice(list(files))
        (folder / name).write_bytes(damage(files[name], rng))
        result = read(folder)
        if isinstance(result, AnyquantError):
            assert result.exit_code == 3, (round_, name)
            assert str(result)
            refused += 1
        elif result[0] == result[1]:
            # Intact digests of intact values: only names and free text can differ.
            assert sorted(result[0]) == truth, (round_, name)
            unchanged += 1
        else:
            noticed += 1
        shutil.rmtree(folder)
    # The fuzzer reaches all three ends.
    assert min(refused, noticed, unchanged) > ROUNDS / 40, (refused, noticed, unchanged)


LIMITED = """
import resource, sys
from anyquant import ir
from anyquant.errors import AnyquantError
import numpy, safetensors
with open("/proc/self/status") as status:
    (used,) = [int(line.split()[1]) << 10 for line in status if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        model = ir.open_ir(path)
        for name in model.entries:
            model.dequantize(name)
    except AnyquantError as error:
        assert error.exit_code == 3
        print("refused", error)
    else:
        print("read", path)
"""


def test_huge_claims_cost_nothing(folder: Path, repository: Path) -> None:
    """In a child that may take 64 MiB more: shapes of 2**44, headers of 2**60 bytes, sparse files of a terabyte."""
    claims: dict[str, Callable[[Path], object]] = {
        "shape": lambda f: replace_text(f / "anyquant.json", '"shape": [3, 20]', '"shape": [4194304, 4194304]'),
        "entries": lambda f: replace_text(f / "anyquant.json", '"code_bytes": 27', '"code_bytes": 65'),
        "outliers": lambda f: replace_text(f / "anyquant.json", '"outliers": 7', '"outliers": 65'),
        "header": lambda f: overwrite(f / "anyquant.safetensors", (2**60).to_bytes(8, "little")),
        "header100M": lambda f: overwrite(f / "anyquant.safetensors", (99 << 20).to_bytes(8, "little"), 1 << 40),
        "sparse weights": lambda f: overwrite(f / "anyquant.safetensors", b"", 1 << 40),
        "sparse json": lambda f: overwrite(f / "anyquant.json", b"", 1 << 40),
        "sparse config": lambda f: overwrite(f / "config.json", b"", 1 << 40),
    }
    paths = []
    for name, claim in claims.items():
        path = folder.parent / name
        shutil.copytree(folder, path)
        claim(path)
        paths.append(str(path))
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), *paths],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"read {folder}"
    assert [line.split()[0] for line in lines[1:]] == ["refused"] * len(claims), lines


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def overwrite(path: Path, start: bytes, size: int | None = None) -> None:
    with path.open("r+b") as file:
        file.write(start)
        if size:
            file.truncate(size)  # sparse: takes no disk
