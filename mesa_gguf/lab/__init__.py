"""The laboratory: generated documents, other methods, evaluation and benchmarks. Nothing outside needs it."""
