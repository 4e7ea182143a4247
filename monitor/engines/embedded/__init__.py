"""The embedded engine: transformers in this process, every active sequence in one forward pass per step."""
