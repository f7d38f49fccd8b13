"""Tumours measured at four sites, each with a pandas DataFrame of its own: a report by site."""

import pandas as pd
from sklearn.datasets import load_breast_cancer

import fedcore

table = load_breast_cancer(as_frame=True).frame
sites = pd.qcut(table["mean radius"], 4, labels=["north", "east", "south", "west"])
frames = {name: part.reset_index(drop=True) for name, part in table.groupby(sites, observed=True)}

data = fedcore.from_frames(frames, target="target", test_share=0.3)
result = fedcore.simulate(
    data.task("tumours"),
    federation={"rounds": 10, "normalisation": "federated"},
    compression={"candidates": ["fp32"]},
    progress=False,
)
for site in result.record.client_tests:
    print(f"{site.client}: accuracy {site.released:.3f} on {site.examples} examples of its own")
print("report:", result.save("runs/sites") / "report.html")
