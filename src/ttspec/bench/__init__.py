"""Arms that run the same requests, what they measured, and reports on it.

Where to start: `cli/bench.py`, which calls these in this order.

    bench run       arms.py (names to options), suites.py (requests), preparation.py (drafters,
                    memory, order, manifest), runner.py (measure what the folder lacks)
    bench replay    replay.py prepares, runner.py measures over a text that is known (known_text.py)
    bench report    run_set.py (folders as one run), report.py (plots, tables, page)
    bench compare   compare.py

What they share: results.py (`Turn`, `Arm`: what was measured), store.py and jsonl.py (the run
folder), manifest.py (how it was made), estimates.py and metrics.py (numbers with intervals).
A report is made by report_tables.py, figures.py and sentences.py.

To add an arm: an entry in `arms.KINDS`, with the options it fixes; a colour in plot_style.py.
"""
