"""Tests that start vLLM: run with `make test-vllm`."""
