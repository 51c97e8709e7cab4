"""Models of other shapes, cut out of a stored model: fewer layers, neurons and heads."""
