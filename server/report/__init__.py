"""Reports of a run: ``summary.json``, TensorBoard, MLflow, and an HTML page with plots.

Start with `folder`, the results folder of a run; `html` assembles the page.
"""
