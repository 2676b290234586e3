"""An OpenAI server for one machine: one thread decodes, an event loop talks.

A request passes these files, in this order:

1. `middleware.py`: whose host name, whose key (`keys.py`), how large a body. What is raised below
   becomes a response here, an `ApiError` (`errors.py`) with its status, anything else as 500.
2. `app.py`: the route. `schema.py` says what its body may have.
3. `api.py`: `Api.answers` lets `prompts.py` make tokens and a grammar's mask (`grammar.py`) of the
   body, and one `Job` (`jobs.py`) of each answer that is asked for.
4. `worker.py`: the thread that owns the engine. It queues jobs, gives them rows of a scheduler
   (`schedulers.py`), and sends what is new of each through the jobs' queue. No other file may call
   torch's models.
5. `answers.py`: makes a response or a stream of that queue, with the help of `reasoning.py`,
   `tool_calls.py`, `logprobs.py` and `usage.py`.

Beside them: `server.py` starts and ends it all, `options.py` has what can be set and all limits,
`metrics.py` counts for /metrics and for the page (`page.html`), `logs.py` writes the log.

To add an endpoint, write a route in `make_app`. It has `request.scope["tenant"]`, and needs a key
unless `middleware.FOR_ANYBODY` names its path. A body of its own is a subclass of `schema.Strict`;
one that is answered by decoding a subclass of `schema.Sampled`, with a method of `PromptRenderer`
that makes its prompts, and its own words in `Answers`. Name it in docs/server.md.
"""
