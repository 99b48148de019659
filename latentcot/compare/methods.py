"""Every method that a comparison can name."""

# Importing a module registers its methods.
import latentcot.baselines
import latentcot.diffusion_reasoning
import latentcot.recurrent_depth
import latentcot.recurrent_depth.latent_thoughts  # noqa: F401
from latentcot.reasoner import METHODS, Reasoner


def method_names() -> list[str]:
    return sorted(METHODS)


def find(name: str) -> type[Reasoner]:
    """The class of a method; ``ValueError`` with close names when there is none."""
    from difflib import get_close_matches

    if name not in METHODS:
        close = get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {name!r}, expected one of {', '.join(method_names())}{hint}")
    return METHODS[name]
