"""The round, and everything around it up to text.

Where to start: `decoder.py`, one round straight down (docs/reading.md leads through it); its base
in `stages.py` owns what lies on the device, `planner.py` decides what a round is to do. What makes
a round of many rows: `rows.py` (lengths and tokens of each row), `row_sampling.py` (how its tokens
are chosen) with `penalties.py`, `row_masks.py` and `row_logprobs.py`.
Above it `scheduler.py` gives rows to requests; users call `engine.py` and `session.py`.
"""
