"""How a drafter learns from what the target verifies.

There are three learners:

- `learner.Learner`: each row for itself, from its own newest blocks (`replay_buffer`);
- `shared_learner.SharedLearner`: one drafter for all rows and requests, from a memory of their
  texts (`memory`, `memory_trainer`); like the first it is told of a decoder's rounds;
- `memory_learner.MemoryLearner`: the same for an engine that tells of texts, not of rounds: vLLM.

Each steps on `live_weights.LiveWeights`, and asks a `guard.Guard` when the anchor shall draft.
"""
