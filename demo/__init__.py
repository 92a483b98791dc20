"""The demonstration: a tiny model learns to answer questions about images, from nothing to a report."""
