"""Benchmarks over assets: any method, any folder, one protocol.

protocol.py   what is rendered and compared, as a file; drawing the assets
sources.py    where pictures come from: meshes, .ply folders, picture folders, a function
scores.py     the numbers of one asset, with the extractors that are here
runs.py       every asset once, resumable and in parallel; the run's folder
summary.py    means, confidence intervals, FD and KD over a run
tables.py     Markdown and JSON, the paper's rows beside ours
gate.py       a result against an earlier one
report.py     HTML with pictures side by side
cli.py        what the programs in eval/ share
"""
