"""Logistic regression on MNIST, 1000 clients of 60 examples."""

import torch
from models import logistic
from partition import client_data, clients, test_data

from fedcore import Task

task = Task(
    name="w2",
    kind="classification",
    model=logistic,
    clients=lambda folder: clients(folder, "w2"),
    client_data=lambda client, folder: client_data(client, folder, "w2"),
    test_data=lambda folder: test_data(folder, "w2"),
    example_input=torch.zeros(784),
)
