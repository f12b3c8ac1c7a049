"""Measurements of speed beside open-mythos 0.5.0 and beside what the hardware could do at best."""
