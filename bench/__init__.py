"""The yardstick: suites of convolutions, timed beside the libraries that people use for them.

``python -m bench --help`` runs it, README.md says how to read it. Reading order: networks.py and
suites.py (what is measured), peers.py (against whom), check.py (is it right), measure.py (how long
does it take), run.py (all of that, row by row), report.py, compare.py, plots.py and markdown.py
(what it means).
"""
