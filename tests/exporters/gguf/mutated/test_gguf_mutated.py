"""A thousand damaged and lying files: our reader and the plug-in say so, or have the values that the file says."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from anyquant import errors, ir
from anyquant.checkpoint.gguf_names import gguf_to_hf_name
from anyquant.exporters.gguf import GGUFExporter, container, custom
from anyquant.gguf_container import Header, StoredTensor, padded, parse
from anyquant.runtime import ggml_plugin, native


def in_stock_types(name: str, place: StoredTensor, data: bytes) -> tuple[str, bytes]:
    """Type and bytes of a tensor of a file, in FP32 where its type is ours."""
    raw = data[place.offset : place.offset + place.nbytes]
    if place.type not in custom.TYPES:
        return place.type, raw
    tensor = custom.decode(name, place.shape, np.frombuffer(raw, np.uint8))
    return "F32", ir.dequantize(tensor).astype("<f4").tobytes()


def meaning(original: Any, mutant: Any) -> list[list[Any]]:
    """What the reader has to answer: what was written, and of stock types and forged blobs what there is.

    No bit of another blob has changed. Rows of q and k are those of heads of 16.
    """
    data, found = bytes(mutant.data), []
    header = parse(data, "mutant")
    names = json.loads(header.get("anyquant.names", str, "{}"))
    for name, place in header.stored(container.TYPES).items():
        kind, raw = in_stock_types(name, place, data)
        if place.type in custom.TYPES and not mutant.forged:
            was = [blob for blob in original.own if original.places[blob].type == place.type]
            assert data.startswith(tuple(original.data[original.meant(blob)] for blob in was), place.offset)
        if kind in ir.GGML_TYPES:
            values = ir.dequantize_blocks(np.frombuffer(raw, np.uint8).reshape(place.shape[0], -1), kind)
        else:
            values = np.frombuffer(raw, ir.DENSE_DTYPES[kind]).astype(np.float32).reshape(place.shape)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = values.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(place.shape)
        found.append([names.get(name) or gguf_to_hf_name("llama", name), list(place.shape), ir.digest(values)])
    return found


def test_our_reader(original: Any, mutants: list[Any], child: Any) -> None:
    outcomes = Counter[str]()
    for mutant in mutants:
        answer = child.ask("read", mutant.data)
        said = mutant.done, answer
        if "values" in answer:
            assert answer["values"] == meaning(original, mutant), said
        else:
            assert not original.is_harmless(mutant.data), said
            assert answer.get("code") == errors.InputError.exit_code, said
            assert issubclass(getattr(errors, answer["error"]), errors.InputError), said
            assert any(name in answer["says"] for name in (child.path.name, *original.own)), said
        outcomes[answer.get("error", "values")] += 1
    assert outcomes["CorruptFileError"] > len(mutants) // 2
    assert outcomes["values"] > len(mutants) // 20


def plain(header: Header, data: bytes, places: dict[str, StoredTensor]) -> bytes:
    """A file with the keys of a header and the tensors of some file, all in stock types."""
    found = [(name, place.shape, *in_stock_types(name, place, data)) for name, place in places.items()]
    parts = [raw.ljust(padded(len(raw), header.alignment), b"\0") for *_, raw in found]
    about = [(name, kind, shape) for name, shape, kind, _ in found]
    return container.header_bytes(header.values, about, header.alignment) + b"".join(parts)


def logits(answer: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(answer["logits"]), np.float32)


def outcome(original: Any, mutant: Any, whole: dict[str, Any], child: Any) -> str:
    """What llama.cpp does with a mutant; checked by what it does with the reader's values in stock types."""
    data = bytes(mutant.data)
    answer = child.ask("compute", data)
    if original.is_harmless(data):
        assert answer == whole
        return "harmless"
    if "died" in answer:  # that is llama.cpp's own where these keys end it without our types, too
        header = parse(data, "mutant")
        assert answer == child.ask("compute", plain(header, original.data, original.places))
        return "died"
    nothing = "refused" in answer or bool(np.isnan(logits(answer)).all())
    try:
        assert dict(GGUFExporter().read(child.path))
    except errors.InputError:
        # It does not look for what does no harm in a forged blob, nor llama.cpp in what is not ours.
        blobs = map(original.meant, original.own)
        assert nothing or mutant.forged or all(data[blob] == original.data[blob] for blob in blobs)
        return "nothing" if nothing else "computed"
    if nothing and mutant.forged:
        return "nothing"  # the plug-in may find fault where the reader does not look
    header = parse(data, "mutant")
    expected = child.ask("compute", plain(header, data, header.stored(container.TYPES)))
    assert answer.keys() == expected.keys()
    if "refused" in answer:
        return "nothing"
    found, exact = logits(answer), logits(expected)
    if not np.isfinite(exact).all():  # of weights up to the largest that there are
        assert not np.isfinite(found).all()
        return "computed"
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-3 * np.abs(exact).max())
    return "as in stock types"


@pytest.mark.skipif(native.path_of(ggml_plugin.LIBRARY) is None, reason=native.missing(ggml_plugin.LIBRARY))
def test_the_plug_in_in_llama_cpp(original: Any, mutants: list[Any], child: Any) -> None:
    pytest.importorskip("xllamacpp")
    whole, outcomes = child.ask("compute", original.data), Counter[str]()
    for mutant in mutants:
        try:
            outcomes[outcome(original, mutant, whole, child)] += 1
        except (AssertionError, errors.AnyquantError) as error:
            raise AssertionError(", ".join(mutant.done)) from error
    assert outcomes["nothing"] > len(mutants) // 2
    assert outcomes["as in stock types"] > len(mutants) // 20
    assert outcomes["harmless"] > 2
