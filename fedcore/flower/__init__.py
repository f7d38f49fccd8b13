"""The only room that imports Flower's private modules. A contract test holds it to Flower 1.41."""
