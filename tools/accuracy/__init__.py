"""Material and peers of tools/benchmark_accuracy.py: models, texts, a sentence encoder, and other quantizers."""
