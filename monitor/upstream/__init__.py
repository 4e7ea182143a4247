"""In front of an endpoint that somebody else runs: its answers are read along by an observer before they go out."""
