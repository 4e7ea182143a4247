"""Midstream, offline: labelled texts -> activations -> probes, calibrated, with honest figures, into the store."""
