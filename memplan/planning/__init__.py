"""What to change, what to buy, and how far it goes: search over the estimates of runs like the one asked."""

from __future__ import annotations

from memplan.planning.plan import Effect, Plan, Proposal, plan

__all__ = ["Effect", "Plan", "Proposal", "plan"]
