"""All use of Flower's private modules; a contract test pins these to Flower 1.41."""
