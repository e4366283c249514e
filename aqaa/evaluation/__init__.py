"""Measuring: what the answers say (judges), how they say it (controls), and what the codes and the vocoder keep."""
