"""vLLM watched from inside: a worker that taps, a scheduler that carries, a judge where outputs are processed."""
