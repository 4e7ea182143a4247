"""The probe store: probes as safetensors, each beside the card that says what it is and how it was made."""
