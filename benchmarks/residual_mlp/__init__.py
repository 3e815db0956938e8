"""Deep residual MLPs in the suite."""

from benchmarks.residual_mlp.cases import cases
from benchmarks.residual_mlp.features import FEATURES
from benchmarks.residual_mlp.kept import kept
from benchmarks.residual_mlp.peers import prepare

USEFUL = "2 G B W W L FLOPs forward, x3 with backward, x2 where only x has a gradient"
NOTE = """\
residual_mlp reads the weights where they are and packs nothing ahead: a step that has just changed them costs the same.
Its peers recompute nothing, not even next to checkpoint="block"; in bfloat16 all of them carry a float32 stream."""
SIZE = "depth"

__all__ = ["FEATURES", "NOTE", "SIZE", "USEFUL", "cases", "kept", "prepare"]
