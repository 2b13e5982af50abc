"""nn.Module -> layers: a target as a graph of what the constructions know."""

from ltx.graph.nodes import BatchNorm, Graph, Layer, Node, above, evaluate, fold_batch_norm, leading_to, run
from ltx.graph.tracing import trace

__all__ = ["BatchNorm", "Graph", "Layer", "Node", "above", "evaluate", "fold_batch_norm", "leading_to", "run", "trace"]
