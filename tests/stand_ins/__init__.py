"""Stand-ins for libraries that only some clusters have; their signatures and rules are the published ones."""
