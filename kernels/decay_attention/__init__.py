"""Decay attention: an additive matrix state that fades (linear attention, RetNet, GLA, HGRN2)."""
