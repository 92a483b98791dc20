"""The demonstration: a tiny Gemma 3 learns to answer questions about images, from nothing to a report."""
