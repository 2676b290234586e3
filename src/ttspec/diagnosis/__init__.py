"""What would silently kill acceptance: read from the files, and measured.

Where to start: `cli/doctor.py`, which prints what these find.

    findings.py   what the files of a pair say, one function a finding; `examine` lists them
    memory.py     what the pair takes
    probe.py      --probe: is the drafter accepted more often when it is read otherwise?
    targets.py    --targets: architectures beside transformers; families.py builds them small
    ties.py       `ttspec check`: how near the target was to another token

To add a finding: a function of target and drafter in findings.py that returns a `Finding` or None,
and its name in `examine`; tests/test_doctor.py plants what it should find.
"""
