"""Stacking methods: several deltas become one, in the sparse domain.

Where no delta has an entry every task vector is zero, and no method here makes something of zeros
alone; so computing on the union of the supports gives exactly what the dense formulae give, in
time and memory that grow with the entries and not with the model. A method is a frozen dataclass
whose fields are its options; it is composed of three steps: which entries stay (`trim`, `drop`),
which sign each entry takes (`elect`), and how the values that are left become one.
"""

from __future__ import annotations

from deltakit.combine import breadcrumbs as breadcrumbs
from deltakit.combine import consensus as consensus
from deltakit.combine import dare as dare
from deltakit.combine import della as della
from deltakit.combine import disjoint as disjoint
from deltakit.combine import linear as linear
from deltakit.combine import magnitude as magnitude
from deltakit.combine import max_magnitude as max_magnitude
from deltakit.combine import ram as ram
from deltakit.combine import sce as sce
from deltakit.combine import tall_masks as tall_masks
from deltakit.combine import task_arithmetic as task_arithmetic
from deltakit.combine import ties as ties
from deltakit.combine.method import METHODS as METHODS
from deltakit.combine.method import Method as Method
