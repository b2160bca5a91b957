"""The measuring stick: what methods that extend a context can still find, and what that costs, by length.

`Evaluation` runs a group of tasks (passkey, niah, ruler, ppl, qa), `RealEvaluation` the task real; `report` and `real_report` make numbers,
tables and pictures of the results. The command is ``mesa-gguf eval``; docs/EVALUATION.md says what is measured.
"""

from __future__ import annotations

from .real import RealEvaluation
from .run import GROUPS, Evaluation, Options

__all__ = ["GROUPS", "Evaluation", "Options", "RealEvaluation"]
