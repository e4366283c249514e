"""Measuring: judges of answers, controls of manner, speed, codes, vocoder; `bench` runs them all.

Import its modules. May import scale and what lies below, never training."""
