"""The delta rule: a matrix state that erases before it writes (DeltaNet, Gated DeltaNet, KDA)."""
