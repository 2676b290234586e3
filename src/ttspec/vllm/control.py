"""What an operator can ask of a server that learns: `--worker-extension-cls ttspec.vllm.Control`.

Called by name with `collective_rpc`, from Python or over HTTP. Every rank answers.
"""

from __future__ import annotations

from typing import Any

from ttspec.vllm.plugin import WorkerLearning

NOT_ASKED = {"state": "off", "reason": "the engine was not started with ttspec"}


class Control:
    """Methods that every worker has besides its own."""

    def ttspec_status(self) -> dict[str, Any]:
        """State, updates, reverts, acceptance, share of time."""
        return self._ttspec("status")

    def ttspec_pause(self) -> dict[str, Any]:
        """Stop learning for now; what was learned goes on drafting."""
        return self._ttspec("pause")

    def ttspec_resume(self) -> dict[str, Any]:
        """Learn again."""
        return self._ttspec("resume")

    def ttspec_revert(self) -> dict[str, Any]:
        """Give the drafter back the weights that it came with, and learn from there."""
        return self._ttspec("revert")

    def _ttspec(self, what: str) -> dict[str, Any]:
        learning: WorkerLearning | None = getattr(self, "ttspec", None)
        if learning is None:
            return NOT_ASKED
        getattr(learning, what)()
        return learning.status()
