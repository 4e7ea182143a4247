"""`midstream evaluate`: a probe on every set, beside its floors and under attack, as a page and as JSON."""
