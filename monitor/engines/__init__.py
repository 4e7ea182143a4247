"""Engines: what runs the model, taps it and feeds each sequence's Watch."""
