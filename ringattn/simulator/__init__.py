"""Virtual ranks: any number of ranks in one process, with the real engine."""

from ringattn.simulator.virtual import Simulation, simulate

__all__ = ["Simulation", "simulate"]
