"""Ways of splitting a model, computed from shapes alone: mesh, layouts, rules, shares, counts."""
