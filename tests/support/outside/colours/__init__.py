"""A package outside of armillary: a reader, a method and a task of one's own. The recipe is beside it."""
