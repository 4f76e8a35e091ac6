"""Every table and figure of the paper: pure functions from the tables of a campaign to numbers, a CSV and a picture."""

from __future__ import annotations
