"""Bounds of what can be meant that several commands share; check/values.py has the others."""

from __future__ import annotations

HOTTEST = 10.0
"""At this temperature a logit that leads by 10 nats leads by 1, and a vocabulary of 150,000 is drawn from nearly
evenly: no text comes of it. 60 was meant in percent."""
USUAL_HEAT = (0.1, 2.0)
"""Below, sampling is greedy in all but name, and groups agree; above, text falls apart."""
