"""ltx: strong lottery tickets, constructed by solving a subset-sum problem for every parameter of a target."""

__version__ = "0.1.0"
