"""An OpenAI server for one machine: one thread decodes, an event loop talks."""
