"""The gated scan: a vector state per channel (HGRN, MLGRU)."""
