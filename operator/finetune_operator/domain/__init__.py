"""Pure: observed state in, decision out. No I/O, no clock, no kopf, no kubernetes."""
