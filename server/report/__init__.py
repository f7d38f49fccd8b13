"""What a run looked like: summary.json, TensorBoard events, and one page with plots."""
