"""A learner inside vLLM: a stock server learns its drafter from its own traffic.

`register` is the entry point of the group `vllm.general_plugins`. It does nothing unless the engine
is started with `--additional-config '{"ttspec": {...}}'` (docs/vllm.md). Nothing here imports vLLM
before vLLM itself runs.

hooks.py       what must be there in which version of vLLM, and when there is no learning
workers.py     asks every worker, once it has its model runner
plugin.py      a worker's learning: check, load the drafter, put the hooks in, and what may fail
v1.py, v2.py   the two model runners: what a step's tensors are called there
steps.py       what is read of a step, and when an update comes
verified.py    a step as any engine could tell it; rounds as they were, until the memory is told
share.py       how much time that may take
status.py      the figures of a worker that learns, and a warning
rows.py        which request has which row
module.py      what was learned, put into vLLM's own draft module
packing.py     on a CPU, where vLLM multiplies by packed copies of that
drafting.py    when that happens, on every rank
capturing.py   all that as CUDA graphs, in the memory that vLLM left
kept.py        versions of it on disk, as ttspec's own engine keeps them
control.py     pause, resume, status: called by `collective_rpc`
metrics.py     figures beside vLLM's own at /metrics
"""

from typing import Any


def register() -> None:
    """Let every worker of vLLM get its hooks once it has a model runner; may be called twice."""
    from ttspec.vllm.workers import watch_workers

    watch_workers()


def __getattr__(name: str) -> Any:
    if name == "Control":
        from ttspec.vllm.control import Control

        return Control
    raise AttributeError(f"module 'ttspec.vllm' has no attribute {name!r}")
