"""The libraries that people train with; each module here imports its own only."""
