"""ringattn: exact attention over sequences too long for one device. See README.md."""

from ringattn import conformance, modules, reference
from ringattn.collectives.chosen_rows import attention_rows
from ringattn.collectives.cumulative import cumsum
from ringattn.collectives.neighbours import halo
from ringattn.collectives.pooling import pool
from ringattn.collectives.reduction import reduce
from ringattn.collectives.stopping import monotonic_stops
from ringattn.errors import (
    AgreementError,
    CheckpointError,
    DeadlockError,
    InFlightError,
    InputError,
    MissingDependencyError,
    PlanError,
    RingAttentionError,
    TransportError,
    UnsupportedError,
)
from ringattn.functional import attention, explain
from ringattn.layouts import Balanced, Contiguous, Explicit, Layout, Striped, Zigzag
from ringattn.masks import Blocks, Causal, Documents, Full, Mask, Predicate, Prefix, SinkTokens, Window
from ringattn.mechanisms.entmax import Entmax
from ringattn.mechanisms.gated import Gated
from ringattn.mechanisms.hard import Hard
from ringattn.mechanisms.linear import Linear
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.sampled import Sampled
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.plans.cost import Balance, Memory, Traffic, balance, lower_bound
from ringattn.plans.plan import Plan
from ringattn.plans.planning import plan, plan_all
from ringattn.plans.ulysses import UlyssesPlan, verify
from ringattn.plans.wave import WavePlan, plan_wave
from ringattn.plans.wavefront import verify_waves
from ringattn.saving import safe_globals
from ringattn.schedules.all_gather import AllGather
from ringattn.schedules.pass_q import PassQ
from ringattn.schedules.ring import Ring
from ringattn.schedules.route import Route
from ringattn.schedules.scan import Scan
from ringattn.schedules.ulysses import Ulysses
from ringattn.schedules.wave import Wave
from ringattn.sharding import Sharding
from ringattn.simulator import Simulation, simulate
from ringattn.startup import init

__version__ = "0.1.0"

__all__ = [
    "AgreementError",
    "AllGather",
    "Balance",
    "Balanced",
    "Blocks",
    "Causal",
    "CheckpointError",
    "Contiguous",
    "DeadlockError",
    "Documents",
    "Entmax",
    "Explicit",
    "Full",
    "Gated",
    "Hard",
    "InFlightError",
    "InputError",
    "Layout",
    "Linear",
    "Mask",
    "Memory",
    "Mesh",
    "MissingDependencyError",
    "MoChA",
    "Monotonic",
    "PassQ",
    "Plan",
    "PlanError",
    "Predicate",
    "Prefix",
    "Ring",
    "RingAttentionError",
    "Route",
    "Sampled",
    "Scan",
    "Sharding",
    "Simulation",
    "SinkTokens",
    "Softmax",
    "Striped",
    "Traffic",
    "TransportError",
    "Ulysses",
    "UlyssesPlan",
    "UnsupportedError",
    "Wave",
    "WavePlan",
    "Window",
    "Zigzag",
    "attention",
    "attention_rows",
    "balance",
    "conformance",
    "cumsum",
    "explain",
    "halo",
    "init",
    "lower_bound",
    "modules",
    "monotonic_stops",
    "plan",
    "plan_all",
    "plan_wave",
    "pool",
    "reduce",
    "reference",
    "safe_globals",
    "simulate",
    "verify",
    "verify_waves",
]
