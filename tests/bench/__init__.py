"""`make bench`: speed, paired and interleaved, medians with intervals. Figures, never assertions."""
