"""llama.cpp's converter in a process of its own: a JSON object a line on stdin, "ok" or the error a line on stdout.

python converter_worker.py LLAMA_CPP_FOLDER

It needs the gguf package that lies beside it, which may know more names than the installed one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path


def main(root: Path) -> None:
    """Convert without the tokenizer: the vocabulary of a random model is none that llama.cpp knows."""
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    answers, sys.stdout = sys.stdout, sys.stderr
    import conversion
    import gguf

    for line in sys.stdin:
        request = json.loads(line)
        folder, output = Path(request["folder"]), Path(request["output"])
        try:
            with contextlib.redirect_stdout(sys.stderr):
                hparams = conversion.ModelBase.load_hparams(folder, False)
                model_class = conversion.get_model_class(hparams["architectures"][0])
                model = model_class(folder, getattr(gguf.LlamaFileType, request["kind"]), output)
                model.set_vocab = lambda: None
                model.write()
            answer = "ok"
        except Exception:
            answer = json.dumps(traceback.format_exc())
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
