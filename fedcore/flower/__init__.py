"""All use of Flower's private modules; contract tests hold for Flower 1.41 and 1.42."""
