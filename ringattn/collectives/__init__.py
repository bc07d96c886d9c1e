"""Differentiable collectives over a sharded sequence: planned, compared and counted like attention, one file each."""
