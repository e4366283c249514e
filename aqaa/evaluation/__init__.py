"""Measuring: what answers say, how they say it, what codes and vocoder keep, and how fast."""
