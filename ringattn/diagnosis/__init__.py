"""What a set of ranks is like: its hosts, links, patterns, clocks and kernels, measured, and judged in words."""

from ringattn.diagnosis.examination import Examination, examine
from ringattn.diagnosis.findings import findings
from ringattn.diagnosis.instruments import Instruments

__all__ = ["Examination", "Instruments", "examine", "findings"]
