"""vLLM's own HTTP server, watched: which routes exist, what a block looks like on each, and how it starts."""
