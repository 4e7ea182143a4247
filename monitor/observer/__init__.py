"""The observer: a small local model that reads a conversation along, where the model that answers can't be tapped."""
