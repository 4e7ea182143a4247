"""The HTTP side: bytes in, types to the engine, judged text out."""
