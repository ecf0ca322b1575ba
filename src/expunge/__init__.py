"""Remove the influence of chosen data from trained models, and show how far it got."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
