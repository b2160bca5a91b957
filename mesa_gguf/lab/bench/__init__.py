"""Speed and memory by length and method, against an unpatched llama-cpp-python.

`shapes` writes models to measure with, `builds` finds the libraries, `measure` runs `worker.py` in a process of its own for
every measurement, `report` makes medians, ratios, a table and a picture of them.
"""
