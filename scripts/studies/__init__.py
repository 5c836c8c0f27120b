"""Studies and benchmarks behind the numbers in README and docs: python -m scripts.studies.NAME

Common code: `training` (images, short runs), `runs` (parallel processes, CSV), `timing` (latency in
turns), `networks` (random BatchNorm statistics, errors) and `report` (machine, command, figures).
"""
