"""How well a finished model draws what it is told, by an evaluator that knows renders alone."""
