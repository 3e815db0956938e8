"""What nsk's ops reach on this machine, next to what a user would run instead: ``python -m benchmarks``."""
