"""What a probe's value does: rules, the file they are written in, and the second judge."""
